"""The attention core: all between projected q, k, v and gated heads, gathering included."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headwise.bench import gpu
from headwise.bench.comparison import Builder, Comparison, Effort
from headwise.ops import head_attention

# Routings to draw from: a kernel must not win by having seen a shape before.
_ROUTINGS = 3
DTYPES = (torch.float32, torch.bfloat16)
# Of longer inputs the exact result is computed for some of the queries only.
_EXACT_ROWS, _EXACT_LENGTH = 128, 4096
# Where FlexAttention is a rival: each shape takes it seconds to compile.
_FLEX_LENGTH = 16384


@dataclass(frozen=True)
class Core:
    """Sizes of a case: `heads` heads of `channels` on T = `length` tokens, a share of them on."""

    dtype: torch.dtype
    length: int
    causal: bool = True
    heads: int = 12
    channels: int = 64
    kv_heads: int = 12
    share: float = 0.5
    skewed: bool = False

    def __str__(self) -> str:
        kv = f", {self.kv_heads} kv" if self.kv_heads < self.heads else ""
        return f"T={self.length}, {self.heads}×{self.channels}{kv}"

    @property
    def name(self) -> str:
        """What kind of attention, and of routing."""
        kind = "causal" if self.causal else "full"
        return f"core, {kind}{', skewed router' if self.skewed else ''}"


def comparisons(effort: Effort) -> Iterator[Builder]:
    """Forward at half of the heads for every length, then shares, skew, groups, gradients."""
    if effort.device.type == "cuda" and not effort.toy:
        yield from _on_gpus(effort)
        return
    lengths = (67,) if effort.toy else (512, 1024) if effort.quick else (512, 1024, 2048, 4096)
    for dtype in DTYPES:
        for causal in (True, False):
            for length in lengths:
                yield partial(forward, effort, Core(dtype, length, causal))
            for length in lengths[-2:]:
                for share in (0.25, 0.75, 1.0):
                    yield partial(forward, effort, Core(dtype, length, causal, share=share))
            longest = Core(dtype, lengths[-1], causal)
            yield partial(forward, effort, replace(longest, skewed=True))
            yield partial(forward, effort, replace(longest, kv_heads=4))
        for length in lengths[1::2] or lengths:
            yield partial(step, effort, Core(dtype, length))


def _on_gpus(effort: Effort) -> Iterator[Builder]:
    """Long inputs in bfloat16, of two head widths; 16 heads, as many channels in all."""
    lengths = (8192,) if effort.quick else (8192, 16384, 32768)
    for channels in (64, 128):
        wide = Core(torch.bfloat16, lengths[0], heads=16, channels=channels, kv_heads=16)
        for length in lengths:
            for share in (0.5,) if effort.quick else (0.25, 0.5, 0.75, 1.0):
                yield partial(forward, effort, replace(wide, length=length, share=share))
        long = replace(wide, length=lengths[len(lengths) // 2])
        for changes in ({"skewed": True}, {"kv_heads": 4}, {"causal": False}):
            yield partial(forward, effort, replace(long, **changes))
        for length in lengths[:2]:
            for share in (0.5, 1.0):
                yield partial(step, effort, replace(wide, length=length, share=share))


def forward(effort: Effort, core: Core) -> Comparison:
    """Attention without gradients."""
    q, k, v = _inputs(effort.device, core)
    gates = _gates(effort.device, core)
    turn = cycle(gates)

    def ours() -> Tensor:
        with torch.no_grad():
            return head_attention(q, k, v, next(turn), causal=core.causal, share_on=core.share)

    def mask_only() -> Tensor:
        return plain() * next(turn).to(core.dtype).unsqueeze(-1)

    def tensors() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        gate = gates[0]
        rows = _rows_to_check(core, effort.device)
        with torch.no_grad():
            got = head_attention(q, k, v, gate, causal=core.causal, share_on=core.share)[:, rows]
            usual = (plain() * gate.to(core.dtype).unsqueeze(-1))[:, rows]
            exact = _exact(q, k, v, rows, core.causal) * gate[:, rows].double().unsqueeze(-1)
        return [got], [usual], [exact]

    sdpa, plain = _fastest(lambda: _plain(q, k, v, core.causal), effort)
    rivals = {sdpa: plain, "mask-only MoH": mask_only}
    if _has_flex(effort, core):
        flex = gpu.causal_flex_attention(core.length, effort.device)
        rivals["FlexAttention"] = lambda: flex(q, k, v)
    target = _target(effort, core)
    return Comparison(
        "attention",
        core.name,
        str(core),
        core.dtype,
        core.share,
        ours,
        rivals,
        tensors,
        ideal=dict.fromkeys(rivals, core.share),
        targets={} if target is None else {sdpa: target},
    )


def step(effort: Effort, core: Core) -> Comparison:
    """Attention and the gradients of q, k, v and gate."""
    leaves = [x.requires_grad_() for x in _inputs(effort.device, core)]
    gates = [g.requires_grad_() for g in _gates(effort.device, core)]
    upstream = torch.randn_like(leaves[0])
    turn = cycle(gates)

    def gradients(compute: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
        y = compute(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    def gathered(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return head_attention(q, k, v, gate, causal=core.causal, share_on=core.share)

    def masked(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return _plain(q, k, v, core.causal) * gate.to(q.dtype).unsqueeze(-1)

    def tensors() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        part = slice(0, min(core.length, _EXACT_LENGTH))
        inputs = [x.detach()[:, part].requires_grad_() for x in (*leaves, gates[0])]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        dy = upstream[:, part]
        got, usual = gradients(gathered, inputs, dy), gradients(masked, inputs, dy)
        exact = gradients(masked, wide, dy.double())
        # Of a gate that is off the mask-only gradient is not 0; ours is, by definition.
        on = inputs[3] != 0
        return tuple([*x[:4], x[4][on]] for x in (got, usual, exact))  # type: ignore[return-value]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _plain(q, k, v, core.causal)

    sdpa, dense = _fastest(lambda: gradients(plain, leaves, upstream), effort)
    rivals = {
        sdpa: dense,
        "mask-only MoH": lambda: gradients(masked, [*leaves, next(turn)], upstream),
    }
    if _has_flex(effort, core):
        flex = gpu.causal_flex_attention(core.length, effort.device)
        rivals["FlexAttention"] = lambda: gradients(flex, leaves, upstream)
    half = core.dtype == torch.bfloat16
    targets = {sdpa: 0.65 if half else 0.75} | ({} if half else {"mask-only MoH": 0.75})
    if effort.device.type == "cuda":
        targets = {sdpa: 0.75} if core.share == 0.5 else {}
    return Comparison(
        "attention",
        f"{core.name}, forward and backward",
        str(core),
        core.dtype,
        core.share,
        lambda: gradients(gathered, [*leaves, next(turn)], upstream),
        rivals,
        tensors,
        ideal=dict.fromkeys(rivals, core.share),
        targets=targets,
    )


def _target(effort: Effort, core: Core) -> float | None:
    if effort.device.type == "cuda":
        half = 0.67 if core.length < _FLEX_LENGTH else 0.59
        return {0.5: half, 1.0: 1.05}.get(core.share)
    if core.dtype == torch.bfloat16:
        return {0.5: 0.4, 0.75: 0.6, 1.0: 0.8}.get(core.share)
    return {0.5: 0.6, 1.0: 1.05}.get(core.share)


def _has_flex(effort: Effort, core: Core) -> bool:
    plain = core.causal and not core.skewed and core.share == 0.5
    return effort.device.type == "cuda" and plain and core.length == _FLEX_LENGTH


def _fastest(run: Callable[[], object], effort: Effort) -> tuple[str, Callable[[], Tensor]]:
    """torch's attention: on a GPU by its fastest backend."""
    if effort.device.type == "cuda":
        return gpu.best_backend(run, effort.device)
    return "SDPA", run  # type: ignore[return-value]


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


def _exact(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, causal: bool) -> Tensor:
    """Attention of some of the queries in float64."""
    keys = torch.arange(k.shape[1], device=q.device)
    mask = keys <= rows.unsqueeze(1) if causal else None
    q, k, v = (x.double().transpose(1, 2) for x in (q[:, rows], k, v))
    grouped = q.shape[1] != k.shape[1]
    heads = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return heads.transpose(1, 2)


def _rows_to_check(core: Core, device: torch.device) -> Tensor:
    every = torch.arange(core.length, device=device)
    if core.length <= _EXACT_LENGTH:
        return every
    return every[torch.randperm(core.length, device=device)[:_EXACT_ROWS]]


def _inputs(device: torch.device, core: Core) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, core.length, heads, core.channels, device=device).to(core.dtype)
        for heads in (core.heads, core.kv_heads, core.kv_heads)
    )
    return q, k, v


def _gates(device: torch.device, core: Core) -> list[Tensor]:
    """Gates of about 1 for a share of the heads; skewed: the first is nearly always on."""
    tilt = torch.linspace(3 if core.skewed else 0, 0, core.heads)
    gates = []
    for _ in range(_ROUTINGS):
        noise = -torch.log(-torch.log(torch.rand(1, core.length, core.heads)))
        best = (noise + tilt).topk(round(core.share * core.heads), dim=-1).indices
        gate = torch.zeros(1, core.length, core.heads).scatter_(2, best, 1.0)
        gates.append((gate * (0.5 + torch.rand_like(gate))).to(device))
    return gates
