"""`headwise bench scaling`: time and memory as work grows, and how fast they do."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from statistics import linear_regression
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import linear
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from headwise.bench import decode, experts
from headwise.bench.comparison import Comparison, Effort, Rival, Tensors, first_line, measure
from headwise.bench.layer import DenseAttention
from headwise.bench.machine import Machine, Work, free_memory, measure_machine
from headwise.bench.memory import peak_memory
from headwise.bench.rivals import attention_of_rows, rows_to_check
from headwise.bench.tensors import random_inputs
from headwise.nn import MoE, MoHAttention
from headwise.progress import followed
from headwise.results.rows import Row

DTYPES = (torch.float32, torch.bfloat16)
DIM, CHANNELS, HEADS, SHARE = 512, 64, 8, 0.5
EXPERT_DIM, TOP_K, WIDTH = 256, 2, 256
# A series ends before the size at which a round of ours and the rival's is expected to take longer.
_LONGEST_MS = 15_000.0
# Of free memory, for what one point keeps at once.
_MOST_OF_MEMORY = 1 / 4
# Below, the watcher sees pages rather than tensors.
_LEAST_MIB = 4.0
# glibc keeps small blocks that were freed; by these settings it gives them back, so that the
# process grows by what a run needs.
_GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Point(NamedTuple):
    """One size of a series.

    Attributes:
        comparison: Ours against one rival.
        work: What ours must do, the ideal.
    """

    comparison: Comparison
    work: Work


@dataclass(frozen=True)
class Series:
    """What is measured while one size grows.

    Attributes:
        axis: What grows.
        sizes: From small to large.
        build: Makes a point, from effort, dtype and the size by name.
        keeps: Bytes that a point of such a size holds at least, by dtype's bytes.
        degree: By which power of the size time may grow, to know when to end.
    """

    axis: str
    sizes: tuple[int, ...]
    build: Callable[[Effort, torch.dtype, int], Point]
    keeps: Callable[[int], float]
    degree: int = 1


def all_series(effort: Effort) -> dict[str, Series]:
    """By name: a layer against tokens, heads and batch; one token; experts."""
    toy = effort.toy

    def sizes(first: int, last: int) -> tuple[int, ...]:
        doubled = tuple(first << i for i in range((last // first).bit_length()))
        return doubled[:2] if toy else doubled[:4] if effort.quick else doubled

    tokens, some, context = (67, 67, 67) if toy else (1024, 512, 4096)
    return {
        "layer, tokens": Series(
            "tokens",
            sizes(tokens, 131072),
            lambda e, d, n: layer(e, d, tokens=n),
            lambda n: 24 * n * DIM,
            degree=2,
        ),
        "layer, heads": Series(
            "heads",
            sizes(HEADS, 128),
            lambda e, d, n: layer(e, d, tokens=tokens, heads=n),
            lambda n: 24 * tokens * n * CHANNELS,
        ),
        "layer, batch": Series(
            "batch",
            sizes(1, 32),
            lambda e, d, n: layer(e, d, tokens=some, batch=n),
            lambda n: 24 * n * some * DIM,
        ),
        "token, context": Series(
            "tokens in the cache",
            sizes(tokens, 131072),
            lambda e, d, n: one_token(e, d, context=n),
            lambda n: 16 * n * DIM,
        ),
        "token, batch": Series(
            "batch",
            sizes(1, 32),
            lambda e, d, n: one_token(e, d, context=context, batch=n),
            lambda n: 16 * n * context * DIM,
        ),
        "experts": Series(
            "experts",
            sizes(8, 1024),
            lambda e, d, n: expert_layer(e, d, 67 if toy else 2048, n),
            lambda n: 4 * 3 * n * WIDTH * EXPERT_DIM,
        ),
    }


def layer(
    effort: Effort, dtype: torch.dtype, *, tokens: int, heads: int = HEADS, batch: int = 1
) -> Point:
    """A MoH layer without gradients, projections and router included, against a dense one."""
    torch.manual_seed(0)
    active, width = round(SHARE * heads), heads * CHANNELS
    ours = MoHAttention(
        DIM, num_heads=heads, shared_heads=active // 4, active_heads=active, head_dim=CHANNELS,
        causal=True,
    ).to(effort.device, dtype)  # fmt: skip
    dense = DenseAttention(DIM, heads, CHANNELS).to(effort.device, dtype)
    inputs = random_inputs((batch, tokens, DIM), dtype, effort.device)
    turn = cycle(inputs)

    def run(layer: Any) -> Tensor:
        with torch.no_grad():
            return layer(next(turn))[0]

    rows, matrix = batch * tokens, DIM * width
    # Heads that are off leave out queries, attention and outputs, but not keys and values.
    projections = 2 * rows * matrix * (2 + 2 * SHARE) + 2 * rows * DIM * heads
    attention = 4 * SHARE * width * batch * tokens * (tokens + 1) / 2
    size = dtype.itemsize
    work = Work(
        projections + attention,
        size * (4 * matrix + 2 * rows * DIM),
        kept=size * rows * (2 * width + DIM),
    )
    comparison = Comparison(
        "MoH layer, causal", f"B={batch}, T={tokens}, d={DIM}, {heads}×{CHANNELS}", dtype, SHARE,
        lambda: run(ours), {"dense layer": Rival(lambda: run(dense))},
        lambda: _compared(ours, inputs[0]),
    )  # fmt: skip
    return Point(comparison, work)


def one_token(effort: Effort, dtype: torch.dtype, *, context: int, batch: int = 1) -> Point:
    """Attention of a token to a cache, half of the heads on."""
    comparison = decode.one_token(
        effort, dtype, batch, context, HEADS, heads=HEADS, channels=CHANNELS
    )
    # Targets are for the shapes of `headwise bench decode`.
    rivals = {name: rival._replace(target=None) for name, rival in comparison.rivals.items()}
    values = 2 * SHARE * batch * context * HEADS * CHANNELS
    work = Work(2 * values, dtype.itemsize * values)
    return Point(replace(comparison, rivals=rivals), work)


def expert_layer(effort: Effort, dtype: torch.dtype, tokens: int, count: int) -> Point:
    """A sparse mixture, router included, against the block of a transformers model."""
    torch.manual_seed(0)
    ours = MoE(WIDTH, num_experts=count, top_k=TOP_K, expert_dim=EXPERT_DIM)
    config = Qwen3MoeConfig(
        hidden_size=WIDTH, moe_intermediate_size=EXPERT_DIM, num_experts=count,
        num_experts_per_tok=TOP_K,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    block = Qwen3MoeSparseMoeBlock(config)
    block.load_state_dict(
        {
            "gate.weight": torch.randn(count, WIDTH) / WIDTH**0.5,
            "experts.gate_up_proj": ours.experts.gate_up_proj.detach(),
            "experts.down_proj": ours.experts.down_proj.detach(),
        }
    )
    ours, block = ours.to(effort.device, dtype), block.to(effort.device, dtype)
    inputs = random_inputs((1, tokens, WIDTH), dtype, effort.device)
    turn = cycle(inputs)
    choices, expert, size = tokens * TOP_K, 3 * WIDTH * EXPERT_DIM, dtype.itemsize
    work = Work(
        2 * tokens * count * WIDTH + 2 * choices * expert,
        size * (min(choices, count) * expert + count * WIDTH + 2 * tokens * WIDTH),
        kept=size * tokens * WIDTH,
    )
    comparison = Comparison(
        "sparse MoE layer", f"{tokens} tokens, d={WIDTH}; E={count}, k={TOP_K}, f={EXPERT_DIM}",
        dtype, 1.0, torch.no_grad()(lambda: ours(next(turn))),
        {"transformers grouped_mm": Rival(torch.no_grad()(lambda: block(next(turn))))},
        lambda: experts.compared(ours, inputs[0], backward=False),
    )  # fmt: skip
    return Point(comparison, work)


def _compared(moh: MoHAttention, x: Tensor) -> Tensors:
    """Ours on all tokens; of long inputs some are compared, by the routing of the whole."""
    rows = rows_to_check(x.shape[1], x.device)
    with torch.no_grad():
        y, routing = moh(x)
        gates = routing.weights[:, rows]

        def again(dtype: torch.dtype) -> list[Tensor]:
            def project(x: Tensor, by: Any) -> Tensor:
                return linear(x.to(dtype), by.weight.to(dtype), by.bias.to(dtype))

            q, k, v = (
                project(tokens, by).unflatten(-1, (-1, moh.head_dim))
                for tokens, by in ((x[:, rows], moh.q_proj), (x, moh.k_proj), (x, moh.v_proj))
            )
            heads = attention_of_rows(q, k, v, rows) * gates.to(dtype).unsqueeze(-1)
            return [project(heads.flatten(2), moh.o_proj)]

        return [y[:, rows]], again(x.dtype), again(torch.float64)


def measure_scaling(effort: Effort, console: Console) -> Iterator[list[Row]]:
    """All rows so far, after each point and each figure of memory."""
    machine = measure_machine(effort.device, DTYPES, toy=effort.toy)
    rows: list[Row] = []
    places: list[tuple[str, str, int]] = []
    for dtype in DTYPES[:1] if effort.quick else DTYPES:
        for name, series in all_series(effort).items():
            for size, row in _timed(effort, machine, name, series, dtype, console):
                rows.append(row)
                places.append((name, row["dtype"], size))
                yield with_slopes(rows)
    measured = _memory(effort, places)
    shown = followed(measured, "memory", total=len(places), alike=False)
    for row, (ours, theirs) in zip(rows, shown, strict=False):
        row |= {"ours_mib": _rounded(ours), "rival_mib": _rounded(theirs)}
        yield with_slopes(rows)
    if any(row["ours_mib"] is None for row in rows if row["correct"]):
        console.print("not measured: memory: its process ended early", style="red")


def _timed(
    effort: Effort,
    machine: Machine,
    name: str,
    series: Series,
    dtype: torch.dtype,
    console: Console,
) -> Iterator[tuple[int, Row]]:
    """A row for each size, until time or memory end."""
    kind = str(dtype).removeprefix("torch.")
    shown = followed(
        series.sizes, f"{name}, {kind}", total=len(series.sizes), describe=str, alike=False
    )
    last = 0.0
    for size in shown:
        what = f"{name}, {kind}: ends before {size:,}"
        if last * 2**series.degree > _LONGEST_MS:
            console.print(f"{what}: a round would take {last * 2**series.degree / 1e3:.0f} s")
            return
        keeps, free = series.keeps(size), free_memory(effort.device)
        if keeps > _MOST_OF_MEMORY * free:
            console.print(f"{what}: it would keep {keeps / 2**30:.0f} of {free / 2**30:.0f} GiB")
            return
        try:
            comparison, work = series.build(effort, dtype, size)
            limited = replace(comparison, limit=machine.limit(work, dtype))
            (row,) = measure(limited, effort)
        except RuntimeError as error:
            console.print(f"not measured: {what}: {first_line(error)}", style="red")
            return
        kept = None if work.kept is None else _rounded(work.kept / 2**20)
        memory = {"ours_mib": None, "rival_mib": None, "kept_mib": kept}
        yield size, {"benchmark": "scaling", "axis": series.axis, "size": size, **row, **memory}
        last = (row["ours_ms"] or 0.0) + (row["rival_ms"] or 0.0)


def _memory(
    effort: Effort, places: Sequence[tuple[str, str, int]]
) -> Iterator[tuple[float, float]]:
    """MiB that ours and the rival's add, of each place in turn.

    On a CPU a process of its own measures: what was freed before in this one would be taken again.
    """
    if effort.device.type == "cuda":
        yield from (measure_memory(effort, *place) for place in places)
        return
    program = "from headwise.bench.scaling import print_memory; print_memory()"
    given = {"places": places, "toy": effort.toy, "threads": torch.get_num_threads()}
    with subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(given)],
        stdout=subprocess.PIPE, text=True, env=os.environ | _GIVING_BACK,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        for line in child.stdout:
            ours, theirs = json.loads(line)
            yield ours, theirs


def print_memory() -> None:
    """What the process for memory does: a line for each place."""
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    effort = Effort(torch.device("cpu"), 1, 0.0, 0, quick=False, toy=given["toy"])
    for place in given["places"]:
        print(json.dumps(measure_memory(effort, *place)), flush=True)


def measure_memory(effort: Effort, name: str, kind: str, size: int) -> tuple[float, float]:
    """MiB that a run of ours and of the rival adds, after one that fills caches of kernels."""
    comparison, _ = all_series(effort)[name].build(effort, getattr(torch, kind), size)
    (rival,) = comparison.rivals.values()
    peaks = []
    for run in (comparison.ours, rival.run):
        run()
        peaks.append(peak_memory(run, effort.device))
    return peaks[0], peaks[1]


# A figure of ours, and the rival's.
FIGURES = {"time": ("ours_ms", "rival_ms"), "memory": ("ours_mib", "rival_mib")}


def with_slopes(rows: Sequence[Row]) -> list[Row]:
    """The rows with the slopes of their series, by time and by memory."""
    slopes = {
        line: {
            f"{who}_{what}_slope": _rounded(slope([(r["size"], r[name]) for r in members], least))
            for what, names in FIGURES.items()
            for who, name in zip(("ours", "rival"), names, strict=True)
            for least in (_LEAST_MIB if what == "memory" else 0.0,)
        }
        for line, members in by_series(rows).items()
    }
    return [row | slopes[_series_of(row)] for row in rows]


def by_series(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """The rows of each series, by what they have in common."""
    series: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        series.setdefault(_series_of(row), []).append(row)
    return series


def _series_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["case"], row["axis"], row["dtype"], row["rival"]


def slope(points: Sequence[tuple[int, float | None]], least: float = 0.0) -> float | None:
    """Of log value against log size, over the larger half of the sizes; None for less than two.

    Example: values 5, 6, 8, 16 at sizes 1, 2, 4, 8 have slope 1: from 4 to 8 the value doubles.

    Args:
        points: Size and value, None where there is none.
        least: Values up to this are as good as none.
    """
    known = sorted((size, value) for size, value in points if value is not None and value > least)
    larger = known[-max(2, math.ceil(len(known) / 2)) :]
    if len(larger) < 2:
        return None
    sizes, values = zip(*larger, strict=True)
    return linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
