"""Kernels in C++ for CPUs (kernels/): compiled in a wheel, or by `headwise compile` for a machine.

`build` compiles them, `kernel_file` finds them, `self_check` tries them, and one module a header
makes them operators of torch with gradients. The ops' implementation "native" calls these.
"""

import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch

from headwise.ops.native.kernel_file import NoKernelsError, find

DTYPES = (torch.float32, torch.bfloat16)
_log = logging.getLogger(__name__)


def library() -> Path | None:
    """Where the kernels are; None where there are none that may be loaded."""
    found = _found()
    return found if isinstance(found, Path) else None


def what_is_missing() -> str:
    """Why there are no kernels to load, and what to do; nothing where there are."""
    found = _found()
    return found if isinstance(found, str) else ""


# A compiled model keeps what this was when it was traced.
@torch.compiler.assume_constant_result
def is_built() -> bool:
    """Whether kernels for this source and processor are there, whole, and right here."""
    return isinstance(_found(), Path)


@torch.compiler.assume_constant_result
def is_ready() -> bool:
    """`is_built`, asked by an op that the kernels would make faster; it warns where none are built.

    It warns once per process, by the logger "headwise.ops.native". At level INFO nobody would see
    that a model runs several times slower than it could.
    `logging.getLogger("headwise").setLevel("ERROR")` silences it.
    """
    if not is_built():
        _say_once()
    return is_built()


def forget() -> None:
    """Look for the kernels anew when next asked."""
    _found.cache_clear()


def kernels() -> Any:
    """The kernels, as operators of torch."""
    if not is_built():
        raise ValueError(f'impl is "native", but the kernels are missing: {what_is_missing()}')
    if not hasattr(torch.ops.headwise_native, "attention"):
        torch.ops.load_library(library())
    return torch.ops.headwise_native


@cache
def _found() -> Path | str:
    """The library, or why there is none. That is found out once per process."""
    try:
        return find()
    except (NoKernelsError, OSError) as error:
        return str(error)


@cache
def _say_once() -> None:
    _log.warning("headwise computes without its C++ kernels, more slowly: %s", what_is_missing())
