"""Kernels in C++ for CPUs (kernels/), built once by `headwise compile`, for this machine alone.

The ops have an implementation "native" that calls them; "auto" takes it where they are built.
"""

import hashlib
import os
import platform
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

DTYPES = (torch.float32, torch.bfloat16)
_SOURCES = files("headwise.ops.native").joinpath("kernels")
_FLAGS = [
    "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fno-math-errno",
    "-fno-trapping-math",
]  # fmt: skip


def library() -> Path:
    """Where the kernels for this source, torch and processor are, or would be."""
    info = Path("/proc/cpuinfo")
    flags = (
        [x for x in info.read_text().splitlines() if x.startswith("flags")] if info.exists() else []
    )
    about = (*_sources().values(), torch.__version__, platform.machine(), *_FLAGS, *flags[:1])
    name = hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "headwise" / f"native-{name}.so"


# A compiled model keeps what this was when it was traced.
@torch.compiler.assume_constant_result
def is_built() -> bool:
    """Whether `build` was run, for this source, torch and processor."""
    return _library_exists()


@cache
def _library_exists() -> bool:
    return library().exists()


def build() -> Path:
    """Compile the kernels for this machine, check them, keep them; returns where they are.

    Where they are built already, nothing happens.

    Raises:
        RuntimeError: If compiler or ninja are missing, or the result is wrong here.
    """
    from torch.utils.cpp_extension import load

    target = library()
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        for file, text in _sources().items():
            (Path(directory) / file).write_text(text)
        name = "headwise_native_build"
        # Linked without -fopenmp: threads must be those of torch, not a second pool beside them.
        load(
            name, [f"{directory}/library.cpp"], extra_cflags=_FLAGS, is_python_module=False,
            build_directory=directory,
        )  # fmt: skip
        _check()
        os.replace(Path(directory) / f"{name}.so", target)
    forget()
    return target


def forget() -> None:
    """Look for the kernels anew when next asked."""
    _library_exists.cache_clear()


def kernels() -> Any:
    """The kernels, as operators of torch.

    Raises:
        ValueError: If they are not built.
    """
    if not is_built():
        raise ValueError('impl is "native", which is not built; run `headwise compile` once')
    if not hasattr(torch.ops.headwise_native, "attention"):
        torch.ops.load_library(library())
    return torch.ops.headwise_native


def _sources() -> dict[str, str]:
    names = sorted(file.name for file in _SOURCES.iterdir())
    return {name: _SOURCES.joinpath(name).read_text() for name in names}


def _check() -> None:
    """Refuse kernels that compute something else than torch does."""
    torch.manual_seed(0)
    ops = torch.ops.headwise_native
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        q, k, v = (torch.randn(1, 600, 2, 64, dtype=dtype) for _ in range(3))
        got, _ = ops.attention(q, k, v, torch.ones(1, 600, 2), True, 0.125)
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        want = scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        want = want.transpose(1, 2)
        _compare(got, want, tolerance)
        got = ops.decode_attention(q[:, -1:], k, v, torch.ones(1, 1, 2), True, 0.125, None)
        _compare(got, want[:, -1:], tolerance)
        _compare(*_aggregated(q, k, v), tolerance)
        sizes = (200, 64), (1, 96, 64), (1, 64, 48)
        x, up, down = (torch.randn(*size, dtype=dtype) / 8 for size in sizes)
        weights, indices = torch.ones(200, 1), torch.zeros(200, 1, dtype=torch.long)
        gate, value = linear(x, up[0]).chunk(2, dim=-1)
        got = ops.expert_mlp(x, weights, indices, up, down, False)
        _compare(got, linear(silu(gate) * value, down[0]), tolerance)


def _aggregated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A window over a whole map of 5×5, and seven pooled keys: attention over 32 keys."""
    query, key, value = (x[:, :32].transpose(1, 2) for x in (q, k, v))
    want = scaled_dot_product_attention(query[:, :, :25], key, value, scale=0.125)
    got = torch.ops.headwise_native.aggregated_attention(
        q[:, :25] * 0.125, k[:, :25], v[:, :25], k[:, 25:32], v[:, 25:32], torch.ones(1, 25, 2),
        torch.zeros(2, 81), torch.zeros(2, 25, 7), q[:, :25], torch.zeros(2, 64, 81, dtype=q.dtype),
        torch.zeros(2, 81), 5, 5, 9,
    )  # fmt: skip
    return got, want.transpose(1, 2)


def _compare(got: Tensor, want: Tensor, tolerance: float) -> None:
    if not torch.allclose(got, want, rtol=tolerance, atol=tolerance):
        raise RuntimeError(f"the kernels are wrong on this processor in {want.dtype}")
