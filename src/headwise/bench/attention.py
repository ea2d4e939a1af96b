"""The attention core: all between projected q, k, v and gated heads, gathering included."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headwise.bench.comparison import Builder, Comparison, Effort
from headwise.ops import head_attention

HEADS, CHANNELS = 12, 64
# Routings to draw from: a kernel must not win by having seen a shape before.
_ROUTINGS = 3
DTYPES = (torch.float32, torch.bfloat16)


def comparisons(effort: Effort) -> Iterator[Builder]:
    """Forward at half of the heads for every length, then shares, skew, groups, gradients."""
    lengths = (67,) if effort.toy else (512, 1024) if effort.quick else (512, 1024, 2048, 4096)
    for dtype in DTYPES:
        for causal in (True, False):
            for length in lengths:
                yield partial(forward, effort, dtype, length, causal)
            for length in lengths[-2:]:
                for share in (0.25, 0.75, 1.0):
                    yield partial(forward, effort, dtype, length, causal, share=share)
            yield partial(forward, effort, dtype, lengths[-1], causal, skewed=True)
            yield partial(forward, effort, dtype, lengths[-1], causal, kv_heads=HEADS // 3)
        for length in lengths[1::2] or lengths:
            yield partial(step, effort, dtype, length)


def forward(
    effort: Effort,
    dtype: torch.dtype,
    length: int,
    causal: bool,
    *,
    share: float = 0.5,
    skewed: bool = False,
    kv_heads: int = HEADS,
) -> Comparison:
    """Attention without gradients."""
    q, k, v = _inputs(effort.device, dtype, length, kv_heads)
    gates = _gates(effort.device, length, share, skewed)
    turn = cycle(gates)

    def ours() -> Tensor:
        with torch.no_grad():
            return head_attention(q, k, v, next(turn), causal=causal)

    def plain() -> Tensor:
        return _plain(q, k, v, causal)

    def mask_only() -> Tensor:
        return plain() * next(turn).to(dtype).unsqueeze(-1)

    def tensors() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        gate = gates[0]
        with torch.no_grad():
            got = head_attention(q, k, v, gate, causal=causal)
            usual = plain() * gate.to(dtype).unsqueeze(-1)
            exact = _plain(q.double(), k.double(), v.double(), causal)
            exact *= gate.double().unsqueeze(-1)
        return [got], [usual], [exact]

    half = dtype == torch.bfloat16
    target = ({0.5: 0.4, 0.75: 0.6, 1.0: 0.8} if half else {0.5: 0.6, 1.0: 1.05}).get(share)
    return Comparison(
        "attention",
        f"core, {'causal' if causal else 'full'}{', skewed router' if skewed else ''}",
        f"T={length}, {HEADS}×{CHANNELS}" + (f", {kv_heads} kv" if kv_heads < HEADS else ""),
        dtype,
        share,
        ours,
        {"SDPA": plain, "mask-only MoH": mask_only},
        tensors,
        ideal={"SDPA": share, "mask-only MoH": share},
        targets={} if target is None else {"SDPA": target},
    )


def step(effort: Effort, dtype: torch.dtype, length: int) -> Comparison:
    """Causal attention and the gradients of q, k, v and gate, at half of the heads."""
    leaves = [x.requires_grad_() for x in _inputs(effort.device, dtype, length, HEADS)]
    gates = [g.requires_grad_() for g in _gates(effort.device, length, 0.5, False)]
    upstream = torch.randn_like(leaves[0])
    turn = cycle(gates)

    def gradients(compute: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
        y = compute(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    def gathered(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return head_attention(q, k, v, gate, causal=True)

    def masked(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return _plain(q, k, v, True) * gate.to(q.dtype).unsqueeze(-1)

    def tensors() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs = [*leaves, gates[0]]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        got, usual = gradients(gathered, inputs, upstream), gradients(masked, inputs, upstream)
        exact = gradients(masked, wide, upstream.double())
        # Of a gate that is off the mask-only gradient is not 0; ours is, by definition.
        on = gates[0] != 0
        return tuple([*x[:4], x[4][on]] for x in (got, usual, exact))  # type: ignore[return-value]

    half = dtype == torch.bfloat16
    return Comparison(
        "attention",
        "core, causal, forward and backward",
        f"T={length}, {HEADS}×{CHANNELS}",
        dtype,
        0.5,
        lambda: gradients(gathered, [*leaves, next(turn)], upstream),
        {
            "SDPA": lambda: gradients(lambda q, k, v: _plain(q, k, v, True), leaves, upstream),
            "mask-only MoH": lambda: gradients(masked, [*leaves, next(turn)], upstream),
        },
        tensors,
        ideal={"SDPA": 0.5, "mask-only MoH": 0.5},
        targets={"SDPA": 0.65 if half else 0.75} | ({} if half else {"mask-only MoH": 0.75}),
    )


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with torch.set_grad_enabled(q.requires_grad):
        heads = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=causal,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return heads.transpose(1, 2)


def _inputs(
    device: torch.device, dtype: torch.dtype, length: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, length, heads, CHANNELS, device=device).to(dtype)
        for heads in (HEADS, kv_heads, kv_heads)
    )
    return q, k, v


def _gates(device: torch.device, length: int, share: float, skewed: bool) -> list[Tensor]:
    """Gates of about 1 for a share of the heads; skewed: the first is nearly always on."""
    tilt = torch.linspace(3 if skewed else 0, 0, HEADS)
    gates = []
    for _ in range(_ROUTINGS):
        noise = -torch.log(-torch.log(torch.rand(1, length, HEADS)))
        best = (noise + tilt).topk(round(share * HEADS), dim=-1).indices
        gate = torch.zeros(1, length, HEADS).scatter_(2, best, 1.0)
        gates.append((gate * (0.5 + torch.rand_like(gate))).to(device))
    return gates
