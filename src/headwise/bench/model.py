"""Whole transformers models: a Llama, and the same converted so that half of its heads are on."""

from collections.abc import Iterator
from functools import partial
from itertools import cycle
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import headwise
from headwise.bench.comparison import Builder, Comparison, Effort
from headwise.hf import attention
from headwise.ops import Routing, head_attention

_INPUTS = 3


def comparisons(effort: Effort) -> Iterator[Builder]:
    """Reading a prompt, and a step of generation on a filled cache."""
    length = 67 if effort.toy else 1024 if effort.quick else 4096
    for dtype in (torch.float32, torch.bfloat16):
        yield partial(prompt, effort, dtype, length)
        yield partial(next_token, effort, dtype, length)


def prompt(effort: Effort, dtype: torch.dtype, length: int) -> Comparison:
    """The forward over a prompt."""
    dense, ours = _models(effort, dtype, length)
    prompts = [torch.randint(512, (1, length), device=effort.device) for _ in range(_INPUTS)]
    turn = cycle(prompts)

    def run(model: Any) -> Tensor:
        with torch.no_grad():
            return model(next(turn), logits_to_keep=1, use_cache=False).logits

    return Comparison(
        "model",
        "prompt",
        f"T={length}, Llama d=768, 12 heads, 2 layers",
        dtype,
        0.5,
        lambda: run(ours),
        {"dense model": lambda: run(dense)},
        lambda: _compared(ours, prompts[0][:, :67]),
    )


def next_token(effort: Effort, dtype: torch.dtype, length: int) -> Comparison:
    """One token on a cache that holds the prompt, and is cropped back to it each time."""
    dense, ours = _models(effort, dtype, length)
    ids = torch.randint(512, (1, length), device=effort.device)
    token = torch.randint(512, (1, 1), device=effort.device)
    caches = {}
    for name, model in (("dense", dense), ("ours", ours)):
        with torch.no_grad():
            caches[name] = model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def run(name: str, model: Any) -> None:
        cache = caches[name]
        with torch.no_grad():
            model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return Comparison(
        "model",
        "next token",
        f"S={length}, Llama d=768, 12 heads, 2 layers",
        dtype,
        0.5,
        lambda: run("ours", ours),
        {"dense model": lambda: run("dense", dense)},
        lambda: _compared(ours, ids[:, :67]),
    )


def _models(effort: Effort, dtype: torch.dtype, length: int) -> tuple[Any, Any]:
    config = LlamaConfig(
        vocab_size=512, hidden_size=768, num_attention_heads=12, num_hidden_layers=2,
        intermediate_size=2048, max_position_embeddings=length + 8,
    )  # fmt: skip
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(LlamaForCausalLM(config).to(effort.device, dtype).eval())
    half = headwise.MoHConfig(shared=2, active=6, router="query_norm")
    return models[0], headwise.convert(models[1], attention=half)


def _compared(ours: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Logits, and those of the same model and routing by torch's attention, then in float64."""
    dtype = next(ours.parameters()).dtype
    with torch.no_grad():
        with headwise.record_routing(ours) as routings:
            got = ours(ids).logits
        routers = {name: ours.get_submodule(name) for name in routings}
        try:
            for name, router in routers.items():
                router.forward = partial(_decided, routings[name])
            with patch.object(attention, "head_attention", partial(head_attention, impl="dense")):
                usual, exact = ours(ids).logits, ours.double()(ids).logits
        finally:
            for router in routers.values():
                del router.forward
            ours.to(dtype)
    return [got], [usual], [exact]


def _decided(routing: Routing, *_: Any) -> Routing:
    return routing
