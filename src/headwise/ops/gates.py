"""What gates [B, T, H] switch on: a gate of exactly 0 means that the token skips the head."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def share_on(gate: Tensor) -> float:
    """Gates that are not 0, of all."""
    return int(gate.count_nonzero()) / max(1, gate.numel())


def attention_flops(q: Tensor, k: Tensor, computed: Tensor, causal: bool) -> int:
    """FLOPs of attention for some pairs of a token and a head: 4·C for each key that one sees.

    Args:
        q: Queries [B, T, H, C].
        k: Keys [B, S, Hkv, C].
        computed: True for the pairs that are computed, [B, T, H].
        causal: Token t sees keys up to t + S - T.
    """
    seen = torch.full((q.shape[1],), k.shape[1], device=q.device)
    if causal:
        seen = (seen - q.shape[1] + 1 + torch.arange(q.shape[1], device=q.device)).clamp_min(0)
    return 4 * q.shape[3] * int((computed.sum((0, 2)) * seen).sum())


def flops_of_what_is_on(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, causal: bool, *_: Any, **__: Any
) -> int:
    """The formula for ops that compute exactly the pairs whose gate is not 0."""
    return attention_flops(q, k, gate != 0, causal)


def arrange_gates(
    shared: Sequence[int],
    of_shared: Float[Tensor, "*batch s"],
    of_others: Float[Tensor, "*batch r"],
) -> Float[Tensor, "*batch H"]:
    """Gates of the shared heads and of the others, each where its head stands."""
    if not shared:
        return of_others
    gates = torch.cat([of_shared, of_others], dim=-1)
    num_heads = gates.shape[-1]
    order = [*shared, *(head for head in range(num_heads) if head not in shared)]
    if order == sorted(order):
        return gates
    # Not by indexing with a list: that waits for a copy to the device.
    each = gates.unbind(-1)
    return torch.stack([each[order.index(head)] for head in range(num_heads)], dim=-1)
