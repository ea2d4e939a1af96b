"""A few queries against a long cache, in C++ (kernels/decode.h): keys of heads off are not read."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.gates import flops_of_what_is_on
from headwise.ops.native import kernels
from headwise.ops.tensors import adjacent


@torch.library.custom_op("headwise::native_decode", mutates_args=())
def native_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    causal: bool,
    spans: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """y [B, T, H, C] of a few queries. Gates and bias are float32. Forward only."""
    return kernels().decode_attention(
        q.contiguous(), adjacent(k), adjacent(v), gate.contiguous(), causal, scale, spans, mask,
        bias,
    )  # fmt: skip


@native_decode.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


register_flop_formula(torch.ops.headwise.native_decode, get_raw=True)(flops_of_what_is_on)
