"""Write results/gated.csv: what it costs a model that gates its heads to skip those it gates most.

A small Llama whose attention multiplies each head by a learned gate (transformers' Lfm3 without its
convolutions), and the same without gates, trained on the embedded text. Each at its own best
learning rate, a power of two apart, chosen on one half of the held-out files; everything else is
measured on the other. Matrices that write into the residual stream start at deviation /
√(2 · layers). An hour and a half on 2 cores; what is trained already is kept.

usage: results/gated.py [DIRECTORY], where the models go
"""

import copy
import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Lfm3Config, Lfm3ForCausalLM

import headwise
from headwise.commands.calibration import twin
from headwise.loading import load_causal_lm
from headwise.recipes import text
from headwise.recipes.text import TextRun, TextTask
from headwise.results.rows import Row, environment, write_csv
from headwise.training.comparison import Variant
from headwise.training.directory import RunDirectory
from headwise.training.evaluation import file_losses, perplexity
from headwise.training.train import train

OUTPUT = Path(__file__).parent / "gated.csv"
HEADS, SHARES = 8, (0.75, 0.5, 0.25)
SEEDS = (0, 1, 2)
FIRST_RATE = 6e-3
STEPS = (300, 900)
TO_FIT = 16_384  # tokens


@dataclass(frozen=True, kw_only=True)
class GatedRun(TextRun):
    """Two models of equal layers, with and without a gate for each head."""

    recipe = "gated"
    title = "A gate for each head"
    num_heads: int = HEADS

    def variants(self) -> list[Variant]:
        return [Variant(name="gated", label="gated"), Variant(name="plain", label="without gates")]


class GatedTask(TextTask):
    """The embedded text, for models that gate their heads."""

    def model(self, variant: Variant, seed: int) -> Any:
        run = self.run
        torch.manual_seed(seed)
        config = Lfm3Config(
            vocab_size=len(self.tokenizer), hidden_size=run.dim, intermediate_size=run.mlp_dim,
            num_hidden_layers=run.num_layers, num_attention_heads=run.num_heads,
            num_key_value_heads=run.num_heads // 2, head_dim=run.dim // run.num_heads,
            layer_types=["full_attention"] * run.num_layers, use_sandwich_norm=False,
            use_attention_gate=variant.name == "gated", initializer_range=run.initial_deviation,
            max_position_embeddings=run.sequence_length, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=None,
        )  # fmt: skip
        model = Lfm3ForCausalLM(config)
        with torch.no_grad():
            for layer in model.model.layers:
                for projection in (layer.self_attn.o_proj, layer.feed_forward.w2):
                    projection.weight /= (2 * run.num_layers) ** 0.5
        return model


def main(output: str = "runs/gated") -> None:
    """Train what is missing, and measure everything."""
    torch.set_num_threads(2)
    rows: list[Row] = []
    for steps in STEPS:
        base = GatedRun(output=Path(output), steps=steps, warmup_steps=50, workers=2)
        task = _read(base)
        for variant in base.variants():
            rate = _best_rate(base, task, variant)
            for seed in SEEDS:
                model = load_causal_lm(_trained(base, variant, rate, seed)).eval()
                conditions = {"steps": steps, "model": variant.name, "learning_rate": rate}
                for row in _measured(model, task):
                    rows.append({**conditions, "seed": seed, **row, **environment("fp32")})
                write_csv(OUTPUT, rows)


def _read(run: TextRun) -> GatedTask:
    return GatedTask(**vars(text.read(run)))


def _trained(base: GatedRun, variant: Variant, rate: float, seed: int) -> Path:
    """The directory of a model, trained if it is not yet; both kinds are, side by side."""
    output = base.output / f"{base.steps}-steps-{rate:g}-seed{seed}"
    directory = RunDirectory(output).model(variant.name, seed)
    if not directory.exists():
        resume = output.exists()
        train(replace(base, output=output, learning_rate=rate, seeds=(seed,), resume=resume), _read)
    return directory


def _best_rate(base: GatedRun, task: TextTask, variant: Variant) -> float:
    """By the perplexities of code and prose, multiplied, of the first seed; from rate to rate."""

    @functools.cache
    def score(rate: float) -> float:
        model = load_causal_lm(_trained(base, variant, rate, SEEDS[0]))
        return math.prod(p for p, _ in _perplexities(model, task, chosen_by=True).values())

    best = FIRST_RATE
    while (better := min((best / 2, best, best * 2), key=score)) != best:
        best = better
    return best


def _perplexities(
    model: Any, task: TextTask, *, chosen_by: bool = False
) -> dict[str, tuple[float, int]]:
    """Perplexity and tokens of each kind of text: of the test half, or of the validation half."""
    found = {}
    for kind, files in (task.validation if chosen_by else task.test).items():
        losses = file_losses(model, files, sequence_length=task.length, max_blocks=4)
        found[kind] = perplexity(losses).value, sum(loss.tokens for loss in losses)
    return found


def _measured(model: Any, task: TextTask) -> Iterator[Row]:
    """The model as it is, then with fewer heads by each router, a row for each kind of text."""
    pieces = [
        torch.from_numpy(stream[start : start + task.length].astype("int64"))[None]
        for stream in task.training.values()
        for start in range(0, TO_FIT // len(task.training), task.length)
    ]
    batches = [{"input_ids": piece, "labels": piece} for piece in pieces]
    for router, active, converted in _conversions(model, batches):
        gates = _gates(model, batches) if router == "none" else {}
        for kind, (value, tokens) in _perplexities(converted, task).items():
            found = {"router": router, "active": active, "text": kind, "tokens": tokens}
            yield {**found, "perplexity": round(value, 4), **gates}


def _conversions(model: Any, batches: list[Any]) -> Iterator[tuple[str, int, Any]]:
    yield "none", HEADS, model
    gated = model.config.use_attention_gate
    for active in (round(HEADS * share) for share in SHARES):
        calibrated = headwise.calibrate(
            model, batches, headwise.MoHConfig(shared=active // 2, active=active)
        )
        attentions = {
            "query_norm": calibrated,
            "fitted, alike": headwise.fit(
                model, batches, headwise.MoHConfig(router="fitted", active=active), allocate="alike"
            ),
            "fitted": headwise.fit(
                model, batches, headwise.MoHConfig(router="fitted", active=active)
            ),
        }
        if gated:
            attentions["output_gate"] = headwise.MoHConfig(router="output_gate", active=active)
        yield "same heads always", active, _pruned(model, batches, active)
        for router, attention in attentions.items():
            yield router, active, headwise.convert(twin(model), attention=attention)


def _pruned(model: Any, batches: list[Any], active: int) -> Any:
    """The heads that the loss's gradient chooses, for every token: nothing is routed."""
    config = headwise.MoHConfig(shared=active, active=active + 1)
    kept = headwise.calibrate(model, batches, config).shared
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for layer, heads in zip(pruned.model.layers, kept, strict=True):
            by_head = layer.self_attn.o_proj.weight.unflatten(1, (HEADS, -1))
            by_head[:, [head for head in range(HEADS) if head not in heads]] = 0
    return pruned


@torch.no_grad()
def _gates(model: Any, batches: list[Any]) -> Row:
    """Mean of the gates, and how many are below a tenth; of a model that has none, nothing."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.g_proj.register_forward_hook(lambda *call: found.append(call[-1].sigmoid()))
        for layer in model.model.layers
        if layer.self_attn.g_proj is not None
    ]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    if not found:
        return {}
    gates = torch.cat([gate.flatten() for gate in found])
    mean, below = gates.mean().item(), (gates < 0.1).float().mean().item()
    return {"mean_gate": round(mean, 4), "gates_below_0.1": round(below, 4)}


if __name__ == "__main__":
    main(*sys.argv[1:])
