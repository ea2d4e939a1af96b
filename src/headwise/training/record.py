"""What a run leaves behind: a row and a record of each model, the table, the page."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from headwise.analysis.experts import expert_use
from headwise.analysis.heads import head_use
from headwise.analysis.plain_data import from_plain
from headwise.analysis.records import Curve, ModelRecord, RunRecord, to_json
from headwise.analysis.tables import speed_table, verdict
from headwise.errors import reading
from headwise.parity import count_parameters, measure_flops, router_share
from headwise.progress import plain_console
from headwise.results.files import as_object, write_manifest, write_whole
from headwise.results.rows import Row, environment, write_csv
from headwise.results.table import Table
from headwise.training import table
from headwise.training.comparison import ComparisonRun, Scores, Task, Training
from headwise.training.directory import RunDirectory
from headwise.training.measures import demerit, early, measures
from headwise.training.speed import Timed
from headwise.training.trainer import SafeTrainer

_RESULT_FILE = "result.json"


class Trained(NamedTuple):
    """One model: its row of the table and what the report shows of it."""

    row: Row
    record: ModelRecord


def measure(run: ComparisonRun, task: Task, trainer: SafeTrainer, training: Training) -> Trained:
    """Everything that the table and the report say of a model that has just been trained."""
    model, (variant, seed, rate) = trainer.model, training
    model.eval()
    scores = task.score(model)
    history = trainer.state.log_history
    row = {
        "recipe": run.recipe,
        "model": variant.name,
        "label": variant.label,
        "position": variant.position,
        "series": variant.series,
        "seed": seed,
        "learning_rate": run.learning_rate if rate is None else rate,
        **_cost(task, model),
        "active_heads": round(run.share_of_heads(variant) * _share_on(scores), 4),
        **{name: round(value, 3) for name, value in scores.columns.items()},
        **_early(run, history, scores.columns),
        "validation_loss": round(trainer.evaluate(metric_key_prefix="last")["last_loss"], 4),
        "unit": task.unit,
        "per_second": trainer.speed.rounded(),
        "workers": run.workers,
        "steps": run.steps,
        "seen": run.steps * run.batch_size * task.length,
        **environment(run.precision),
    }
    record = ModelRecord(
        name=variant.name,
        label=variant.label,
        seed=seed,
        training=_curve(history, "loss"),
        validation=_curve(history, "eval_loss"),
        heads=scores.heads,
        experts=scores.experts,
        texts=scores.texts,
        images=list(scores.images),
        samples=scores.samples,
    )
    return Trained(row, record)


def _share_on(scores: Scores) -> float:
    """Of the heads that the model has."""
    return 1.0 if scores.heads is None else scores.heads.share_on()


def _cost(task: Task, model: Any) -> dict[str, Any]:
    total, active = count_parameters(model)
    with torch.no_grad():
        counted = measure_flops(lambda: model(**task.example(model))) / task.length
    flops = task.flops_by_module(model)
    return {
        "parameters": total,
        "active_parameters": active,
        "flops": round(sum(flops.values())),
        "flops_counted": round(counted),
        "router_flops": round(router_share(model, flops), 6),
        "mlp_dim": getattr(model.config, "intermediate_size", None),
    }


def _early(
    run: ComparisonRun, history: list[dict[str, float]], columns: dict[str, float]
) -> dict[str, float]:
    """What the model was worth on its way, where it was scored there."""
    if run.early_steps is None:
        return {}
    keys = [early(measure.key) for measure in measures(columns)]
    (logged,) = (entry for entry in history if keys[0] in entry)
    return {"early_steps": run.early_steps, **{key: round(logged[key], 3) for key in keys}}


def _curve(history: list[dict[str, float]], key: str) -> Curve:
    points = [(int(x["step"]), x[key]) for x in history if key in x]
    return Curve([step for step, _ in points], [loss for _, loss in points])


def write_result(directory: Path, trained: Trained) -> None:
    """Beside the weights of a finished model, with the sums of all its files."""
    result = {"row": trained.row, "record": dataclasses.asdict(trained.record)}
    (directory / _RESULT_FILE).write_text(json.dumps(result))
    write_manifest(directory)


def read_result(directory: Path) -> Trained | None:
    """What `write_result` wrote; None where the model is not finished."""
    if not directory.exists():
        return None
    file = directory / _RESULT_FILE
    with reading(file, hint=f"delete {directory} to train that model again"):
        saved = json.loads(file.read_text())
        return Trained(as_object(saved["row"]), from_plain(ModelRecord, saved["record"]))


def report(
    run: ComparisonRun,
    task: Task,
    directory: RunDirectory,
    models: dict[str, Trained],
    tried: list[Trained],
) -> None:
    """Print the table and the speed; write results.csv, search.csv, heads.csv, experts.csv,
    figure.png, pictures, record.json, report.html.

    Args:
        run, task, directory: What was trained, on what, and where it lies.
        models: What is compared, by the names of the saved models.
        tried: All that was trained to find learning rates.
    """
    # matplotlib is for those who draw: `import headwise` does without.
    from headwise.analysis.report import write_report
    from headwise.training.figure import draw_comparison, draw_pictures

    trained = [*models.values()]
    rows = [result.row for result in trained]
    write_csv(directory.root / "results.csv", rows)
    for name, some in (
        ("search", [result.row for result in tried]),
        ("heads", _head_rows(trained)),
        ("experts", _expert_rows(trained)),
    ):
        if some:
            write_csv(directory.root / f"{name}.csv", some)
    draw_comparison(rows, directory.root / "figure.png", axis=run.axis)
    compared = table.comparison(rows)
    saved = min(models, key=lambda name: demerit(models[name].row))
    best, sample = models[saved].record, task.sample(directory.model(saved))
    console = plain_console()
    console.print(table.for_terminal(rows, run.title))
    of_first = {x.record.name: n for n, x in models.items() if x.record.seed == run.seeds[0]}
    timed = task.speed({variant: directory.model(name) for variant, name in of_first.items()})
    record = RunRecord(
        title=f"headwise: {run.title}",
        facts={**task.facts(), **_facts(run, rows[0])},
        table_columns=[*compared.columns],
        table_rows=[[*row] for row in compared.rows],
        notes=_notes(run, compared),
        loss_unit=task.loss_unit,
        models=[result.record for result in trained],
        sample_model=f"{best.label}, seed {best.seed}" if sample else "",
        sample_prompt=sample.prompt if sample else "",
        sample_text=sample.text if sample else "",
        speeds=timed.speeds if timed else [],
        speed_note=timed.note if timed else "",
    )
    write_whole(directory.root / "record.json", lambda path: path.write_text(to_json(record)))
    page = write_report(record, directory.root / "report.html")
    pictures = draw_pictures(record, directory.root / "pictures")
    if timed:
        _print_speed(timed, console)
    if sample:
        console.print(f"\n{record.sample_model} continues {sample.prompt!r}:\n", style="bold")
        console.print(sample.text)
    written = {"Table": "results.csv", "Figure": "figure.png", "Page": page.name}
    if pictures:
        written["Pictures"] = "pictures"
    console.print(
        "", *(f"{what}:\t{directory.root / name}" for what, name in written.items()), sep="\n"
    )


def _print_speed(timed: Timed, console: Console) -> None:
    if timed.speeds:
        shown = speed_table(timed.speeds)
        console.print("", shown.for_terminal("Speed at long contexts", padding=0))
        console.print(verdict(timed.speeds))
    console.print(timed.note)


def _expert_rows(trained: list[Trained]) -> list[Row]:
    """For each model, layer with experts and domain what `ExpertUse` holds."""
    rows = []
    for _, record in trained:
        for use in expert_use(record.experts) if record.experts else []:
            rows.append(_rounded(record, use._asdict()))
    return rows


def _head_rows(trained: list[Trained]) -> list[Row]:
    """For each model, layer and head what `HeadUse` holds, its loads as load_DOMAIN."""
    rows = []
    for _, record in trained:
        for use in head_use(record.heads) if record.heads else []:
            values = use._asdict()
            loads = {f"load_{domain}": load for domain, load in values.pop("loads").items()}
            rows.append(_rounded(record, values | loads))
    return rows


def _rounded(record: ModelRecord, values: Row) -> Row:
    """A row of a model, with six digits behind the point."""
    rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
    return {"model": record.name, "seed": record.seed, **rounded}


_EQUAL = (
    "All models cost the same FLOPs, computed: the dense MLPs take up what routers cost "
    "and what heads that are off save."
)
_UNEQUAL = "Models differ in what they cost: all have MLPs of one width, whatever is off."
_COUNTED = (
    "Where more FLOPs were counted than computed, heads that are off were computed and masked."
)
_SMALL = "Models this small, trained this briefly, say little about large ones."


def _notes(run: ComparisonRun, compared: Table) -> list[str]:
    cost = _UNEQUAL if run.cost_of() is None else _EQUAL
    return [compared.legend, cost, _COUNTED, _SMALL]


def _facts(run: ComparisonRun, row: Row) -> dict[str, str]:
    seen = f"{int(row['seen']):,} {row['unit']}s a model"
    expected = {"Expected before": run.expected} if run.expected else {}
    return {
        **expected,
        "Training": f"{run.steps} steps of {run.batch_size} examples, {seen}",
        "Seeds": ", ".join(map(str, run.seeds)),
        "Device": f"{row['device']}, {row['threads']} threads, {run.precision}",
        "Versions": ", ".join(
            f"{name} {row[name]}" for name in ("headwise", "torch", "transformers", "python")
        ),
    }
