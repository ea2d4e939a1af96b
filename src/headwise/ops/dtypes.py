"""What sums, scores and gates are computed in."""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32, or x's dtype where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)
