"""The attention core: all between projected q, k, v and gated heads, gathering included."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from headwise.bench.comparison import Builder, Comparison, Effort, Rival, Tensors, runnable
from headwise.bench.rivals import (
    EXACT_LENGTH,
    attention_of_rows,
    causal_flex_attention,
    compiled_flex_attention,
    fastest,
    gathered_flex_attention,
    plain_attention,
    rows_to_check,
)
from headwise.bench.tensors import random_gates, value_and_gradients
from headwise.ops import head_attention

DTYPES = (torch.float32, torch.bfloat16)
# Where FlexAttention is a rival, on CPUs not of grouped keys: it compiles half a minute a shape.
_FLEX_LENGTHS = {"cpu": 4096, "cuda": 16384}
_GATHERED = "FlexAttention, queries gathered"
_NO_BACKWARD = "it has no backward on CPUs"


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
    gates = _gates(effort, core)
    turn = cycle(gates)

    def ours(gate: Tensor) -> Tensor:
        with torch.no_grad():
            return head_attention(q, k, v, gate, causal=core.causal, share_on=core.share)

    def mask_only(gate: Tensor) -> Tensor:
        return plain() * gate.to(core.dtype).unsqueeze(-1)

    def tensors() -> Tensors:
        gate = gates[0]
        rows = rows_to_check(core.length, effort.device)
        wide = q[:, rows].double(), k.double(), v.double()
        exact = attention_of_rows(*wide, rows, core.causal)
        exact *= gate[:, rows].double().unsqueeze(-1)
        return [ours(gate)[:, rows]], [mask_only(gate)[:, rows]], [exact]

    sdpa, plain = fastest(lambda: plain_attention(q, k, v, core.causal), effort.device)
    rivals = {
        sdpa: Rival(plain, core.share, _target(effort, core)),
        "mask-only MoH": Rival(lambda: mask_only(next(turn)), core.share),
    }
    flexes, left_out = _flex(effort, core, (q, k, v), gates)
    rivals |= flexes
    return Comparison(
        core.name,
        str(core),
        core.dtype,
        core.share,
        lambda: ours(next(turn)),
        rivals,
        tensors,
        left_out=left_out,
    )


def step(effort: Effort, core: Core) -> Comparison:
    """Attention and the gradients of q, k, v and gate."""
    leaves = _inputs(effort.device, core)
    gates = _gates(effort, core)
    upstream = torch.randn_like(leaves[0])
    turn = cycle(gates)

    def gathered(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return head_attention(q, k, v, gate, causal=core.causal, share_on=core.share)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain_attention(q, k, v, core.causal)

    def masked(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return plain(q, k, v) * gate.to(q.dtype).unsqueeze(-1)

    def gradients(compute: Callable[..., Tensor], *more: Tensor) -> list[Tensor]:
        return value_and_gradients(compute, [*leaves, *more], upstream=upstream)

    def tensors() -> Tensors:
        part = slice(0, min(core.length, EXACT_LENGTH))
        inputs = [x[:, part] for x in (*leaves, gates[0])]
        dy = upstream[:, part]
        got, usual = (value_and_gradients(f, inputs, upstream=dy) for f in (gathered, masked))
        exact = value_and_gradients(masked, [x.double() for x in inputs], upstream=dy.double())
        # Of a gate that is off the mask-only gradient is not 0; ours is, by definition.
        on = inputs[3] != 0
        return tuple([*x[:4], x[4][on]] for x in (got, usual, exact))  # type: ignore[return-value]

    sdpa, dense = fastest(lambda: gradients(plain), effort.device)
    targets: tuple[float | None, float | None]
    targets = (0.65, None) if core.dtype == torch.bfloat16 else (0.75, 0.75)
    if effort.device.type == "cuda":
        targets = (0.75 if core.share == 0.5 else None, None)
    rivals = {
        sdpa: Rival(dense, core.share, targets[0]),
        "mask-only MoH": Rival(lambda: gradients(masked, next(turn)), core.share, targets[1]),
    }
    left_out: dict[str, str] = {}
    if _has_flex(effort, core) and effort.device.type == "cpu":
        left_out["FlexAttention"] = _NO_BACKWARD
    elif _has_flex(effort, core):
        flex = causal_flex_attention(compiled_flex_attention(), core.length, effort.device)
        dense_flex = Rival(lambda: gradients(flex), core.share)
        more, left_out = runnable({"FlexAttention": dense_flex})
        rivals |= more
    return Comparison(
        f"{core.name}, forward and backward",
        str(core),
        core.dtype,
        core.share,
        lambda: gradients(gathered, next(turn)),
        rivals,
        tensors,
        left_out=left_out,
    )


def _target(effort: Effort, core: Core) -> float | None:
    if effort.device.type == "cuda":
        half = 0.67 if core.length < 16384 else 0.59
        return {0.5: half, 1.0: 1.05}.get(core.share)
    if core.dtype == torch.bfloat16:
        return {0.5: 0.4, 0.75: 0.6, 1.0: 0.8}.get(core.share)
    return {0.5: 0.6, 1.0: 1.05}.get(core.share)


def _flex(
    effort: Effort, core: Core, inputs: tuple[Tensor, Tensor, Tensor], gates: list[Tensor]
) -> tuple[dict[str, Rival], dict[str, str]]:
    """FlexAttention of every head, and of gathered queries; why it is left out."""
    if not _has_flex(effort, core):
        return {}, {}
    flex, turn = compiled_flex_attention(), cycle(gates)
    dense = causal_flex_attention(flex, core.length, effort.device)

    def gathered(gate: Tensor) -> Tensor:
        with torch.no_grad():
            return gathered_flex_attention(flex, *inputs, gate)

    # Compiled before it is timed, for each number of blocks that a routing needs.
    tried = Rival(lambda: [gathered(gate) for gate in gates])
    every = Rival(lambda: dense(*inputs), core.share)
    rivals, left_out = runnable({"FlexAttention": every, _GATHERED: tried})
    if _GATHERED in rivals:
        rivals[_GATHERED] = Rival(lambda: gathered(next(turn)), 1.0)
    return rivals, left_out


def _has_flex(effort: Effort, core: Core) -> bool:
    plain = core.causal and not core.skewed and core.share == 0.5
    grouped = effort.device.type == "cpu" and core.kv_heads < core.heads
    return plain and not grouped and core.length == _FLEX_LENGTHS[effort.device.type]


def _inputs(device: torch.device, core: Core) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, core.length, heads, core.channels, device=device).to(core.dtype)
        for heads in (core.heads, core.kv_heads, core.kv_heads)
    )
    return q, k, v


def _gates(effort: Effort, core: Core) -> list[Tensor]:
    shape = (1, core.length, core.heads)
    return random_gates(shape, core.share, effort.device, skewed=core.skewed)
