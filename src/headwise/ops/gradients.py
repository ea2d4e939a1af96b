"""Whether a call will be differentiated."""

import torch
from torch import Tensor


def learns(*tensors: Tensor) -> bool:
    """Whether gradients are on and any of the tensors wants one."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
