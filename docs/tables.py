"""Write the tables of README.md and docs/ again, and figures of results/, from results/*.csv.

A table of formulas, and one of tests, come from the code.
"""

import ast
from collections.abc import Sequence
from pathlib import Path

from headwise.analysis.plots import (
    cost_against_size,
    quality_against_share,
    recovery_curves,
    time_against_share,
)
from headwise.bench import scaling_table
from headwise.bench import table as bench
from headwise.commands.eval import table as evaluation
from headwise.parity import Decoder, Sharding
from headwise.recipes import recovery
from headwise.recipes.studies import STUDIES
from headwise.results.rows import NO_ROUTER, Row, measured_on, read_csv, router_label
from headwise.results.table import Cell, Number, Table, mean
from headwise.training import table as training
from headwise.training.figure import draw_comparison

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md", "docs/convert.md", "docs/experiments.md", "docs/sharding.md", "docs/speed.md",
    "docs/vision.md",
)  # fmt: skip
# README.md shows whole models before layers, and these before the attention core alone.
MODELS_FIRST = ("model", "layer", "experts", "vision", "attention")
RIVALS = (
    "dense model", "dense layer", "dense twin", "released MoH", "sparse MoE", "SDPA",
    "FlexAttention",
)  # fmt: skip


def costs(rows: Sequence[Row]) -> Table:
    """README.md's table: what a user has against what headwise puts in its place.

    Parts of our own layers, and options, are in docs/speed.md. Of whole models every line that
    loses is here.
    """
    lost = bench.lost_lines(rows)
    shown = [
        row
        for row in rows
        if row["benchmark"] in MODELS_FIRST
        and row["rival"].startswith(RIVALS)
        and (bench.line_of(row) in lost or is_plain(row))
    ]
    return bench.summary(sorted(shown, key=lambda row: MODELS_FIRST.index(row["benchmark"])))


def is_plain(row: Row) -> bool:
    """Whether a row is of no option; of several texts at once, one length stands for all."""
    batch = row["shape"].partition(",")[0] if row["benchmark"] == "model" else ""
    several = batch.startswith("B=") and batch != "B=1"
    return "whole key groups" not in row["case"] and not (several and "=4096" not in row["shape"])


def fitted(rows: Sequence[Row]) -> Table:
    """A line for each conversion, and by how much perplexity rises on each kind of text."""
    kinds, found = perplexities(rows, "active", "router", "fitted_to", "allocate")
    (dense,) = (by_kind for (_, router, *_), by_kind in found.items() if router == NO_ROUTER)
    budgets = {"loss": "by the loss", "alike": "every layer alike"}
    lines = [
        [
            active, router_label(router), fitted_to, budgets.get(allocate, ""),
            *rises(by_kind, dense),
        ]
        for (active, router, fitted_to, allocate), by_kind in found.items()
    ]  # fmt: skip
    legend = (
        "Perplexity of text that nothing was fitted to (first line), and by how much it rises. "
        "Fitted to 16,384 tokens; by query norm all but two of the heads that are on are shared, "
        "and calibrated."
    )
    where = measured_on(rows, "{device}, {threads} thread(s), {precision}")
    columns = ["heads on, of 9", "router", "fitted to", "budget", *kinds]
    return Table(columns, lines, legend, where)


def fitted_experts(rows: Sequence[Row]) -> Table:
    """A line for each share of the MLPs, and by how much perplexity rises on each kind of text."""
    kinds, found = perplexities(rows, "share", "experts")
    (dense,) = (by_kind for (_, experts), by_kind in found.items() if not experts)
    lines = [
        [f"{100 * float(share):.0f} %", experts or "the MLP as it is", *rises(by_kind, dense)]
        for (share, experts), by_kind in found.items()
    ]
    legend = (
        "Perplexity of text that nothing was fitted to (first line), and by how much it rises, "
        "untuned. Fitted to 4,096 tokens of each kind; experts of 48 neurons, of fitted ones a "
        "quarter is shared."
    )
    where = measured_on(rows, "{device}, {threads} thread(s), {precision}")
    return Table(["of each MLP", "experts", *kinds], lines, legend, where)


def gated(rows: Sequence[Row]) -> Table:
    """A line for each model and router, and by how much perplexity rises with fewer heads."""
    steps = max(int(row["steps"]) for row in rows)
    shown = [row for row in rows if int(row["steps"]) == steps and row["text"] == "code"]
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in shown:
        by_seed = found.setdefault((row["model"], row["router"]), {})
        by_seed.setdefault(int(row["active"]), {})[row["seed"]] = float(row["perplexity"])
    budgets = sorted({int(row["active"]) for row in shown}, reverse=True)
    lines: list[list[Cell]] = []
    for (model, router), by_active in found.items():
        every_head = found[model, NO_ROUTER][budgets[0]]
        fewer = [
            [100 * (perplexity / every_head[seed] - 1) for seed, perplexity in by_seed.items()]
            for by_seed in (by_active.get(active, {}) for active in budgets[1:])
        ]
        name = {"plain": "without gates"}.get(model, model)
        all_on = mean(list(every_head.values()), "{:.1f}") if router == NO_ROUTER else ""
        given = [mean(rise, "+{:.1f} %", "{:.1f}") if rise else "" for rise in fewer]
        lines.append([name, router_label(router), all_on, *given])
    legend = (
        f"Trained for {steps} steps. Perplexity of held-out code, and by how much it rises with so "
        "many heads on. ±: deviation over seeds."
    )
    where = measured_on(rows, "{device}, {threads} thread(s), {precision}; seeds {seeds}")
    columns = ["model", "router", *(f"{active} of {budgets[0]}" for active in budgets)]
    return Table(columns, lines, legend, where)


def perplexities(
    rows: Sequence[Row], *fields: str
) -> tuple[list[str], dict[tuple[str, ...], dict[str, float]]]:
    """The kinds of text, and for each value of these fields the perplexity of each kind."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        by_kind = found.setdefault(tuple(row[field] for field in fields), {})
        by_kind[row["text"]] = float(row["perplexity"])
    return list(dict.fromkeys(row["text"] for row in rows)), found


def rises(by_kind: dict[str, float], dense: dict[str, float]) -> list[Cell]:
    """Kind by kind, by how much perplexity is above the dense model's; its own as it is."""
    if by_kind is dense:
        return [Number(perplexity, "{:.2f}") for perplexity in dense.values()]
    each = [100 * (by_kind[kind] / dense[kind] - 1) for kind in dense]
    return [Number(rise, "+{:.1f} %" if rise >= 0 else "{:.1f} %") for rise in each]


def quality_lines(untuned: Sequence[Row], tuned: Sequence[Row]) -> dict[str, dict[float, list]]:
    """What `quality_against_share` draws: perplexity of WikiText-2 over the original's."""
    (original,) = (
        float(row["perplexity"])
        for row in untuned
        if (row["router"], row["text"]) == (NO_ROUTER, "encyclopedia")
    )
    lines: dict[str, dict[float, list]] = {}

    def add(label: str, share: float, ratio: float) -> None:
        lines.setdefault(label, {}).setdefault(share, []).append(ratio)

    for row in untuned:
        fitted_to, text = row["fitted_to"], row["text"]
        if fitted_to == text == "encyclopedia" and row["allocate"] != "alike":
            name = router_label(row["router"])
            add(name, int(row["active"]) / 9, float(row["perplexity"]) / original)
    for kind, (_, last) in recovery.ends(tuned).items():
        for row in last:
            ratio = float(row["perplexity"]) / float(row["original_perplexity"])
            add(f"{router_label(kind.router)}, tuned", kind.active, ratio)
    return lines


def works_with(rows: Sequence[Row]) -> Table:
    """A line for each test that is marked so: with which package it does what."""
    lines = [[row["with"], row["what"], f"`{row['test']}`"] for row in rows]
    return Table(
        columns=["with", "what", "test"],
        rows=lines,
        legend="Each line is a test.",
        measured_on="a CPU, with the versions of constraints.txt",
        left=3,
    )


def marked_tests() -> list[Row]:
    """Tests with the mark works_with, by package."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tests = [x for x in ast.parse(path.read_text()).body if isinstance(x, ast.FunctionDef)]
        for name, mark in [(test.name, mark) for test in tests for mark in test.decorator_list]:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.works_with":
                tool, what = map(ast.literal_eval, mark.args)
                place = path.relative_to(ROOT).as_posix()
                found.append({"with": tool, "what": what, "test": f"{place}::{name}"})
    return sorted(found, key=lambda row: row["with"].lower())


DECODERS = {
    "8B": Decoder(
        dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, mlp_dim=14336, vocab_size=128256
    ),
    "70B": Decoder(
        dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, mlp_dim=28672, vocab_size=128256
    ),
}
DEVICES = ((1, 1), (2, 1), (8, 1), (1, 8), (1, 64), (8, 8))  # tp, fsdp
GIB = 2**30


def shardings() -> list[Row]:
    """The models and how many devices share their heads, and their weights."""
    sizes = [(model, *map(str, devices)) for model in DECODERS for devices in DEVICES]
    return [{"model": model, "tp": tp, "fsdp": fsdp} for model, tp, fsdp in sizes]


def sharding(rows: Sequence[Row]) -> Table:
    """A line for each model and layout, and what a device then holds and sends."""
    lines: list[list[Cell]] = []
    for row in rows:
        tp, fsdp = int(row["tp"]), int(row["fsdp"])
        split = Sharding(decoder=DECODERS[row["model"]], tp=tp, fsdp=fsdp)
        engines = [f"{name} {n}" for name, n in (("TP", tp), ("FSDP", fsdp)) if n > 1]
        sent = split.token_traffic()
        inference: list[Cell] = [
            Number(split.weight_bytes() / GIB, "{:.1f}"),
            Number(split.cache_bytes(8192) / GIB, "{:.2f}"),
            Number(sent / 1024, "{:,.0f}"),
            Number(split.routing_traffic() / sent, "{:.1%}") if sent else "",
        ]
        training: list[Cell] = [
            Number(split.training_bytes() / GIB, "{:,.1f}"),
            Number(split.step_traffic(4096) / GIB, "{:.1f}"),
        ]
        # FSDP would gather all weights for each token.
        shown = inference if fsdp == 1 else [""] * len(inference)
        name = " × ".join(engines) or "one device"
        lines.append([row["model"], name, str(tp * fsdp), *shown, *training])
    legend = (
        "Of each device. Weights, cache of 8,192 tokens and traffic of a token: a forward in "
        "bfloat16; routing: the share of that traffic which routers by query norm have. Training: "
        "weights, gradients and Adam in float32 with what FSDP gathers, without activations; "
        "traffic of a step: of 4,096 tokens in each batch, in float32."
    )
    columns = [
        "model", "engine", "devices", "weights (GiB)", "cache (GiB)", "a token (KiB)", "routing",
        "training (GiB)", "a step (GiB)",
    ]  # fmt: skip
    return Table(columns, lines, legend, left=2)


# Tables whose rows are in a file of another name.
SOURCES = {"costs": "performance", "speed": "performance", "speed-amx": "performance_amx"}
TABLES = {
    "costs": costs,
    "performance": bench.performance,
    "speed": bench.summary,
    "speed-amx": bench.summary,
    "serving": bench.full,
    "gpu": bench.on_a_gpu,
    "fitted": fitted,
    "fitted-experts": fitted_experts,
    "gated": gated,
    "scaling": scaling_table.slopes,
    "stories260k": recovery.comparison,
    "smollm2": evaluation.comparison,
    "smollm2-tuning": recovery.comparison,
    "works-with": works_with,
    "sharding": sharding,
} | dict.fromkeys(("lm", "vit", "vit-cifar10", "dit", *STUDIES), training.comparison)


# Rows that are no measurements.
MADE_HERE = {"works-with": marked_tests, "sharding": shardings}


def main() -> None:
    """Replace what stands between the marks of each table."""
    for page in PAGES:
        text = (ROOT / page).read_text()
        for name, table_of in TABLES.items():
            start, end = f"<!-- table:{name} -->\n", "<!-- /table -->"
            before, found, rest = text.partition(start)
            if found and is_measured(SOURCES.get(name, name)):
                _, _, after = rest.partition(end)
                rows = rows_of(SOURCES.get(name, name))
                text = f"{before}{start}{table_of(rows).markdown()}{end}{after}"
        (ROOT / page).write_text(text)
    figure = recovery_curves(rows_of("stories260k"))
    figure.savefig(ROOT / "results" / "stories260k.png", dpi=150)
    lines = quality_lines(rows_of("fitted"), rows_of("smollm2-tuning"))
    figure = quality_against_share(lines, title="SmolLM2-135M on WikiText-2")
    figure.savefig(ROOT / "results" / "fitted.png", dpi=150)
    figure = time_against_share(rows_of("performance"))
    figure.savefig(ROOT / "results" / "performance.png", dpi=150)
    if (ROOT / "results" / "scaling.csv").exists():
        figure = cost_against_size(rows_of("scaling"))
        figure.savefig(ROOT / "results" / "scaling.png", dpi=150)
    for name, study in STUDIES.items():
        if (ROOT / "results" / f"{name}.csv").exists():
            path = ROOT / "results" / f"{name}.png"
            draw_comparison(rows_of(name), path, axis=study.axis)


def is_measured(name: str) -> bool:
    """Whether there are rows of that name."""
    return name in MADE_HERE or (ROOT / "results" / f"{name}.csv").exists()


def rows_of(name: str) -> list[Row]:
    """The rows of results/NAME.csv, or those that are no measurements."""
    if name in MADE_HERE:
        return MADE_HERE[name]()
    return read_csv(ROOT / "results" / f"{name}.csv")


if __name__ == "__main__":
    main()
