"""Numbers become matplotlib figures. No pyplot, so no global figure and no display.

Colours are Okabe and Ito's, which most colour-blind people can tell apart; markers and line styles
say the same again.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from headwise.analysis.measure import unused_share
from headwise.analysis.records import Curve, ExpertLoads, HeadLoads, ModelRecord, RunRecord
from headwise.analysis.svg import inline_svg

INK, MUTED, GRID = "#1c2025", "#5a636e", "#dde1e6"
VARIANTS = (INK, "#0072b2", "#d55e00", "#009e73", "#cc79a7")
DOMAINS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7")
# Above so many heads or experts a load chart is drawn wide.
CROWDED = 16
# So many points of a training curve are drawn; more are thinner than a pixel.
POINTS = 300
MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), ":")
_CORES = ("core, causal", "core, full")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "headwise",
}

P = ParamSpec("P")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def time_against_share(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Time of the attention core against the share of heads on, relative to all heads by SDPA.

    A panel for causal and full, and for each dtype; a line for each length; dotted the ideal.
    """
    rows = [
        r for r in rows if r["rival"] == "SDPA" and r["case"] in _CORES and "kv" not in r["shape"]
    ]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(4.4 * len(_CORES), 3.3 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(_CORES), squeeze=False, sharex=True, sharey=True)
    for line, dtype in zip(panels, dtypes, strict=True):
        for axes, case in zip(line, _CORES, strict=True):
            drawn = [r for r in rows if (r["dtype"], r["case"]) == (dtype, case) and r["ratio"]]
            _shares(axes, drawn)
            axes.set_title(f"{case.removeprefix('core, ')}, {dtype}")
    highest = max([1.0, *(float(row["ratio"]) for row in rows if row["ratio"])])
    panels[0][0].set_ylim(0, 1.1 * highest)
    panels[0][0].legend(loc="lower right")
    figure.supxlabel("share of heads that are on", color=MUTED, fontsize=10)
    figure.supylabel("time / dense attention's", color=MUTED, fontsize=10)
    return figure


def _shares(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1, label="ideal")
    axes.axhline(1, color=INK, linewidth=1, label="dense, and heads masked")
    for index, shape in enumerate(dict.fromkeys(row["shape"] for row in rows)):
        points = sorted((float(r["share"]), float(r["ratio"])) for r in rows if r["shape"] == shape)
        axes.plot(
            [share for share, _ in points],
            [ratio for _, ratio in points],
            color=_cycle(VARIANTS[1:], index),
            marker=_cycle(MARKERS, index),
            markersize=4,
            label=shape.partition(",")[0],
        )
    axes.set_xlim(0, 1.04)


@_styled
def loss_curves(record: RunRecord) -> Figure:
    """Loss against steps, a colour for each variant, mean over its seeds.

    Thin lines are training, markers validation, the band the range of validation over seeds. The
    loss axis ends where the validation was after a tenth of the steps.
    """
    figure, axes = _figure(4.6, 3.6)
    tops = []
    for index, runs in enumerate(record.variants().values()):
        colour, dash = _cycle(VARIANTS, index), _cycle(DASHES, index)
        training = thinned(mean_curve([run.training for run in runs]), POINTS)
        axes.plot(training.steps, training.losses, color=colour, linewidth=0.7, alpha=0.5)
        curves = [run.validation for run in runs]
        mean = mean_curve(curves)
        every = max(1, len(mean.steps) // 7)
        axes.plot(
            mean.steps,
            mean.losses,
            color=colour,
            linestyle=dash,
            linewidth=1.5,
            marker=_cycle(MARKERS, index),
            markersize=4.5,
            # Staggered, so that curves that lie on each other still show their markers.
            markevery=(index % every, every),
            label=runs[0].label,
        )
        lowest, highest = _range_at(mean.steps, curves)
        axes.fill_between(mean.steps, lowest, highest, color=colour, alpha=0.18, linewidth=0)
        settled = [
            loss
            for step, loss in zip(mean.steps, mean.losses, strict=True)
            if step * 10 >= mean.steps[-1] and math.isfinite(loss)
        ]
        tops += settled[:1]
    if tops:
        # The first tenth falls from far above; what tells variants apart lies below it.
        axes.set_ylim(top=max(tops) * 1.03)
    axes.set_title("Loss while training")
    axes.set_xlabel("Step (optimizer updates)")
    axes.set_ylabel(f"Loss ({record.loss_unit})")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _legend(axes, outside=False)
    return figure


@_styled
def final_losses(record: RunRecord) -> Figure:
    """The last validation loss of every run, a row for each variant; a bar marks the mean."""
    variants = {name: runs for name, runs in record.variants().items() if _finals(runs)}
    figure, axes = _figure(4.6, 3.6)
    names = list(record.variants())
    for row, (name, runs) in enumerate(variants.items()):
        index, finals = names.index(name), _finals(runs)
        axes.plot(
            finals,
            [row] * len(finals),
            linestyle="none",
            marker=_cycle(MARKERS, index),
            markersize=8,
            alpha=0.75,
            color=_cycle(VARIANTS, index),
            label="One run (seed)" if row == 0 else "",
        )
        mean = sum(finals) / len(finals)
        label = "Mean of the variant" if row == 0 else ""
        axes.vlines(mean, row - 0.28, row + 0.28, color=INK, linewidth=1.6, label=label)
        axes.annotate(
            f"{mean:.3f}", (mean, row - 0.3), ha="center", va="bottom", fontsize=9, color=INK
        )
    axes.set_yticks(range(len(variants)), [runs[0].label for runs in variants.values()])
    axes.set_ylim(len(variants) - 0.4, -0.75)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title("Validation loss at the end")
    axes.set_xlabel(f"Loss ({record.loss_unit}), axis does not start at 0")
    axes.set_ylabel("Variant")
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="y", visible=False)
    _legend(axes, outside=True)
    return figure


@_styled
def head_load_chart(heads: HeadLoads, layer: int) -> Figure:
    """How often each routed head of a layer is on, domains side by side.

    The dashed line is the balanced level, where every routed head is on equally often.
    """
    loads = {domain: heads.routed(domain, layer) for domain in heads.by_domain}
    count = max((len(load) for load in loads.values()), default=0)
    positions = range(heads.shared_heads, heads.shared_heads + count)
    figure, axes = _load_figure(count)
    balanced = _mean([value for load in loads.values() for value in load])
    _compare(axes, list(positions), loads, balanced)
    axes.set_ylim(0, 1.06)
    axes.set_title(f"Layer {layer}")
    axes.set_xlabel("Routed head (index)")
    axes.set_ylabel("On for (% of tokens)")
    _legend(axes, outside=True)
    return figure


@_styled
def expert_load_chart(experts: ExpertLoads, position: int) -> Figure:
    """Share of the assignments that each expert of a layer gets, the busiest expert first.

    Experts are ordered by their mean over the domains, so that a rank is one expert.
    """
    loads = {domain: layers[position] for domain, layers in experts.by_domain.items()}
    means = [_mean(values) for values in zip(*loads.values(), strict=True)]
    order = sorted(range(len(means)), key=lambda expert: -means[expert])
    ordered = {domain: [load[expert] for expert in order] for domain, load in loads.items()}
    figure, axes = _load_figure(len(order))
    _compare(axes, list(range(1, len(order) + 1)), ordered, 1 / max(len(order), 1))
    highest = max(
        (load for layers in experts.by_domain.values() for layer in layers for load in layer),
        default=1,
    )
    axes.set_ylim(-0.03 * highest, highest * 1.1 or 1)
    axes.set_title(f"Layer {experts.layers[position]}")
    axes.set_xlabel(f"Rank among {len(order)} experts")
    axes.set_ylabel("Load (% of assignments)")
    _legend(axes, outside=True)
    return figure


@_styled
def unused_chart(models: Mapping[str, ExpertLoads]) -> Figure:
    """Share of the experts that got no assignment at all, for each model, layer and domain."""
    rows = [
        (f"{label} · layer {layer}", experts, position)
        for label, experts in models.items()
        for position, layer in enumerate(experts.layers)
    ]
    domains = list(dict.fromkeys(d for experts in models.values() for d in experts.by_domain))
    figure, axes = _figure(4.6, 1.4 + 0.34 * len(rows))
    thickness = 0.7 / max(len(domains), 1)
    largest = 0.08
    for index, domain in enumerate(domains):
        drawn = [row for row, (_, experts, _) in enumerate(rows) if domain in experts.by_domain]
        shares = [unused_share(rows[row][1].by_domain[domain][rows[row][2]]) for row in drawn]
        largest = max(largest, *shares)
        offset = (index - (len(domains) - 1) / 2) * thickness
        bars = axes.barh(
            [row + offset for row in drawn],
            shares,
            height=thickness * 0.85,
            color=_cycle(DOMAINS, index),
            hatch=_cycle(("", "///", "...", "xx"), index),
            edgecolor="white",
            linewidth=0,
            label=domain,
        )
        axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=4, fontsize=8)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, min(1.08, 1.25 * largest))
    axes.xaxis.set_major_formatter(_percent)
    axes.set_title("Experts never used")
    axes.set_xlabel("Share of the layer's experts (%)")
    axes.set_ylabel("Model and layer")
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="y", visible=False)
    _legend(axes, outside=True)
    return figure


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean loss at the steps that all the curves have."""
    at = [dict(zip(curve.steps, curve.losses, strict=True)) for curve in curves]
    steps = [step for step in curves[0].steps if all(step in losses for losses in at)]
    return Curve(steps, [_mean([losses[step] for losses in at]) for step in steps])


def thinned(curve: Curve, points: int) -> Curve:
    """The curve, or its means over blocks of equal length where it has more than `points`."""
    block = -(-len(curve.steps) // points)
    if block <= 1:
        return curve
    starts = range(0, len(curve.steps), block)
    return Curve(
        [curve.steps[start : start + block][-1] for start in starts],
        [_mean(curve.losses[start : start + block]) for start in starts],
    )


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page that holds others; see `svg.inline_svg`.

    Args:
        figure: Drawn by this file; title and axes become the accessible name.
        name: Unlike that of any other figure of the page; all ids begin with it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    axes = figure.axes[0]
    title = f"{axes.get_title('left')}: {axes.get_ylabel()} against {axes.get_xlabel()}"
    svg = inline_svg(buffer.getvalue(), name, title, round(figure.get_figwidth() * 108))
    # The page sets these three anew in a dark scheme; the palette is legible in both.
    for colour, variable in ((INK, "--ink"), (MUTED, "--muted"), (GRID, "--line")):
        svg = svg.replace(colour, f"var({variable}, {colour})")
    return svg


def _range_at(steps: Sequence[int], curves: Sequence[Curve]) -> tuple[list[float], list[float]]:
    at = [dict(zip(curve.steps, curve.losses, strict=True)) for curve in curves]
    columns = [[losses[step] for losses in at] for step in steps]
    return [min(column) for column in columns], [max(column) for column in columns]


def _load_figure(candidates: int) -> tuple[Figure, Axes]:
    return _figure(4.6 if candidates > CROWDED else 3.5, 2.9)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(axes: Axes, *, outside: bool) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    if not outside:
        axes.legend(handles, labels, loc="upper right")
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(handles), 3), columnspacing=1.2
    )


def _compare(
    axes: Axes, positions: list[int], loads: Mapping[str, Sequence[float]], balanced: float
) -> None:
    """Dots for each domain; the line between them is as long as the domains differ."""
    columns = list(zip(*loads.values(), strict=True))
    axes.vlines(
        positions,
        [min(column) for column in columns],
        [max(column) for column in columns],
        color=MUTED,
        linewidth=1.2,
        alpha=0.6,
    )
    size = 6.5 if len(positions) <= CROWDED else 4
    for index, (domain, load) in enumerate(loads.items()):
        axes.plot(
            positions,
            load,
            linestyle="none",
            marker=_cycle(MARKERS, index),
            markersize=size,
            markeredgecolor=INK,
            markeredgewidth=0.7,
            color=_cycle(DOMAINS, index),
            label=domain,
        )
    axes.axhline(balanced, color=INK, linestyle="--", linewidth=1, label="balanced")
    axes.yaxis.set_major_formatter(_percent)
    axes.set_xticks(positions[:: max(1, -(-len(positions) // 12))])
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.08 if len(positions) <= CROWDED else 0.02)


def _finals(runs: Sequence[ModelRecord]) -> list[float]:
    last = [run.validation.losses[-1] for run in runs if run.validation.losses]
    return [loss for loss in last if math.isfinite(loss)]


def _percent(share: float, _: float = 0) -> str:
    return f"{100 * share:.4g}"


def _cycle(choices: Sequence, index: int) -> Any:
    return choices[index % len(choices)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
