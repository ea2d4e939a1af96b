"""Prompts and new tokens of Llamas of known sizes, eight layers each: dense, and some heads off.

Heads are routed by the norms of their queries. Weights change no time: random ones do. Python
launches kernel by kernel, as `generate` does.
"""

import csv
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import headwise
from headwise.bench.comparison import environment
from headwise.training.speed import read_token
from headwise.training.timing import interleaved

LAYERS, SEQUENCES = 8, 8
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
    """Milliseconds of whole forwards, in turns; rows of results/gpu.csv as they come."""
    with path.open("w", newline="") as file:
        for size in SIZES:
            routed = headwise.MoHConfig(shared=size.shared, active=size.active, router="query_norm")
            models = {"ours": headwise.convert(model(size), attention=routed), "dense": model(size)}
            for case, shape, calls in cases(size, models):
                times = interleaved(calls, rounds=7, seconds=0, warmups=3, device=DEVICE)
                row = {
                    "benchmark": "model", "case": case,
                    "shape": f"{shape}, {size.name} with {LAYERS} layers",
                    "dtype": "bfloat16", "share": f"{size.active / size.heads:.4g}",
                    "rival": "dense model",
                    "ours_ms": f"{times['ours']:.4g}", "rival_ms": f"{times['dense']:.4g}",
                    "ratio": f"{times['ours'] / times['dense']:.4g}",
                    "ideal": "", "share_of_ideal": "", "target": "", "error_ratio": "",
                    "correct": "", **environment(DEVICE),
                }  # fmt: skip
                writer = csv.DictWriter(file, list(row))
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
                file.flush()
                print(*list(row.values())[1:9], flush=True)
            del models, calls
            torch.cuda.empty_cache()


def cases(size: Size, models: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Names, shapes and calls."""
    for context in size.contexts:
        ids = torch.randint(49152, (1, context), device=DEVICE)
        calls = {name: partial(prompt, each, ids) for name, each in models.items()}
        yield "prompt", f"B=1, T={context}", calls
    ids = torch.randint(49152, (SEQUENCES, size.contexts[0]), device=DEVICE)
    calls = {name: token(each, ids) for name, each in models.items()}
    yield "next token", f"B={SEQUENCES}, S={size.contexts[0]}", calls


@torch.no_grad()
def prompt(model: Any, ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """The last token's logits; the cache is filled as generation fills it."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    return model(ids, None, None, cache, use_cache=True, logits_to_keep=1).logits


def token(model: Any, ids: Tensor) -> Callable[[], Any]:
    """The token after `ids`."""
    cache = DynamicCache(config=model.config)
    for part in ids.split(2048, dim=1):
        prompt(model, part, cache)
    return partial(read_token, model, ids[:, :1], cache)


def model(size: Size) -> Any:
    """A Llama of this size with fewer layers, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=size.dim, intermediate_size=size.mlp_dim,
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
