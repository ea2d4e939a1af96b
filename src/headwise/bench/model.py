"""Whole transformers models: a Llama, and the same converted so that some of its heads are off."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headwise
from headwise.bench.comparison import Builder, Comparison, Effort, Rival
from headwise.bench.tensors import INPUTS
from headwise.training.speed import filled_cache, logits_thrice, read_prompt, read_token


@dataclass(frozen=True)
class _Kind:
    """A Llama and what becomes of its heads."""

    dim: int
    heads: int
    kv_heads: int
    shared: int
    active: int
    route_groups: bool = False

    def __str__(self) -> str:
        kv = "" if self.kv_heads == self.heads else f", {self.kv_heads} kv"
        return f"Llama d={self.dim}, {self.heads} heads{kv}, 2 layers"


_PLAIN = _Kind(768, 12, 12, shared=2, active=6)
_GROUPED = (
    _Kind(1024, 16, 4, shared=4, active=8),
    _Kind(1024, 16, 4, shared=4, active=12),
    _Kind(1024, 16, 4, shared=4, active=8, route_groups=True),
)


def comparisons(effort: Effort) -> Iterator[Builder]:
    """Reading a prompt, and a step of generation on a filled cache."""
    length = 67 if effort.toy else 1024 if effort.quick else 4096
    grouped_length = 67 if effort.toy else 1024 if effort.quick else 2048
    contexts = (67,) if effort.toy else (4096,) if effort.quick else (4096, 16384)
    for dtype in (torch.float32, torch.bfloat16):
        yield partial(reading, effort, dtype, length, _PLAIN, "prompt")
        yield partial(reading, effort, dtype, length, _PLAIN, "next token")
        for kind in _GROUPED[::2] if effort.quick else _GROUPED:
            yield partial(reading, effort, dtype, grouped_length, kind, "prompt")
            for context in contexts:
                yield partial(reading, effort, dtype, context, kind, "next token")


def reading(effort: Effort, dtype: torch.dtype, length: int, kind: _Kind, what: str) -> Comparison:
    """A prompt; or the next token on a cache of that many, cropped back each time.

    Both models read the same cache.
    """
    dense, ours = _models(effort, dtype, length, kind)
    prompt = what == "prompt"
    inputs = torch.randint(512, (INPUTS, 1, length if prompt else 1), device=effort.device)
    turn = cycle(inputs)
    cache = None if prompt else filled_cache(dense, length)
    ids = torch.randint(512, (1, 67), device=effort.device)

    def read(model: Any) -> Any:
        if cache is None:
            return read_prompt(model, next(turn))
        return read_token(model, next(turn), cache)

    return Comparison(
        f"{what}, whole key groups" if kind.route_groups else what,
        f"{'T' if prompt else 'S'}={length}, {kind}",
        dtype,
        kind.active / kind.heads,
        lambda: read(ours),
        {"dense model": Rival(lambda: read(dense))},
        lambda: logits_thrice(ours, ids),
        launches=True,
    )


def _models(effort: Effort, dtype: torch.dtype, length: int, kind: _Kind) -> tuple[Any, Any]:
    config = LlamaConfig(
        vocab_size=512, hidden_size=kind.dim, num_attention_heads=kind.heads,
        num_key_value_heads=kind.kv_heads, num_hidden_layers=2, intermediate_size=8 * kind.dim // 3,
        max_position_embeddings=length + 8,
    )  # fmt: skip
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(LlamaForCausalLM(config).to(effort.device, dtype).eval())
    routed = headwise.MoHConfig(
        shared=kind.shared, active=kind.active, router="query_norm", route_groups=kind.route_groups
    )
    return models[0], headwise.convert(models[1], attention=routed)
