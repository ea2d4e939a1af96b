"""What a run leaves behind: a row and a record of each model, the table, the page."""

import dataclasses
import json
import platform
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from headwise.analysis.experts import expert_use
from headwise.analysis.records import (
    Curve,
    ModelRecord,
    RunRecord,
    model_from_dict,
    to_json,
)
from headwise.hf.trainer import SafeTrainer
from headwise.parity import count_flops, count_parameters, measure_flops
from headwise.recipes import table
from headwise.recipes.comparison import ComparisonRun, Variant
from headwise.recipes.directory import RunDirectory, write_whole
from headwise.recipes.evaluation import (
    RoutingStatistics,
    Tokens,
    file_losses,
    perplexity,
    routed_text,
)
from headwise.recipes.generation import continue_text
from headwise.recipes.text import Text

_PASSAGE_TOKENS = 160
_RESULT_FILE = "result.json"


class Trained(NamedTuple):
    """One model: its row of the table and what the report shows of it."""

    row: table.Row
    record: ModelRecord


def measure(
    run: ComparisonRun, text: Text, trainer: SafeTrainer, variant: Variant, seed: int
) -> Trained:
    """Everything that the table and the report say of a model that has just been trained."""
    model = trainer.model
    statistics = RoutingStatistics(model)
    row = {
        "recipe": run.recipe,
        "model": variant.name,
        "label": variant.label,
        "position": variant.position,
        "seed": seed,
        **_cost(run, model),
    }
    for domain, files in text.validation.items():
        losses = file_losses(
            model,
            files,
            sequence_length=run.sequence_length,
            max_blocks=run.eval_blocks_per_file,
            observe=partial(statistics.add, domain),
        )
        value, low, high = perplexity(losses)
        row |= {
            f"perplexity_{domain}": round(value, 3),
            f"perplexity_{domain}_q1": round(low, 3),
            f"perplexity_{domain}_q3": round(high, 3),
        }
    row["tokens_per_second"] = round(trainer.speed.tokens_per_second())
    row |= {
        "workers": run.workers,
        "steps": run.steps,
        "tokens": run.steps * run.batch_size * run.sequence_length,
    }
    row |= environment(run.precision)
    heads = statistics.head_loads()
    history = trainer.state.log_history
    record = ModelRecord(
        name=variant.name,
        label=variant.label,
        seed=seed,
        training=_curve(history, "loss"),
        validation=_curve(history, "eval_loss"),
        heads=heads,
        experts=statistics.expert_loads(),
        texts=[
            routed_text(model, text.tokenizer, domain, _passage(files))
            for domain, files in text.validation.items()
            if heads is not None
        ],
    )
    return Trained(row, record)


def _cost(run: ComparisonRun, model: PreTrainedModel) -> dict[str, Any]:
    total, active = count_parameters(model)
    ids = torch.zeros(1, run.sequence_length, dtype=torch.long, device=model.device)
    model.eval()
    with torch.no_grad():
        counted = measure_flops(lambda: model(ids)) / ids.numel()
    flops = sum(count_flops(model, sequence_length=run.sequence_length).values())
    routers = (getattr(module, "budget", None) for module in model.modules())
    shares = [budget.active_share for budget in routers if budget is not None]
    return {
        "parameters": total,
        "active_parameters": active,
        "flops_per_token": round(flops),
        "flops_per_token_counted": round(counted),
        "active_heads": shares[0] if shares else 1.0,
    }


def environment(precision: str) -> dict[str, Any]:
    """Device and versions, for beside the figures."""
    return {
        "device": device_name(cuda=torch.cuda.is_available()),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "headwise")},
    }


def device_name(*, cuda: bool) -> str:
    """The GPU's name, or the processor's."""
    if cuda:
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def _curve(history: list[dict[str, float]], key: str) -> Curve:
    points = [(int(x["step"]), x[key]) for x in history if key in x]
    return Curve([step for step, _ in points], [loss for _, loss in points])


def _passage(files: dict[str, Tokens]) -> Tokens:
    """From the middle of the longest held-out file."""
    longest = max(files.values(), key=len)
    start = max(0, len(longest) // 2 - _PASSAGE_TOKENS // 2)
    return longest[start : start + _PASSAGE_TOKENS]


def write_result(directory: Path, trained: Trained) -> None:
    """Beside the weights of a finished model."""
    result = {"row": trained.row, "record": dataclasses.asdict(trained.record)}
    (directory / _RESULT_FILE).write_text(json.dumps(result))


def read_result(directory: Path) -> Trained | None:
    """What `write_result` wrote; None where the model is not finished."""
    file = directory / _RESULT_FILE
    if not file.exists():
        return None
    saved = json.loads(file.read_text())
    return Trained(saved["row"], model_from_dict(saved["record"]))


def report(run: ComparisonRun, directory: RunDirectory, text: Text, trained: list[Trained]) -> None:
    """Print the table, and write results.csv, experts.csv, figure.png, record.json and
    report.html."""
    # matplotlib is for those who draw: `import headwise` does without.
    from headwise.analysis.report import write_report
    from headwise.recipes.figure import draw_comparison

    rows = [result.row for result in trained]
    table.write_csv(directory.root / "results.csv", rows)
    if of_experts := _expert_rows(trained):
        table.write_csv(directory.root / "experts.csv", of_experts)
    draw_comparison(rows, directory.root / "figure.png")
    columns, cells = table.comparison(rows)
    best = min(trained, key=lambda result: _mean_log_perplexity(result.row))
    sample = _sample(run, directory.model(best.record.name, best.record.seed), text)
    record = RunRecord(
        title=f"headwise: {run.title}",
        facts=_facts(run, text, rows[0]),
        table_columns=columns,
        table_rows=cells,
        notes=_notes(run, rows),
        models=[result.record for result in trained],
        sample_model=f"{best.record.label}, seed {best.record.seed}",
        sample_prompt=run.sample_prompt,
        sample_text=sample,
    )
    write_whole(directory.root / "record.json", lambda path: path.write_text(to_json(record)))
    page = write_report(record, directory.root / "report.html")
    console = Console()
    console.print(table.for_terminal(rows, run.title))
    console.print(f"\n[bold]{record.sample_model}[/bold] continues {run.sample_prompt!r}:\n")
    console.print(sample, markup=False, highlight=False)
    written = {"Table": "results.csv", "Figure": "figure.png", "Page": page.name}
    console.print(
        "", *(f"{what}:\t{directory.root / name}" for what, name in written.items()), sep="\n"
    )


def _expert_rows(trained: list[Trained]) -> list[table.Row]:
    """For each model, layer with experts and domain what `ExpertUse` holds."""
    rows = []
    for _, record in trained:
        for use in expert_use(record.experts) if record.experts else []:
            values = use._asdict().items()
            rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in values}
            rows.append({"model": record.name, "seed": record.seed, **rounded})
    return rows


_EQUAL = (
    "All models cost the same FLOPs per token, computed: the dense MLPs take up what routers cost "
    "and what heads that are off save."
)
_UNEQUAL = "Models differ in what they cost: all have MLPs of one width, whatever is off."
_COUNTED = (
    "Where more FLOPs were counted than computed, heads that are off were computed and masked."
)
_SMALL = "Models this small, trained this briefly, say little about large ones."


def _notes(run: ComparisonRun, rows: list[table.Row]) -> list[str]:
    cost = _UNEQUAL if run.cost_of() is None else _EQUAL
    return [table.legend(rows), cost, _COUNTED, _SMALL]


def _mean_log_perplexity(row: table.Row) -> float:
    values = [row[f"perplexity_{domain}"] for domain in table.domains(row)]
    return float(np.log(values).mean())


def _sample(run: ComparisonRun, directory: Path, text: Text) -> str:
    model = AutoModelForCausalLM.from_pretrained(directory)
    return continue_text(
        model, text.tokenizer, run.sample_prompt, max_new_tokens=160, temperature=0.8, seed=0
    )


def _facts(run: ComparisonRun, text: Text, row: table.Row) -> dict[str, str]:
    shares = {name: len(tokens) for name, tokens in text.training.items()}
    return {
        "Text": run.data or "Python's library (code) and its reference (prose)",
        "Tokens to draw from": ", ".join(f"{name} {n:,}" for name, n in shares.items()),
        "Held-out files": ", ".join(f"{n} {len(f)}" for n, f in text.validation.items()),
        "Training": f"{run.steps} steps of {run.batch_size} × {run.sequence_length} tokens",
        "Seeds": ", ".join(map(str, run.seeds)),
        "Device": f"{row['device']}, {row['threads']} threads, {run.precision}",
        "Versions": ", ".join(
            f"{name} {row[name]}" for name in ("headwise", "torch", "transformers", "python")
        ),
    }
