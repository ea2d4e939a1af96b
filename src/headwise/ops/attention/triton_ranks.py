"""Which tokens are on, head by head, in one pass over the gates."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.ops.triton_rows import FUSION

_TOKENS = 4096


def ranked(gate: Tensor) -> tuple[Tensor, Tensor]:
    """Per head, int32 [B, H, T]: tokens that are on, ascending, then from the end those that are
    off; and how many are on up to and including each token."""
    batch, tokens, heads = gate.shape
    positions = gate.new_empty(batch, heads, tokens, dtype=torch.int32)
    on_so_far = torch.empty_like(positions)
    with torch.cuda.device_of(gate):
        _rank_kernel[(batch * heads,)](
            gate, positions, on_so_far, gate.stride(), tokens, heads,
            TOKENS=min(_TOKENS, triton.next_power_of_2(tokens)), num_warps=16,
            **FUSION,
        )  # fmt: skip
    return positions, on_so_far


@triton.jit
@no_type_check
def _rank_kernel(gate, positions, on_so_far, gate_strides, T, H, TOKENS: tl.constexpr):
    """Token t goes to place on_so_far - 1 if it is on; else the n-th that is off to T - 1 - n."""
    pair = tl.program_id(0).to(tl.int64)
    gate += pair // H * gate_strides[0] + pair % H * gate_strides[2]
    positions += pair * T
    on_so_far += pair * T
    before = 0
    for start in range(0, T, TOKENS):
        t = start + tl.arange(0, TOKENS)
        inside = t < T
        gates = tl.load(gate + t.to(tl.int64) * gate_strides[1], mask=inside, other=0)
        on = (gates != 0).to(tl.int32)
        so_far = before + tl.cumsum(on, 0)
        place = tl.where(on == 1, so_far - 1, T - 1 - (t - so_far))
        tl.store(positions + place, t, mask=inside)
        tl.store(on_so_far + t, so_far, mask=inside)
        before += tl.sum(on, 0)
