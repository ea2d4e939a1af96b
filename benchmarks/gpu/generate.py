"""Text from a Llama of SmolLM2-135M's sizes at 8,192 tokens of context: dense, and 6 of 9 heads on.

Heads are routed by the norms of their queries. Weights change no time: random ones do.
"""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headwise
from headwise.bench.comparison import environment
from headwise.training.timing import interleaved

CONTEXT, NEW_TOKENS = 8192, 32
BATCHES = (1, 8)


def main(path: Path) -> None:
    """Milliseconds of the prompt and of a new token, whole calls of `generate` as a user makes."""
    device = torch.device("cuda")
    dense = model()
    ours = headwise.convert(model(), attention=headwise.MoHConfig(
        shared=2, active=6, router="query_norm"
    ))  # fmt: skip
    rows = []
    for batch in BATCHES:
        ids = torch.randint(49152, (batch, CONTEXT), device=device)
        for case, tokens in (("prompt", 1), (f"prompt and {NEW_TOKENS} tokens", NEW_TOKENS)):
            runs = {"ours": generating(ours, ids, tokens), "dense": generating(dense, ids, tokens)}
            times = interleaved(runs, rounds=5, seconds=0, warmups=1, device=device)
            row = {
                "case": case, "batch": batch, "context": CONTEXT,
                "ours_ms": round(times["ours"], 1), "dense_ms": round(times["dense"], 1),
                "ratio": round(times["ours"] / times["dense"], 3), **environment(device),
            }  # fmt: skip
            rows.append(row)
            print(*row.values(), flush=True)
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
                writer.writerows(rows)


def model() -> Any:
    """The sizes of SmolLM2-135M, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2 * CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


def generating(model: Any, ids: torch.Tensor, tokens: int) -> Callable[[], Any]:
    """So many tokens after the prompt, greedily."""
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def run() -> Any:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return run


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("not measured: no CUDA device")
    main(Path(sys.argv[1]))
