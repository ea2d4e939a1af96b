"""Write results/fitted-experts.csv: what SmolLM2 loses when a part of each MLP is off, untuned.

Perplexity with experts that are slices of the MLP, and with those that `headwise.fit_experts` makes
of it, at 75 and 50 % of each MLP, on four kinds of text that nothing was fitted to. Two minutes a
conversion on 2 cores.

usage: results/fitted_experts.py MODEL WIKITEXT_VALID WIKITEXT_TEST DRAMA, as results/fitted.py
"""

import sys
import time
from pathlib import Path

import torch
from fitted import KINDS, LENGTH, TO_FIT, of_each_kind, texts
from transformers import AutoModelForCausalLM, AutoTokenizer

import headwise
from headwise.commands.calibration import twin
from headwise.results.rows import Row, write_csv

OUTPUT = Path(__file__).parent / "fitted-experts.csv"
WIDTH = 48  # neurons of an expert; SmolLM2's MLPs have 1,536
SLICES = {"num_experts": 32, "expert_dim": WIDTH, "experts_from": "mlp"}
# A quarter of the neurons is on for every token.
FITTED = SLICES | {"num_experts": 24, "shared_expert_dim": 8 * WIDTH, "router": "fitted"}


def main(path: str, valid: str, test: str, drama: str) -> None:
    """Measure every case."""
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    to_fit, to_measure = texts(tokenizer, *map(Path, (valid, test, drama)))
    each = TO_FIT // LENGTH // len(KINDS)
    batches = [{"input_ids": x, "labels": x} for kind in KINDS for x in to_fit[kind][:each]]
    rows: list[Row] = []
    for share, experts in [(1.0, ""), *((s, e) for s in (0.75, 0.5) for e in ("slices", "fitted"))]:
        start = time.perf_counter()
        on, converted = round(32 * share), model
        if experts == "slices":
            config = headwise.MoEConfig(**SLICES, top_k=on)
            torch.manual_seed(0)
            converted = headwise.convert(twin(model), mlp=config)
        elif experts == "fitted":
            config = headwise.MoEConfig(**FITTED, top_k=on - 8)
            fitted = headwise.fit_experts(model, batches, config)
            converted = headwise.convert(twin(model), mlp=fitted)
        seconds = round(time.perf_counter() - start, 1)
        case = {"share": share, "experts": experts, "seconds": seconds}
        rows += [{**case, **row} for row in of_each_kind(converted, f"{share:.0%}", to_measure)]
        write_csv(OUTPUT, rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
