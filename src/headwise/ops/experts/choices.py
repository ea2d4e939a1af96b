"""The experts that tokens are sent to, checked before they decide what is read and written."""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("headwise::known_choices", mutates_args=())
def known_choices(indices: Tensor, num_experts: int) -> Tensor:
    """Chosen experts [N, K] as one list [N·K], with num_experts for those that go nowhere (-1).

    Raises:
        ValueError: If there is another index than -1 and 0..num_experts-1. On other devices than
            CPUs nothing waits for the indices: torch's assertion fails there, later.
    """
    flat = indices.flatten()
    if flat.numel() > 0 and flat.device.type == "cpu":
        lowest, highest = (int(x) for x in flat.aminmax())
        if lowest < -1 or highest >= num_experts:
            wrong = lowest if lowest < -1 else highest
            raise ValueError(
                f"indices holds {wrong}; it must hold experts, 0..{num_experts - 1}, or -1"
            )
    elif flat.numel() > 0:
        known = ((flat >= -1) & (flat < num_experts)).all()
        torch._assert_async(known, f"indices must hold experts, 0..{num_experts - 1}, or -1")
    return flat.masked_fill(flat < 0, num_experts)


@known_choices.register_fake
def _(indices: Tensor, *_: Any) -> Tensor:
    return indices.new_empty(indices.numel())
