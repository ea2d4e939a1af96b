"""Decoding: one token against a long cache, laid out as transformers lays out its caches."""

from collections.abc import Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from headwise.bench.comparison import Builder, Comparison, Effort, Rival, Tensors
from headwise.bench.rivals import fastest, plain_attention
from headwise.bench.tensors import random_gates
from headwise.ops import head_attention

HEADS, CHANNELS = 16, 128


def comparisons(effort: Effort) -> Iterator[Builder]:
    """Half of the heads on, in whole key groups, for batches and context lengths."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    batches: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (4096, 16384)
    if effort.device.type == "cuda":
        dtypes, batches, contexts = (torch.bfloat16,), (1, 16, 64), (8192, 32768)
    if effort.quick:
        batches, contexts = batches[:1], contexts[:1]
    if effort.toy:
        batches, contexts = (2,), (67,)
    for dtype in dtypes:
        for kv_heads in (HEADS, HEADS // 4):
            for batch in batches:
                for context in contexts:
                    yield partial(one_token, effort, dtype, batch, context, kv_heads)


def one_token(
    effort: Effort,
    dtype: torch.dtype,
    batch: int,
    context: int,
    kv_heads: int,
    *,
    heads: int = HEADS,
    channels: int = CHANNELS,
) -> Comparison:
    """One new token of each sequence."""
    torch.manual_seed(0)
    q = torch.randn(batch, 1, heads, channels, device=effort.device).to(dtype)
    cache = (batch, kv_heads, context, channels)
    k, v = (torch.randn(cache, device=effort.device).to(dtype).transpose(1, 2) for _ in range(2))
    on = random_gates((batch, 1, kv_heads), 0.5, effort.device)
    gates = [groups.repeat_interleave(heads // kv_heads, dim=2) for groups in on]
    turn = cycle(gates)

    def ours(gate: Tensor) -> Tensor:
        with torch.no_grad():
            return head_attention(q, k, v, gate, causal=True)

    def tensors() -> Tensors:
        # In float64 for the first and the last sequence: of 64 long ones it would not fit.
        some, gate = sorted({0, batch - 1}), gates[0]
        usual = (plain_attention(q, k, v) * gate.to(dtype).unsqueeze(-1))[some]
        exact = plain_attention(q[some].double(), k[some].double(), v[some].double())
        return [ours(gate)[some]], [usual], [exact * gate[some].double().unsqueeze(-1)]

    sdpa, dense = fastest(lambda: plain_attention(q, k, v), effort.device)
    target: float | None = 0.25 if dtype == torch.bfloat16 else 0.6
    if effort.device.type == "cuda":
        # One sequence does not fill a GPU: no target was set for it.
        target = None if batch == 1 else 0.6
    kv = "" if kv_heads == heads else f", {kv_heads} kv"
    return Comparison(
        "one token, whole key groups" if kv else "one token",
        f"B={batch}, S={context}, {heads}×{channels}{kv}",
        dtype,
        0.5,
        lambda: ours(next(turn)),
        {sdpa: Rival(dense, 0.5, target)},
        tensors,
    )
