"""In which dtype something is computed."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, scores and gates: float32, or x's dtype where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """x in float32 or wider; x itself where it is that already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.to(wide_dtype(x))


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device; the device "meta" has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast is off for x's device."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of their device's autocast, where that is on."""
    if not autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) for x in tensors)
