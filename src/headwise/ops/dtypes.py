"""In which dtype something is computed."""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, scores and gates: float32, or x's dtype where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """x in float32 or wider; x itself where it is that already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.to(wide_dtype(x))


def in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of their device's autocast, where that is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
