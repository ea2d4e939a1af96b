"""Aggregated attention of a stage 3 of MoH-ViT: all between projected q, k, v and gated heads."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import unfold

from headwise.bench.comparison import Builder, Comparison, Effort, Rival, Tensors
from headwise.bench.tensors import random_gates, value_and_gradients
from headwise.ops import aggregated_attention

HEADS, CHANNELS, WINDOW, POOLING = 16, 24, 3, 2
DTYPES = (torch.float32, torch.bfloat16)
_SHARES = (1.0, 0.75, 0.5)


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
    size = (batch, side**2, HEADS)
    gates, all_on = (random_gates(size, on, effort.device) for on in (share, 1.0))
    turn, all_turn = cycle(gates), cycle(all_on)

    def run(compute: Callable[..., Tensor], gate: Tensor, dtype: torch.dtype) -> list[Tensor]:
        # Gates are at least float32, as a router gives them.
        wide = gate.to(torch.promote_types(dtype, gate.dtype))
        inputs = [*(x.to(dtype) for x in tensors), wide]
        return value_and_gradients(partial(compute, side=side), inputs, backward=backward)

    def compared() -> Tensors:
        gate, on = gates[0], gates[0] != 0
        kinds = (_ours, dtype), (_plain, dtype), (_plain, torch.float64)
        computed = [run(c, gate, d) for c, d in kinds]
        if not backward:
            return tuple(computed)  # type: ignore[return-value]
        # Of a gate that is off the gradient of plain PyTorch is not 0; ours is, by definition.
        return tuple([*x[:-1], x[-1][on]] for x in computed)  # type: ignore[return-value]

    return Comparison(
        f"TransNeXt core{', forward and backward' if backward else ''}",
        f"batch {batch}, {side}×{side}, {HEADS}×{CHANNELS}, window {WINDOW}",
        dtype,
        share,
        lambda: run(_ours, next(turn), dtype),
        {
            "dense twin": Rival(
                lambda: run(_ours, next(all_turn), dtype), share, None if share == 1 else 1.0
            ),
            "plain PyTorch": Rival(lambda: run(_plain, next(turn), dtype), share),
        },
        compared,
    )


def _ours(*leaves: Tensor, side: int) -> Tensor:
    q, k, v, k_pool, v_pool, local_bias, pool_bias, unit_q, tokens, bias, gate = leaves
    return aggregated_attention(
        q, k, v, k_pool, v_pool, gate, size=(side, side), window=WINDOW, local_bias=local_bias,
        pool_bias=pool_bias, unit_q=unit_q, learned_tokens=tokens, learned_bias=bias,
    )  # fmt: skip


def _plain(*leaves: Tensor, side: int) -> Tensor:
    """As the released code writes it: windows unfolded, every head computed, then the gate."""
    q, k, v, k_pool, v_pool, local_bias, pool_bias, unit_q, tokens, bias, gate = leaves
    q, unit_q, k_pool, v_pool = (x.transpose(1, 2) for x in (q, unit_q, k_pool, v_pool))
    near_k, near_v = (_windows(x, side) for x in (k, v))
    inside = _windows(torch.ones_like(k[:1, :, :1, :1]), side).squeeze(2).bool()
    local = torch.einsum("bhtc,bhcwt->bhtw", q, near_k) + local_bias[:, None]
    local = local.masked_fill(~inside.transpose(-2, -1), float("-inf"))
    scores = torch.cat([local, q @ k_pool.transpose(-2, -1) + pool_bias], dim=-1)
    near, far = scores.softmax(-1).split([WINDOW**2, k_pool.shape[2]], dim=-1)
    near = near + unit_q @ tokens + bias[:, None]
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
