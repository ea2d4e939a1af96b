"""The experts that tokens are sent to, checked before they decide what is read and written."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


def known_choices(indices: Tensor, num_experts: int) -> Tensor:
    """Chosen experts [N, K] as one list [N·K], with num_experts for those that go nowhere (-1).

    Raises:
        ValueError: If there is another index than -1 and 0..num_experts-1. On other devices than
            CPUs nothing waits for the indices: torch's assertion fails there, later. An exported
            program does not check them.
    """
    if torch.compiler.is_exporting():
        return _numbered(indices.flatten(), num_experts)
    return checked_choices(indices, num_experts)


def _numbered(flat: Tensor, num_experts: int) -> Tensor:
    return flat.masked_fill(flat < 0, num_experts)


@torch.library.custom_op("headwise::known_choices", mutates_args=())
def checked_choices(indices: Tensor, num_experts: int) -> Tensor:
    """`known_choices` as an operator, because torch.compile cannot follow a check of values."""
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
    return _numbered(flat, num_experts)


@checked_choices.register_fake
def _(indices: Tensor, *_: Any) -> Tensor:
    return indices.new_empty(indices.numel())


class Runs(NamedTuple):
    """Choices sorted by expert, those that go nowhere last.

    Attributes:
        order: Places of the choices in [N·K]: first those of expert 0 as they stood, then of 1, …
        ends: Where each expert's run ends, and N·K after them, int32 [E + 1].
    """

    order: Tensor
    ends: Tensor

    def go_somewhere(self) -> Tensor:
        """Which of the sorted choices have an expert, bool [N·K, 1]."""
        places = torch.arange(self.order.shape[0], device=self.order.device)
        return (places < self.ends[-2]).unsqueeze(1)

    def put_back(self, rows: Tensor) -> Tensor:
        """Rows of the sorted choices [N·K, …], each where its choice stood."""
        return torch.empty_like(rows).index_copy(0, self.order, rows)


def runs_of_experts(indices: Tensor, num_experts: int) -> Runs:
    """The choices [N, K] sorted by expert, without reading a size back from a device.

    By example: choices 1, 0, -1, 1 of two experts are in the order 1, 0, 3, 2; ends 1, 3, 4.
    """
    choices = known_choices(indices, num_experts)
    # A radix sort takes a pass for each byte of its keys.
    narrow = torch.int16 if num_experts < torch.iinfo(torch.int16).max else torch.int32
    experts, order = torch.sort(choices.to(narrow), stable=True)
    each = torch.arange(num_experts + 1, device=experts.device, dtype=narrow)
    return Runs(order, torch.searchsorted(experts, each, right=True, out_int32=True))
