"""`headwise bench`: run comparisons, show them, keep them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from headwise.bench import (
    aggregated,
    attention,
    decode,
    experts,
    layer,
    model,
    scaling_table,
    serve,
    table,
    vision,
)
from headwise.bench.comparison import (
    Builder,
    Effort,
    LeftOutError,
    environment,
    first_line,
    measure,
)
from headwise.bench.scaling import measure_scaling
from headwise.memory import check_memory
from headwise.ops.fields import Count, check_fields
from headwise.progress import followed, plain_console
from headwise.results.files import write_whole
from headwise.results.rows import Row, write_csv

Benchmark = Literal[
    "all",
    "attention",
    "aggregated",
    "decode",
    "experts",
    "layer",
    "model",
    "vision",
    "serve",
    "scaling",
]

BENCHMARKS: dict[str, Callable[[Effort], Iterator[Builder]]] = {
    "attention": attention.comparisons,
    "aggregated": aggregated.comparisons,
    "decode": decode.comparisons,
    "experts": experts.comparisons,
    "layer": layer.comparisons,
    "model": model.comparisons,
    "vision": vision.comparisons,
    "serve": serve.comparisons,
}
_MEMORY_LENGTH = 8192
_MOST_SECONDS = 60.0
_OF_A_THREAD = 2**20  # bytes


@dataclass(frozen=True)
class BenchRun:
    """Measure our speed against every rival on this machine.

    Attributes:
        which: attention (the core), aggregated (its kind in TransNeXt), decode, experts, layer,
            model, vision (blocks of MoH-DiT and MoH-ViT), serve (requests batched continuously),
            or all of them; or scaling: time and memory against tokens, heads, experts and batch,
            and how fast they grow.
        quick: Fewer shapes and rounds: under a minute each on 2 cores.
        output: Directory for performance.csv, performance.png and performance.html; of scaling,
            for scaling.csv, scaling.png and scaling.html.
        device: cpu or cuda; the default is cuda where there is one.
        threads: CPU threads; the default is torch's.
        rounds: Timed runs of each candidate at least, of which the median counts; where they are
            short there are more, for three seconds, and where they take over a minute, three.
    """

    which: Benchmark = "all"
    quick: bool = False
    output: Path = Path("runs/bench")
    device: Literal["cpu", "cuda"] | None = None
    threads: Count | None = None
    rounds: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda; torch finds no CUDA device, so it must be cpu")
        stacks = _OF_A_THREAD * (self.threads or 1)
        check_memory(stacks, "the threads' stacks", threads=self.threads)
        check_memory(8 * (self.rounds or 1), "the times", rounds=self.rounds)
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output is {self.output}, a file; it must be a directory")


def bench(run: BenchRun, *, toy: bool = False) -> list[Row]:
    """Run, print a table, write CSV, chart and page; returns the rows."""
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    device = torch.device(run.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # Kernels on a GPU are short: in half a second there are rounds enough.
    long = 0.5 if device.type == "cuda" else 3.0
    rounds, seconds, warmups = (3, 0.0, 1) if run.quick or toy else (7, long, 2)
    effort = Effort(
        device, run.rounds or rounds, seconds, warmups, run.quick, toy, most_seconds=_MOST_SECONDS
    )
    console = plain_console()
    if run.which == "scaling":
        return _scaling(run.output, effort, console)
    names = [*BENCHMARKS] if run.which == "all" else [run.which]
    rows: list[Row] = []
    for name in names:
        for row in _rows(name, effort, console):
            rows.append(row)
            # What is measured so far is kept: the rest may fail.
            write_csv(run.output / "performance.csv", rows)
    if "layer" in names and device.type == "cpu" and not (run.quick or toy):
        rows.append(_memory_row(effort))
        write_csv(run.output / "performance.csv", rows)
    for name in names:
        if measured := [row for row in rows if row["benchmark"] == name]:
            console.print(table.for_terminal(measured))
    _write(run.output, rows, console)
    return rows


def _rows(name: str, effort: Effort, console: Console) -> Iterator[Row]:
    builders = list(BENCHMARKS[name](effort))
    for build in followed(builders, name, total=len(builders), alike=False):
        what = name
        try:
            comparison = build()
            what = f"{comparison.case}, {comparison.shape}, {comparison.kind}"
            for rival, reason in comparison.left_out.items():
                console.print(f"left out: {rival} beside {what}: {reason}")
            for row in measure(comparison, effort):
                yield {"benchmark": name, **row}
        except LeftOutError as reason:
            console.print(f"left out: {reason}")
        except RuntimeError as error:
            # A GPU with too little memory for a shape, say, still has others to measure.
            console.print(f"not measured: {what}: {first_line(error)}", style="red")


def _memory_row(effort: Effort) -> Row:
    """Peak memory of a long layer, in MiB where other rows have milliseconds."""
    ours, dense = (layer.memory_of_a_step(_MEMORY_LENGTH, kind) for kind in ("ours", "dense"))
    return {
        "benchmark": "layer", "case": "peak memory (MiB), forward and backward",
        "shape": f"T={_MEMORY_LENGTH}, d={layer.DIM}, {layer.HEADS} heads", "dtype": "float32",
        "share": 0.5, "rival": "dense layer", "ours_ms": round(ours), "rival_ms": round(dense),
        "ratio": round(ours / dense, 3), "ideal": None, "share_of_ideal": None,
        "limit_ms": None, "rival_limit_ms": None, "of_limit": None, "rival_of_limit": None,
        "target": 1.0, "error_ratio": None, "correct": True, **environment(effort.device),
    }  # fmt: skip


def _scaling(directory: Path, effort: Effort, console: Console) -> list[Row]:
    """Measure, show and keep how time and memory grow."""
    from headwise.analysis.plots import cost_against_size

    rows: list[Row] = []
    effort = replace(effort, seconds=min(effort.seconds, 1.0), most_seconds=30.0)
    for rows in measure_scaling(effort, console):
        write_csv(directory / "scaling.csv", rows)
    console.print(scaling_table.for_terminal(rows))
    pages = _draw(directory, "scaling", cost_against_size(rows), partial(scaling_table.page, rows))
    console.print("\n".join(map(str, (directory / "scaling.csv", *pages))))
    return rows


def _write(directory: Path, rows: list[Row], console: Console) -> None:
    # matplotlib is for those who draw: `import headwise` does without.
    from headwise.analysis.plots import time_against_share

    written = [directory / "performance.csv"]
    if any(row["benchmark"] == "attention" for row in rows):
        figure = time_against_share(rows)
        written += _draw(directory, "performance", figure, partial(table.page, rows))
    console.print("\n".join(str(path) for path in written))


def _draw(directory: Path, name: str, figure: Any, page: Callable[[str], str]) -> tuple[Path, Path]:
    """NAME.png, and NAME.html, which `page` makes of the figure."""
    from headwise.analysis.plots import to_svg

    chart, whole = directory / f"{name}.png", directory / f"{name}.html"
    write_whole(chart, lambda path: figure.savefig(path, format="png", dpi=150))
    text = page(to_svg(figure, "figure"))
    write_whole(whole, lambda path: path.write_text(text))
    return chart, whole
