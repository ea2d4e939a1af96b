"""Decoding: one token against a long cache, laid out as transformers lays out its caches."""

from collections.abc import Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headwise.bench import gpu
from headwise.bench.comparison import Builder, Comparison, Effort
from headwise.ops import head_attention

HEADS, CHANNELS = 16, 128
_ROUTINGS = 3


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
    effort: Effort, dtype: torch.dtype, batch: int, context: int, kv_heads: int
) -> Comparison:
    """One new token of each sequence."""
    torch.manual_seed(0)
    q = torch.randn(batch, 1, HEADS, CHANNELS, device=effort.device).to(dtype)
    cache = (batch, kv_heads, context, CHANNELS)
    k, v = (torch.randn(cache, device=effort.device).to(dtype).transpose(1, 2) for _ in range(2))
    gates = [_gate(effort.device, batch, kv_heads) for _ in range(_ROUTINGS)]
    turn = cycle(gates)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            enable_gqa=kv_heads != HEADS,
        )
        return heads.transpose(1, 2)

    def ours(gate: Tensor) -> Tensor:
        with torch.no_grad():
            return head_attention(q, k, v, gate, causal=True)

    def tensors() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        # In float64 for the first and the last sequence: of 64 long ones it would not fit.
        some, gate = [0, batch - 1], gates[0]
        usual = (plain(q, k, v) * gate.to(dtype).unsqueeze(-1))[some]
        exact = plain(*(x[some].double() for x in (q, k, v))) * gate[some].double().unsqueeze(-1)
        return [ours(gate)[some]], [usual], [exact]

    sdpa, dense = "SDPA", lambda: plain(q, k, v)
    if effort.device.type == "cuda":
        sdpa, dense = gpu.best_backend(dense, effort.device)
    on_cpus = 0.25 if dtype == torch.bfloat16 else 0.6
    target = 0.6 if effort.device.type == "cuda" else on_cpus
    # One sequence does not fill a GPU: no target was set for it.
    alone = effort.device.type == "cuda" and batch == 1
    kv = "" if kv_heads == HEADS else f", {kv_heads} kv"
    return Comparison(
        "decode",
        "one token, whole key groups" if kv else "one token",
        f"B={batch}, S={context}, {HEADS}×{CHANNELS}{kv}",
        dtype,
        0.5,
        lambda: ours(next(turn)),
        {sdpa: dense},
        tensors,
        ideal={sdpa: 0.5},
        targets={} if effort.toy or alone else {sdpa: target},
    )


def _gate(device: torch.device, batch: int, kv_heads: int) -> Tensor:
    best = torch.rand(batch, 1, kv_heads).topk(kv_heads // 2, dim=-1).indices
    groups = torch.zeros(batch, 1, kv_heads).scatter_(2, best, 1.0)
    return groups.repeat_interleave(HEADS // kv_heads, dim=2).to(device)
