"""What a call of `aggregated_attention` gives to an implementation."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Operands(NamedTuple):
    """The arguments of `aggregated_attention`, checked: near are the w² positions of a window."""

    q: Float[Tensor, "B T H C"]
    k: Float[Tensor, "B T H C"]
    v: Float[Tensor, "B T H C"]
    k_pool: Float[Tensor, "B P H C"]
    v_pool: Float[Tensor, "B P H C"]
    gate: Float[Tensor, "B T H"]
    local_bias: Float[Tensor, "H near"]
    pool_bias: Float[Tensor, "H T P"]
    unit_q: Float[Tensor, "B T H C"]
    learned_tokens: Float[Tensor, "H C near"]
    learned_bias: Float[Tensor, "H near"]
    size: tuple[int, int]
    window: int
