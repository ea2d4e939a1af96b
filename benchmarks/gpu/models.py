"""Prompts and new tokens of Llamas of known sizes, eight layers each: dense, and some heads off.

Heads are routed by the norms of their queries. Weights change no time: random ones do. Python
launches kernel by kernel, as `generate` does; rows called "compiled" read a static cache by CUDA
graphs, as `generate` does with cache_implementation="static".
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import headwise
from headwise.bench.comparison import Comparison, Effort, Rival, measure, runnable
from headwise.bench.tensors import INPUTS
from headwise.results.rows import Row, write_csv
from headwise.training.speed import filled_cache, logits_thrice, read_token

LAYERS, SEQUENCES, VOCABULARY = 8, 8, 49152
SPARE = 1024  # slots of a static cache for what is read while timing
DEVICE = torch.device("cuda")


class Size(NamedTuple):
    """A Llama, and how many of its heads are on."""

    name: str
    dim: int
    mlp_dim: int
    heads: int
    kv_heads: int
    shared: int
    active: int
    contexts: tuple[int, ...]


SIZES = (
    Size("SmolLM2-135M", 576, 1536, 9, 3, 2, 6, (8192,)),
    Size("Llama-3.2-1B", 2048, 8192, 32, 8, 8, 16, (8192, 32768)),
    Size("Llama-3-8B", 4096, 14336, 32, 8, 8, 16, (8192, 32768)),
)


def main(path: Path) -> None:
    """Whole forwards, in turns; rows of results/gpu.csv as they come."""
    effort = Effort(DEVICE, rounds=7, seconds=0, warmups=3, quick=False)
    rows: list[Row] = []
    for size in SIZES:
        routed = headwise.MoHConfig(shared=size.shared, active=size.active, router="query_norm")
        ours, dense = headwise.convert(model(size), attention=routed), model(size)
        for comparison in comparisons(size, ours, dense):
            rows += ({"benchmark": "model", **row} for row in measure(comparison, effort))
            write_csv(path, rows)
            print(*list(rows[-1].values())[1:9], flush=True)
        del ours, dense, comparison
        torch.cuda.empty_cache()


def comparisons(size: Size, ours: Any, dense: Any) -> Iterator[Comparison]:
    """Prompts at each context, and a token more of one or several sequences."""
    rivals = {"dense model": dense}
    for context in size.contexts:
        turn = cycle(torch.randint(VOCABULARY, (INPUTS, 1, context), device=DEVICE))
        yield compared(size, "prompt", f"B=1, T={context}", ours, rivals, prompt_of(turn))
    length = size.contexts[0]
    for sequences in (1, SEQUENCES):
        shape = f"B={sequences}, S={length}"
        read = token_by_python(filled_cache(dense, length, sequences), sequences)
        yield compared(size, "next token", shape, ours, rivals, read)
        read = token_by_graph(length, sequences)
        several = rivals | {"dense model, FlexAttention": flexible(size)}
        yield compared(size, "next token, compiled", shape, ours, several, read)
        torch.compiler.reset()


def compared(
    size: Size, case: str, shape: str, ours: Any, rivals: dict[str, Any], read: Callable[[Any], Any]
) -> Comparison:
    """The gate looks at logits of both models' kernels on a short prompt."""
    ids = torch.randint(VOCABULARY, (1, 257), device=DEVICE)
    runs, left_out = runnable({name: Rival(partial(read, m)) for name, m in rivals.items()})
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}", flush=True)
    return Comparison(
        case,
        f"{shape}, {size.name} with {LAYERS} layers",
        torch.bfloat16,
        round(size.active / size.heads, 4),
        partial(read, ours),
        runs,
        partial(logits_thrice, ours, ids),
        launches=True,
    )


def new_tokens(sequences: int) -> Tensor:
    return torch.randint(VOCABULARY, (sequences, 1), device=DEVICE)


def token_by_python(cache: DynamicCache, sequences: int) -> Callable[[Any], Any]:
    """Reads a token more, launching kernel by kernel."""
    ids = new_tokens(sequences)
    return lambda model: read_token(model, ids, cache)


def flexible(size: Size) -> Any:
    """A dense model whose attention reads each head of keys once; SDPA repeats them for a mask."""
    dense = model(size)
    dense.set_attn_implementation("flex_attention")
    return dense


def token_by_graph(length: int, sequences: int) -> Callable[[Any], Any]:
    """Reads a token more by CUDA graphs; raises where these give something else than Python."""
    ids = new_tokens(sequences)
    steps: dict[Any, Callable[[], Tensor]] = {}

    @torch.no_grad()
    def read(model: Any) -> Tensor:
        if model not in steps:
            cache = filled_static_cache(model, length, sequences)
            compiled = torch.compile(model, mode="reduce-overhead")
            step = steps[model] = lambda: compiled(ids, None, None, cache, use_cache=True).logits
            expected = model(ids, None, None, cache, use_cache=True).logits
            step()  # which captures
            set_length(cache, length)
            assert_close(step(), expected, rtol=0, atol=0.25 * float(expected.std()))
        return steps[model]()

    return read


def filled_static_cache(model: Any, length: int, sequences: int) -> StaticCache:
    """A static cache of random keys and values, full but for SPARE slots."""
    cache = StaticCache(config=model.config, max_cache_len=length + SPARE)
    with torch.no_grad():
        model(new_tokens(sequences), None, None, cache, use_cache=True)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    set_length(cache, length)
    return cache


def set_length(cache: StaticCache, length: int) -> None:
    """The next token goes behind so many."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def prompt_of(turn: Iterator[Tensor]) -> Callable[[Any], Tensor]:
    """Reads a prompt for its last logits, and fills a cache as generation does."""

    @torch.no_grad()
    def read(model: Any) -> Tensor:
        cache = DynamicCache(config=model.config)
        return model(next(turn), None, None, cache, use_cache=True, logits_to_keep=1).logits

    return read


def model(size: Size) -> Any:
    """A Llama of this size with fewer layers, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=size.dim, intermediate_size=size.mlp_dim,
        num_hidden_layers=LAYERS, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, max_position_embeddings=2 * max(size.contexts),
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )  # fmt: skip
    with DEVICE:
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("not measured: no CUDA device")
    main(Path(sys.argv[1]))
