"""Aggregated attention of a stage 3 of MoH-ViT: all between projected q, k, v and gated heads."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import unfold

from headwise.bench.comparison import Builder, Comparison, Effort
from headwise.ops import aggregated_attention

HEADS, CHANNELS, WINDOW, POOLING = 16, 24, 3, 2
DTYPES = (torch.float32, torch.bfloat16)
_SHARES = (1.0, 0.75, 0.5)
_ROUTINGS = 3


def comparisons(effort: Effort) -> Iterator[Builder]:
    """Every share of heads against all heads and against plain PyTorch, then with gradients."""
    for dtype in DTYPES:
        for backward in (False, True):
            for share in _SHARES:
                yield partial(against_dense, effort, dtype, share, backward)


def against_dense(effort: Effort, dtype: torch.dtype, share: float, backward: bool) -> Comparison:
    """The dense twin computes all heads by the same op; plain PyTorch unfolds keys and values."""
    batch, side = (2, 4) if effort.toy else (8, 14)
    tensors = _inputs(effort.device, dtype, batch, side)
    gates, all_on = _gates(effort.device, batch, side, share), _gates(effort.device, batch, side, 1)
    turn, all_turn = cycle(gates), cycle(all_on)

    def run(compute: Callable[..., Tensor], gate: Tensor, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_(backward) for x in tensors]
        # Gates are at least float32, as a router gives them.
        leaves.append(
            gate.detach().to(torch.promote_types(dtype, gate.dtype)).requires_grad_(backward)
        )
        with torch.set_grad_enabled(backward):
            y = compute(*leaves, side)
        if not backward:
            return [y]
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    def compared() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        gate, on = gates[0], gates[0] != 0
        kinds = (_ours, dtype), (_plain, dtype), (_plain, torch.float64)
        computed = [run(c, gate, d) for c, d in kinds]
        if not backward:
            return tuple(computed)  # type: ignore[return-value]
        # Of a gate that is off the gradient of plain PyTorch is not 0; ours is, by definition.
        return tuple([*x[:-1], x[-1][on]] for x in computed)  # type: ignore[return-value]

    return Comparison(
        "aggregated",
        f"TransNeXt core{', forward and backward' if backward else ''}",
        f"batch {batch}, {side}×{side}, {HEADS}×{CHANNELS}, window {WINDOW}",
        dtype,
        share,
        lambda: run(_ours, next(turn), dtype),
        {
            "dense twin": lambda: run(_ours, next(all_turn), dtype),
            "plain PyTorch": lambda: run(_plain, next(turn), dtype),
        },
        compared,
        ideal={"dense twin": share, "plain PyTorch": share},
        targets={} if share == 1 or effort.toy else {"dense twin": 1.0},
    )


def _ours(*leaves: Any) -> Tensor:
    q, k, v, k_pool, v_pool, local_bias, pool_bias, unit_q, tokens, bias, gate, side = leaves
    return aggregated_attention(
        q, k, v, k_pool, v_pool, gate, size=(side, side), window=WINDOW, local_bias=local_bias,
        pool_bias=pool_bias, unit_q=unit_q, learned_tokens=tokens, learned_bias=bias,
    )  # fmt: skip


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    local_bias: Tensor,
    pool_bias: Tensor,
    unit_q: Tensor,
    learned_tokens: Tensor,
    learned_bias: Tensor,
    gate: Tensor,
    side: int,
) -> Tensor:
    """As the released code writes it: windows unfolded, every head computed, then the gate."""
    q, unit_q, k_pool, v_pool = (x.transpose(1, 2) for x in (q, unit_q, k_pool, v_pool))
    near_k, near_v = (_windows(x, side) for x in (k, v))
    inside = _windows(torch.ones_like(k[:1, :, :1, :1]), side).squeeze(2).bool()
    local = torch.einsum("bhtc,bhcwt->bhtw", q, near_k) + local_bias[:, None]
    local = local.masked_fill(~inside.transpose(-2, -1), float("-inf"))
    scores = torch.cat([local, q @ k_pool.transpose(-2, -1) + pool_bias], dim=-1)
    near, far = scores.softmax(-1).split([WINDOW**2, k_pool.shape[2]], dim=-1)
    near = near + unit_q @ learned_tokens + learned_bias[:, None]
    y = torch.einsum("bhtw,bhcwt->bhtc", near, near_v) + far @ v_pool
    return y.transpose(1, 2) * gate.to(y.dtype).unsqueeze(-1)


def _windows(x: Tensor, side: int) -> Tensor:
    """[B, T, H, C] to [B, H, C, w², T], 0 outside the map."""
    channels = x.shape[-1]
    images = rearrange(x, "b (y x) h c -> b (h c) y x", y=side)
    windows = unfold(images, WINDOW, padding=WINDOW // 2)
    return rearrange(windows, "b (h c w) t -> b h c w t", c=channels, w=WINDOW**2)


def _inputs(device: torch.device, dtype: torch.dtype, batch: int, side: int) -> list[Tensor]:
    torch.manual_seed(0)
    tokens, pooled = side**2, (side // POOLING) ** 2
    of_map, of_pool = (batch, tokens, HEADS, CHANNELS), (batch, pooled, HEADS, CHANNELS)
    near = WINDOW**2
    sizes = (
        of_map, of_map, of_map, of_pool, of_pool, (HEADS, near), (HEADS, tokens, pooled), of_map,
        (HEADS, CHANNELS, near), (HEADS, near),
    )  # fmt: skip
    return [torch.randn(size, device=device).to(dtype) for size in sizes]


def _gates(device: torch.device, batch: int, side: int, share: float) -> list[Tensor]:
    """Gates of about 1 for a share of the heads."""
    gates = []
    for _ in range(_ROUTINGS):
        best = torch.rand(batch, side**2, HEADS).topk(round(share * HEADS), dim=-1).indices
        gate = torch.zeros(batch, side**2, HEADS).scatter_(2, best, 1.0)
        gates.append((gate * (0.5 + torch.rand_like(gate))).to(device))
    return gates
