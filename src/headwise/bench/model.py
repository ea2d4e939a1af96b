"""Whole transformers models: a Llama, and the same converted so that some of its heads are off."""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, QuantizedCache

import headwise
from headwise.bench.comparison import Builder, Comparison, Effort, LeftOutError, Rival
from headwise.bench.machine import Machine, Work, measure_machine
from headwise.bench.tensors import INPUTS
from headwise.hf import record_routing
from headwise.training.speed import filled_cache, logits_thrice, read_prompt, read_token

What = Literal["prompt", "next token"]
Backend = Literal["quanto", "hqq", "fp8"]

DTYPES = (torch.float32, torch.bfloat16)
_LAYERS, _VOCABULARY = 2, 512
_BATCHES, _LENGTHS = (1, 8, 32), (1024, 4096, 16384, 65536)
# Of transformers' quantised caches, and the bits that a value takes (scales not counted).
_BITS: dict[Backend, int] = {"quanto": 4, "hqq": 4, "fp8": 8}
# A prompt whose limit is longer would take a minute or more: it is read twenty times.
_LONGEST_MS = 2000.0
_MOST_OF_MEMORY = 1 / 4
# Tokens of the prompt whose logits are compared: as many as kernels take for a prompt.
_COMPARED = 257


@dataclass(frozen=True)
class Kind:
    """A Llama and what becomes of its heads."""

    dim: int
    heads: int
    kv_heads: int
    shared: int
    active: int
    route_groups: bool = False

    def __str__(self) -> str:
        kv = "" if self.kv_heads == self.heads else f", {self.kv_heads} kv"
        return f"Llama d={self.dim}, {self.heads} heads{kv}, {_LAYERS} layers"


PLAIN = Kind(768, 12, 12, shared=2, active=6)
GROUPED = Kind(1024, 16, 4, shared=4, active=8)
THREE_QUARTERS = Kind(1024, 16, 4, shared=4, active=12)
WHOLE_GROUPS = Kind(1024, 16, 4, shared=4, active=8, route_groups=True)


@dataclass(frozen=True)
class Reading:
    """What is read: a prompt of so many tokens, or the next token on a cache of that many."""

    what: What
    kind: Kind
    dtype: torch.dtype
    length: int
    batch: int = 1
    quantised: Backend | None = None

    @property
    def case(self) -> str:
        """For people."""
        cache = f", {self.quantised} cache" if self.quantised else ""
        return f"{self.what}{cache}{', whole key groups' if self.kind.route_groups else ''}"

    def __str__(self) -> str:
        letter = "T" if self.what == "prompt" else "S"
        return f"B={self.batch}, {letter}={self.length}, {self.kind}"

    def work(self, share: float = 1.0, groups: float | None = None, *, bits: int = 0) -> Work:
        """What must be computed and read, with a share of the heads on.

        Heads that are off leave out attention and their part of the output projection. Queries of
        all heads are computed: the router compares them.

        Args:
            share: Of the heads.
            groups: Key heads that a token reads in a layer, on average; all by default.
            bits: Of a value in the cache; by default as wide as the weights.
        """
        kind = self.kind
        channels, size = kind.dim // kind.heads, self.dtype.itemsize
        inputs = kind.dim * (kind.heads + 2 * kind.kv_heads) * channels
        mlp, logits = 3 * kind.dim * _hidden(kind), kind.dim * _VOCABULARY
        prompt = self.what == "prompt"
        tokens = self.batch * (self.length if prompt else 1)
        keys = (self.length + 1) / 2 if prompt else self.length + 1
        products = inputs + share * kind.dim**2 + mlp
        pairs = 2 * share * kind.dim * keys
        flops = 2 * tokens * _LAYERS * (products + pairs) + 2 * self.batch * logits
        read: float = size * (_LAYERS * (inputs + kind.dim**2 + mlp) + logits)
        if not prompt:
            groups = kind.kv_heads if groups is None else groups
            values = 2 * _LAYERS * self.batch * self.length * groups * channels
            read += values * (bits / 8 if bits else size)
        return Work(flops, read)


def comparisons(effort: Effort) -> Iterator[Builder]:
    """Reading prompts and steps of generation, of batches and lengths that fit."""
    machine = measure_machine(effort.device, DTYPES, toy=effort.toy)
    for dtype in DTYPES:
        for reading in _readings(effort, dtype):
            yield partial(compare, effort, machine, reading)


def _readings(effort: Effort, dtype: torch.dtype) -> Iterator[Reading]:
    """A few lengths of every kind; all batches and lengths of one, and tokens by whole groups."""
    prompt, token = (partial(Reading, what) for what in ("prompt", "next token"))
    if effort.toy or effort.quick:
        length, context = (67, 67) if effort.toy else (1024, 4096)
        for kind in (PLAIN, GROUPED, WHOLE_GROUPS):
            yield prompt(kind, dtype, length)
            yield token(kind, dtype, context)
        yield token(GROUPED, dtype, length, batch=3 if effort.toy else 8)
    else:
        yield prompt(PLAIN, dtype, 4096)
        yield token(PLAIN, dtype, 4096)
        for batch, length in product(_BATCHES, _LENGTHS):
            yield prompt(GROUPED, dtype, length, batch)
        for kind in (GROUPED, WHOLE_GROUPS):
            for batch, length in product(_BATCHES, _LENGTHS):
                yield token(kind, dtype, length, batch)
        for kind in (THREE_QUARTERS, WHOLE_GROUPS):
            yield prompt(kind, dtype, 2048)
        yield from (token(THREE_QUARTERS, dtype, length) for length in (4096, 16384))
    if not effort.quick:
        for backend in _BITS:
            length = 67 if effort.toy else 16384
            yield token(WHOLE_GROUPS, dtype, length, quantised=backend)


def compare(effort: Effort, machine: Machine, reading: Reading) -> Comparison:
    """Both models read the same cache; what a token adds to it is taken off again."""
    kind, dtype = reading.kind, reading.dtype
    _check_fits(machine, reading)
    dense, ours = _models(effort, reading)
    length = reading.length if reading.what == "prompt" else 1
    size = (INPUTS, reading.batch, length)
    inputs = torch.randint(_VOCABULARY, size, device=effort.device)
    turn = cycle(inputs)
    compared = torch.randint(_VOCABULARY, (1, 67 if effort.toy else _COMPARED))
    read = _reader(reading, dense)
    share = kind.active / kind.heads
    bits = _BITS[reading.quantised] if reading.quantised else 0
    groups = None
    if reading.what == "next token":
        groups = fmean(_key_heads_read(read, ours, token, kind.kv_heads) for token in inputs)
    limit = machine.limit(reading.work(share, groups, bits=bits), dtype)

    def rival(read: Callable[[Any, Tensor], Any], bits: int) -> Rival:
        theirs = machine.limit(reading.work(bits=bits), dtype)
        return Rival(lambda: read(dense, next(turn)), limit / theirs, limit=theirs)

    rivals = {"dense model": rival(read, bits)}
    if reading.quantised:
        plain = Reading(reading.what, kind, dtype, reading.length, reading.batch)
        rivals["dense model, plain cache"] = rival(_reader(plain, dense), 0)
    return Comparison(
        reading.case,
        str(reading),
        dtype,
        share,
        lambda: read(ours, next(turn)),
        rivals,
        lambda: logits_thrice(ours, compared.to(effort.device)),
        launches=True,
        limit=limit,
    )


def _check_fits(machine: Machine, reading: Reading) -> None:
    """Refuse what this machine has no time or memory for."""
    what = f"{reading.case}, {reading}, {str(reading.dtype).removeprefix('torch.')}"
    least = machine.limit(reading.work(), reading.dtype)
    if reading.what == "prompt" and least > _LONGEST_MS:
        raise LeftOutError(f"{what}: it would take {least / 1e3:.0f} s at the machine's peak")
    kind = reading.kind
    # Made in float32.
    width = kind.kv_heads * kind.dim // kind.heads
    cache = 4 * 2 * _LAYERS * reading.batch * reading.length * width
    if reading.what == "next token" and cache > _MOST_OF_MEMORY * machine.memory:
        raise LeftOutError(f"{what}: its cache takes {cache / 2**30:.0f} GiB to make")


def _reader(reading: Reading, dense: Any) -> Callable[[Any, Tensor], Any]:
    """What reads ids [B, T] with a model."""
    if reading.what == "prompt":
        return read_prompt
    cache = filled_cache(dense, reading.length, reading.batch)
    if reading.quantised is None:
        return lambda model, token: read_token(model, token, cache)
    try:
        quantised = QuantizedCache(reading.quantised, dense.config)
    except (ImportError, ValueError) as error:
        # Its package is missing, or transformers is too old to know it.
        raise LeftOutError(f"{reading.case}: {error}") from error
    for index, layer in enumerate(cache.layers):
        quantised.update(layer.keys, layer.values, index)
    return lambda model, token: _read_quantised(model, token, quantised)


@torch.no_grad()
def _read_quantised(model: Any, token: Tensor, cache: QuantizedCache) -> None:
    """One token more, in a copy of the cache: it grows by new tensors and cannot be cropped."""
    grown = copy(cache)
    grown.layers = [copy(layer) for layer in cache.layers]
    model(token, None, None, grown, use_cache=True)


def _key_heads_read(
    read: Callable[[Any, Tensor], Any], model: Any, token: Tensor, kv_heads: int
) -> float:
    """Key heads that a token reads in a layer, on average, by the routing that it really gets."""
    with record_routing(model) as routings:
        read(model, token)
    return _key_heads_on([routing.weights for routing in routings.values()], kv_heads)


def _key_heads_on(gates: list[Tensor], kv_heads: int) -> float:
    """Key heads that some head of a token [B, T, H] reads, on average."""
    read = [(gate != 0).unflatten(-1, (kv_heads, -1)).any(-1) for gate in gates]
    return float(torch.stack(read).sum(-1).double().mean())


def _hidden(kind: Kind) -> int:
    return 8 * kind.dim // 3


def _models(effort: Effort, reading: Reading) -> tuple[Any, Any]:
    kind = reading.kind
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=kind.dim, num_attention_heads=kind.heads,
        num_key_value_heads=kind.kv_heads, num_hidden_layers=_LAYERS,
        intermediate_size=_hidden(kind), max_position_embeddings=reading.length + 8,
    )  # fmt: skip
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(LlamaForCausalLM(config).to(effort.device, reading.dtype).eval())
    routed = headwise.MoHConfig(
        shared=kind.shared, active=kind.active, router="query_norm", route_groups=kind.route_groups
    )
    return models[0], headwise.convert(models[1], attention=routed)
