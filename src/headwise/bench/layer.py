"""Attention layers, projections and router included, and what a long one needs of memory."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import cycle
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from headwise.bench.comparison import Builder, Comparison, Effort, Rival, Tensors
from headwise.bench.tensors import random_inputs, value_and_gradients
from headwise.nn import MoHAttention
from headwise.nn.routers import Router
from headwise.ops import HeadRouting
from headwise.parity import count_flops

DIM, HEADS = 768, 12
_PROCESSES = 5


class DenseAttention(nn.Module):
    """Causal self-attention as everybody writes it: four projections and torch's attention."""

    def __init__(self, dim: int = DIM, heads: int = HEADS, head_dim: int = DIM // HEADS) -> None:
        super().__init__()
        self.num_heads, self.head_dim, width = heads, head_dim, heads * head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, width) for _ in range(3))
        self.o_proj = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        q, k, v = (
            rearrange(proj(x), "b t (h c) -> b h t c", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        heads = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(rearrange(heads, "b h t c -> b t (h c)")), None


class ReleasedAttention(nn.Module):
    """MoH as its released code computes it: every head, routing by plain softmaxes, then a mask.

    **Source**: MoH's code, commit 2cefd57; `ops.route_heads`, mode "released", has the formulas.

    Args:
        moh: The layer whose weights it has.
    """

    def __init__(self, moh: MoHAttention) -> None:
        super().__init__()
        self.moh = moh

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        moh, router = self.moh, self.moh.router
        q, k, v = (
            rearrange(proj(x), "b t (h c) -> b h t c", c=moh.head_dim)
            for proj in (moh.q_proj, moh.k_proj, moh.v_proj)
        )
        heads = scaled_dot_product_attention(q, k, v, is_causal=True)
        count = len(router.budget.shared_groups)
        # One shared head has no softmax: its share is 1.
        even = x.new_ones(*x.shape[:2], 1)
        shared = even if count == 1 else count * linear(x, router.shared(x)).softmax(-1)  # type: ignore[operator]
        scores = linear(x, router.routed(x)).softmax(-1)  # type: ignore[operator]
        best = scores.topk(router.budget.top_k, dim=-1).indices
        kept = scores * torch.zeros_like(scores).scatter(-1, best, 1.0)
        total = kept.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).eps)
        stages = 2 * linear(x, router.stage(x)).softmax(-1)  # type: ignore[operator]
        first, second = stages.split(1, dim=-1)
        gates = torch.cat([first * shared, second * router.budget.top_k * kept / total], dim=-1)
        gated = heads.transpose(1, 2) * gates.unsqueeze(-1)
        return moh.o_proj(rearrange(gated, "b t h c -> b t (h c)")), None


def moh(share: float, impl: Any = "auto") -> MoHAttention:
    """Routed attention of the same sizes, a quarter of the heads that are on shared."""
    active = round(share * HEADS)
    return MoHAttention(
        DIM, num_heads=HEADS, shared_heads=active // 4 if active < HEADS else HEADS,
        active_heads=active, causal=True, impl=impl,
    )  # fmt: skip


def comparisons(effort: Effort) -> Iterator[Builder]:
    """Against a dense layer and against heads computed and masked; the router alone."""
    length = 67 if effort.toy else 1024 if effort.quick else 2048
    for dtype in (torch.float32, torch.bfloat16):
        for share in (0.5, 1.0):
            yield partial(against_dense, effort, dtype, length, share)
        for backward in (False, True):
            yield partial(against_mask_only, effort, dtype, min(length, 1024), backward)
        yield partial(router_alone, effort, dtype, length)


def against_dense(effort: Effort, dtype: torch.dtype, length: int, share: float) -> Comparison:
    """A forward of the layer."""
    torch.manual_seed(0)
    ours, dense = moh(share).to(effort.device, dtype), DenseAttention().to(effort.device, dtype)
    inputs = random_inputs((1, length, DIM), dtype, effort.device)
    turn = cycle(inputs)
    flops = [sum(count_flops(m, sequence_length=length).values()) for m in (ours, dense)]
    target = 1.05 if share == 1 else 0.85 if dtype == torch.float32 else None
    # Of heads that are off attention, queries and outputs are left out; keys and values are not.
    core, queries_and_outputs = 2 * DIM * (length + 1), 4 * DIM**2
    ideal = (flops[1] - (1 - share) * (core + queries_and_outputs)) / flops[1]
    return Comparison(
        "MoH layer, causal",
        f"T={length}, d={DIM}, {HEADS} heads",
        dtype,
        share,
        lambda: _run(ours, next(turn), False),
        {"dense layer": Rival(lambda: _run(dense, next(turn), False), ideal, target)},
        lambda: _compared(ours, inputs[0], False),
    )


def against_mask_only(
    effort: Effort, dtype: torch.dtype, length: int, backward: bool
) -> Comparison:
    """Every head and multiplied by the gate: by our router, and as the released code does it."""
    torch.manual_seed(0)
    ours = moh(0.5).to(effort.device, dtype)
    masked = moh(0.5, "dense").to(effort.device, dtype)
    masked.load_state_dict(ours.state_dict())
    released = ReleasedAttention(masked)
    inputs = random_inputs((1, length, DIM), dtype, effort.device)
    turn = cycle(inputs)
    flops = sum(count_flops(DenseAttention(), sequence_length=length).values())
    # Half of the queries and outputs; with gradients all are computed.
    saved = 0 if backward else 2 * DIM**2
    ideal = (flops - DIM * (length + 1) - saved) / flops
    return Comparison(
        f"MoH layer, causal{', forward and backward' if backward else ''}",
        f"T={length}, d={DIM}, {HEADS} heads",
        dtype,
        0.5,
        lambda: _run(ours, next(turn), backward),
        {
            "mask-only MoH layer": Rival(lambda: _run(masked, next(turn), backward), ideal),
            "released MoH's arithmetic": Rival(lambda: _run(released, next(turn), backward), ideal),
        },
        lambda: _compared(ours, inputs[0], backward),
    )


def router_alone(effort: Effort, dtype: torch.dtype, length: int) -> Comparison:
    """Routing as a share of the layer."""
    torch.manual_seed(0)
    layer = moh(0.5).to(effort.device, dtype)
    inputs = random_inputs((1, length, DIM), dtype, effort.device)
    turn = cycle(inputs)

    def route() -> None:
        with torch.no_grad():
            layer.router(next(turn))

    return Comparison(
        "router alone, of its layer",
        f"T={length}, d={DIM}, {HEADS} heads",
        dtype,
        0.5,
        route,
        {"its MoH layer": Rival(lambda: _run(layer, next(turn), False), None, 0.05)},
        lambda: _compared(layer, inputs[0], False),
    )


def _run(layer: nn.Module, x: Tensor, backward: bool) -> list[Tensor]:
    return value_and_gradients(lambda x: layer(x)[0], [x], backward=backward)


def compared(
    module: nn.Module, run: Callable[[nn.Module, torch.dtype], list[Tensor]], dtype: torch.dtype
) -> Tensors:
    """What a module gives, the same by torch's own attention, and that in float64.

    All with one routing: the module has one router.
    """
    (router,) = (part for part in module.modules() if isinstance(part, Router))
    routings: list[HeadRouting] = []
    hook = router.register_forward_hook(lambda _module, _inputs, output: routings.append(output))
    run(module, dtype)
    hook.remove()
    gates = routings[0].weights.detach()

    def again(impl: str | None, dtype: torch.dtype) -> list[Tensor]:
        twin = deepcopy(module).to(dtype)
        wide = gates.to(torch.promote_types(dtype, torch.float32))
        for part in twin.modules():
            if impl is not None and hasattr(part, "impl"):
                setattr(part, "impl", impl)  # noqa: B010 (mypy takes it for a tensor)
            if isinstance(part, Router):
                part.forward = lambda *_: routings[0].with_weights(wide)
        return run(twin, dtype)

    return again(None, dtype), again("dense", dtype), again("dense", torch.float64)


def _compared(layer: MoHAttention, x: Tensor, backward: bool) -> Tensors:
    return compared(layer, lambda module, dtype: _run(module, x.to(dtype), backward), x.dtype)


_MEMORY = """
import sys, torch
from headwise.bench.layer import DIM, DenseAttention, moh
from headwise.bench.memory import peak_memory
length, kind = int(sys.argv[1]), sys.argv[2]
layer = moh(0.5) if kind == "ours" else DenseAttention()
def step(length):
    x = torch.randn(1, length, DIM, requires_grad=True)
    layer(x)[0].sum().backward()
step(1024)
print(peak_memory(lambda: step(length), torch.device("cpu")))
"""


def memory_of_a_step(length: int, kind: str) -> float:
    """MiB that a forward and backward of a layer ("ours" at 50 % or "dense") adds, float32, CPU.

    The most of several processes: the watcher may miss a short peak in one of them.
    """
    command = [sys.executable, "-c", _MEMORY, str(length), kind]
    peaks = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for _ in range(_PROCESSES)
    ]
    return max(map(float, peaks))
