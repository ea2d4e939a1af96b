"""What a call of `aggregated_attention` gives to an implementation."""

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The arguments of `aggregated_attention`, checked. The map has T tokens.

    Attributes:
        q, k, v, unit_q: [B, T, H, C], tokens row by row.
        k_pool, v_pool: [B, P, H, C].
        gate: [B, T, H].
        local_bias, learned_bias: [H, w²].
        pool_bias: [H, T, P].
        learned_tokens: [H, C, w²].
        size: Height and width of the map.
        window: w.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_pool: Tensor
    v_pool: Tensor
    gate: Tensor
    local_bias: Tensor
    pool_bias: Tensor
    unit_q: Tensor
    learned_tokens: Tensor
    learned_bias: Tensor
    size: tuple[int, int]
    window: int
