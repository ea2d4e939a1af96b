"""A few queries against a long cache, in C++ (kernels/decode.h): keys of heads off are not read.

The operator is registered without `torch.library.custom_op`, whose wrapper costs a token time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.gates import flops_of_what_is_on
from headwise.ops.native import kernels
from headwise.ops.tensors import adjacent

_DECODE = "headwise::native_decode"
torch.library.define(
    _DECODE,
    "(Tensor q, Tensor k, Tensor v, Tensor gate, bool causal, Tensor? spans, Tensor? mask, "
    "Tensor? bias, float scale, Tensor? places=None) -> Tensor",
)

# y [B, T, H, C] of a few queries for each key that they see. Gates and bias are float32. With
# places [S] key s is k[:, places[s]]. Forward only.
native_decode: Any = torch.ops.headwise.native_decode


@torch.library.impl(_DECODE, "cpu")
def _decode(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, causal: bool, spans: Tensor | None,
    mask: Tensor | None, bias: Tensor | None, scale: float, places: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return kernels().decode_attention(
        q.contiguous(), adjacent(k), adjacent(v), gate.contiguous(), causal, scale, spans, mask,
        bias, places,
    )  # fmt: skip


@torch.library.register_fake(_DECODE)
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


register_flop_formula(native_decode, get_raw=True)(flops_of_what_is_on)
