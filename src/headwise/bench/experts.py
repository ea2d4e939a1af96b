"""Expert layers: MH-MoE against a sparse MoE of equal FLOPs, and against transformers' experts."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from headwise.bench.comparison import Builder, Comparison, Effort, Rival, Tensors
from headwise.bench.tensors import random_inputs, value_and_gradients
from headwise.nn import MHMoE, MoE
from headwise.ops import expert_mlp
from headwise.parity import count_flops

DIM = 768
# Of decoding: so few that transformers' batched_mm, which copies weights for each, has its place.
_FEW_TOKENS = 16
_MOST_COPIED = 2**30  # bytes


def comparisons(effort: Effort) -> Iterator[Builder]:
    """The paper's sizes: three sub-tokens, 96 experts of 512; eight experts of 2048."""
    on_gpu = effort.device.type == "cuda"
    tokens = 601 if effort.toy else 1024 if effort.quick else 16384 if on_gpu else 4096
    for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
        yield partial(layers, effort, dtype, tokens, backward=False)
        yield partial(layers, effort, dtype, tokens, backward=True)
        for count in (_FEW_TOKENS, tokens):
            yield partial(experts_only, effort, dtype, count)


def layers(effort: Effort, dtype: torch.dtype, tokens: int, *, backward: bool) -> Comparison:
    """Whole layers, routers included."""
    torch.manual_seed(0)
    ours = MHMoE(DIM, num_heads=3, num_experts=96, top_k=3, expert_dim=512)
    sparse = MoE(DIM, num_experts=8, top_k=1, expert_dim=2048)
    for layer in (ours, sparse):
        layer.to(effort.device, dtype)
    inputs = random_inputs((1, tokens, DIM), dtype, effort.device)
    turn = cycle(inputs)

    def run(layer: nn.Module) -> list[Tensor]:
        parameters = [p for p in layer.parameters() if p.requires_grad]
        return value_and_gradients(
            lambda x: layer(x)[0], [next(turn)], backward=backward, parameters=parameters
        )

    flops = [sum(count_flops(m, sequence_length=1).values()) for m in (ours, sparse)]
    on_gpu = effort.device.type == "cuda"
    on_cpus = 1.15 if backward else 1.25 if dtype == torch.bfloat16 else 1.05
    rival = Rival(lambda: run(sparse), flops[0] / flops[1], 1.15 if on_gpu else on_cpus)
    return Comparison(
        f"MH-MoE layer{', forward and backward' if backward else ''}",
        f"{tokens} tokens, d={DIM}; h=3, E=96, k=3, f=512",
        dtype,
        1.0,
        lambda: run(ours),
        {"sparse MoE (E=8, k=1, f=2048)": rival},
        lambda: compared(ours, inputs[0], backward=backward),
    )


def experts_only(effort: Effort, dtype: torch.dtype, tokens: int) -> Comparison:
    """The same experts, weights and choices, by transformers' functions."""
    on_gpu = effort.device.type == "cuda"
    torch.manual_seed(0)
    layer = MHMoE(DIM, num_heads=3, num_experts=96, top_k=3, expert_dim=512)
    layer = layer.to(effort.device, dtype)
    x = torch.randn(3 * tokens, DIM // 3, device=effort.device).to(dtype)
    routing = layer.router(x)
    weights, indices = routing.weights.detach().to(dtype), routing.indices
    up, down = (w.detach() for w in (layer.experts.gate_up_proj, layer.experts.down_proj))

    def ours() -> Tensor:
        return expert_mlp(x, weights, indices, up, down)

    def by(name: Literal["grouped_mm", "batched_mm"]) -> Callable[[], Tensor]:
        module = _transformers_experts(up, down, name)
        return torch.no_grad()(lambda: module(x, indices, weights))

    def tensors() -> Tensors:
        wide = x.double(), weights.double(), indices, up.double(), down.double()
        exact = expert_mlp(*wide, impl="grouped")
        return [ours()], [by("grouped_mm")()], [exact]

    target = None if tokens == _FEW_TOKENS else 1.0 if on_gpu else 0.75
    rivals = {"transformers grouped_mm": Rival(by("grouped_mm"), None, target)}
    left_out = {}
    copied = indices.numel() * (up[0].nbytes + down[0].nbytes)
    if copied > _MOST_COPIED:
        reason = f"it copies the weights of each choice: {copied / 2**30:.1f} GiB"
        left_out["transformers batched_mm"] = reason
    else:
        rivals["transformers batched_mm"] = Rival(by("batched_mm"))

    return Comparison(
        "experts alone",
        f"{3 * tokens} sub-tokens, d={DIM // 3}; E=96, k=3, f=512",
        dtype,
        1.0,
        ours,
        rivals,
        tensors,
        left_out=left_out,
    )


def _transformers_experts(up: Tensor, down: Tensor, implementation: str) -> nn.Module:
    """The experts of a transformers model, with these weights."""
    config = Qwen3MoeConfig(
        hidden_size=up.shape[2], moe_intermediate_size=down.shape[2], num_experts=len(up)
    )
    config._experts_implementation = implementation
    module = Qwen3MoeExperts(config).to(up.device, up.dtype)
    with torch.no_grad():
        module.gate_up_proj.copy_(up)
        module.down_proj.copy_(down)
    return module


def compared(layer: MoE, x: Tensor, *, backward: bool) -> Tensors:
    """The layer's experts, the same by plain products in its dtype, and those in float64.

    The choices are those of the layer's own dtype: rounding may change one, which is no error.
    """
    with torch.no_grad():
        flat = layer.split(x).flatten(0, 2)
        routing = layer.router(flat)

    def compute(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        weights = routing.weights.to(dtype)
        tensors = [x.to(dtype) for x in (flat, layer.experts.gate_up_proj, layer.experts.down_proj)]
        return value_and_gradients(
            lambda rows, up, down: function(rows, weights, routing.indices, up, down),
            tensors,
            backward=backward,
        )

    wide = compute(_plain_experts, torch.float64)
    return compute(expert_mlp, x.dtype), compute(_plain_experts, x.dtype), wide


def _plain_experts(x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Each expert on the rows that chose it, as one would write it."""
    y = torch.zeros_like(x)
    for e, (first, second) in enumerate(zip(up.unbind(), down.unbind(), strict=True)):
        rows, choices = (indices == e).nonzero(as_tuple=True)
        gate, value = linear(x[rows], first).chunk(2, dim=-1)
        out = linear(silu(gate) * value, second)
        y = y.index_add(0, rows, out * weights[rows, choices].unsqueeze(-1))
    return y
