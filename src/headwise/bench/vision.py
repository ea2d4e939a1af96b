"""Blocks of the published image models against their dense twins, router and all."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn

from headwise.bench.comparison import Builder, Comparison, Effort, Rival
from headwise.bench.layer import compared
from headwise.bench.tensors import random_inputs
from headwise.models import DiTConfig, TransNeXtConfig
from headwise.models.dit.model import DiTBlock
from headwise.models.transnext.layers import Geometry
from headwise.models.transnext.model import Block
from headwise.parity import measure_flops

DTYPES = (torch.float32, torch.bfloat16)
# The layers whose dense twin has as many heads: 16.
_DIT_LAYER, _VIT_STAGE = 12, 2


def comparisons(effort: Effort) -> Iterator[Builder]:
    """A layer and a block of DiT-XL/2, and a block of ViT-B's third stage."""
    for dtype in DTYPES:
        for case in (_dit_layer, _dit_block):
            yield partial(against_twin, effort, dtype, 0.75, case)
        for share in (0.75, 0.5):
            yield partial(against_twin, effort, dtype, share, _vit_block)


# Name and shape; the routed module and its dense twin, each a function of tokens; their shape.
Case = tuple[str, str, tuple[nn.Module, nn.Module], Callable[..., Tensor], tuple[int, ...]]


def against_twin(
    effort: Effort, dtype: torch.dtype, share: float, case: Callable[[bool, float], Case]
) -> Comparison:
    """A forward without gradients."""
    torch.manual_seed(0)
    name, shape, modules, call, size = case(effort.toy, share)
    ours, dense = (module.to(effort.device, dtype).eval() for module in modules)
    inputs = random_inputs(size, dtype, effort.device)
    turn = cycle(inputs)

    def run(module: nn.Module, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [call(module, x)]

    flops = [measure_flops(partial(run, module, inputs[0])) for module in (ours, dense)]
    return Comparison(
        name,
        shape,
        dtype,
        share,
        lambda: run(ours, next(turn)),
        {"dense twin": Rival(lambda: run(dense, next(turn)), flops[0] / flops[1], 1.0)},
        lambda: compared(ours, lambda module, kind: run(module, inputs[0].to(kind)), dtype),
    )


def _dit_layer(toy: bool, share: float) -> Case:
    _, shape, blocks, _, size = _dit_block(toy, share)
    layers = tuple(block.get_submodule("attention") for block in blocks)
    return "MoH-DiT layer", shape, (layers[0], layers[1]), lambda layer, x: layer(x)[0], size


def _dit_block(toy: bool, share: float) -> Case:
    names = ("moh-dit-test", "dit-test") if toy else (f"moh-dit-xl-{100 * share:.0f}", "dit-xl")
    configs = [DiTConfig.preset(name) for name in names]
    layer = 0 if toy else _DIT_LAYER
    blocks = DiTBlock(configs[0], layer), DiTBlock(configs[1], layer)
    # Two images: with a class and, for guidance, without.
    batch, tokens, dim = 2, configs[0].num_patches, configs[0].hidden_size
    condition = torch.randn(batch, dim)
    return (
        "MoH-DiT block",
        f"batch {batch}, T={tokens}, d={dim}, {configs[0].heads_per_layer[layer]} heads",
        blocks,
        lambda block, x: block(x, condition.to(x)),
        (batch, tokens, dim),
    )


def _vit_block(toy: bool, share: float) -> Case:
    names = ("moh-test", "test") if toy else (f"moh-vit-b-{100 * share:.0f}", "transnext-base")
    configs = [TransNeXtConfig.preset(name) for name in names]
    stage = 1 if toy else _VIT_STAGE
    blocks = Block(configs[0], stage, 0.0), Block(configs[1], stage, 0.0)
    for block in blocks:
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.1)
    batch, side, dim = 8, configs[0].pretrained_side(stage), configs[0].hidden_sizes[stage]
    return (
        "MoH-ViT block, stage 3",
        f"batch {batch}, {side}×{side}, d={dim}, {configs[0].num_heads[stage]} heads",
        blocks,
        lambda block, x: block(x, Geometry.of(x, configs[0], stage, (side, side))),
        (batch, side * side, dim),
    )
