"""What training came to, step by step and at its end."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from headwise.analysis.plots.style import (
    DASHES,
    INK,
    MARKERS,
    VARIANTS,
    band,
    cycle,
    legend,
    lines_with_bands,
    mean,
    name_rows,
    new_figure,
    styled,
)
from headwise.analysis.records import Curve, RunRecord
from headwise.results.rows import NO_ROUTER, router_label

# So many points of a training curve are drawn; more are thinner than a pixel.
POINTS = 300


@styled
def loss_curves(record: RunRecord) -> Figure:
    """Loss against steps, a colour for each variant, mean over its seeds.

    Thin lines are training, markers validation, the band the range of validation over seeds. The
    loss axis ends where the validation was after a tenth of the steps, or training at its end.
    """
    figure, axes = new_figure(4.6, 3.6)
    tops = []
    for index, runs in enumerate(record.variants().values()):
        colour, dash = cycle(VARIANTS, index), cycle(DASHES, index)
        training = thinned(mean_curve([run.training for run in runs]), POINTS)
        axes.plot(training.steps, training.losses, color=colour, linewidth=0.7, alpha=0.5)
        steps, columns = _at_common_steps([run.validation for run in runs])
        every = max(1, len(steps) // 7)
        band(
            axes,
            steps,
            columns,
            color=colour,
            linestyle=dash,
            linewidth=1.5,
            marker=cycle(MARKERS, index),
            markersize=4.5,
            # Staggered, so that curves that lie on each other still show their markers.
            markevery=(index % every, every),
            label=runs[0].label,
        )
        late = zip(steps, map(mean, columns), strict=True)
        settled = [x for step, x in late if step * 10 >= steps[-1] and math.isfinite(x)]
        tops += settled[:1] + [loss for loss in training.losses[-1:] if math.isfinite(loss)]
    if tops:
        # The first tenth falls from far above; what tells variants apart lies below it.
        axes.set_ylim(top=max(tops) * 1.03)
    axes.set(title="Loss while training", xlabel="Step (optimizer updates)")
    axes.set_ylabel(f"Loss ({record.loss_unit})")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(loc="upper right")
    return figure


@styled
def final_losses(record: RunRecord) -> Figure:
    """The last validation loss of every run, a row for each variant; a bar marks the mean."""
    figure, axes = new_figure(4.6, 3.6)
    labels: list[str] = []
    for index, runs in enumerate(record.variants().values()):
        finals = [loss for run in runs if (loss := run.final_loss()) is not None]
        if not finals:
            continue
        row = len(labels)
        labels.append(runs[0].label)
        axes.plot(
            finals,
            [row] * len(finals),
            linestyle="none",
            marker=cycle(MARKERS, index),
            markersize=8,
            alpha=0.75,
            color=cycle(VARIANTS, index),
            label="One run (seed)" if row == 0 else "",
        )
        middle = mean(finals)
        label = "Mean of the variant" if row == 0 else ""
        axes.vlines(middle, row - 0.28, row + 0.28, color=INK, linewidth=1.6, label=label)
        axes.annotate(
            f"{middle:.3f}", (middle, row - 0.3), ha="center", va="bottom", fontsize=9, color=INK
        )
    name_rows(axes, labels)
    axes.set_ylim(len(labels) - 0.4, -0.75)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(title="Validation loss at the end", ylabel="Variant")
    axes.set_xlabel(f"Loss ({record.loss_unit})\naxis does not start at 0")
    legend(axes)
    return figure


@styled
def recovery_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Recovered quality against tokens tuned on, a line a share of heads and router, mean of seeds.

    The band is the range over seeds; 100 % is the original.
    """
    figure, axes = new_figure(5.6, 3.6)
    axes.axhline(100, color=INK, linewidth=1, label="original")
    lines: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        line = lines.setdefault(_label(row), {})
        line.setdefault(int(row["tokens"]), []).append(float(row["recovery"]))
    lines_with_bands(axes, lines, markersize=3.5)
    axes.set(title="Quality recovered by tuning", xlabel="Tokens tuned on")
    axes.set_ylabel("Original's perplexity / model's (%)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1000:,.0f}k"))
    axes.legend(loc="lower right")
    return figure


def _label(row: Mapping[str, Any]) -> str:
    """Of the model, as the legend has it."""
    router = router_label(row["router"])
    share = 100 * float(row["active_heads"])
    is_dense = row["router"] == NO_ROUTER
    return f"{router} on" if is_dense else f"{share:.3g} % of the heads, {router}"


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean loss at the steps that all the curves have."""
    steps, columns = _at_common_steps(curves)
    return Curve(steps, [mean(column) for column in columns])


def thinned(curve: Curve, points: int) -> Curve:
    """The curve, or its means over blocks of equal length where it has more than `points`."""
    block = -(-len(curve.steps) // points)
    if block <= 1:
        return curve
    starts = range(0, len(curve.steps), block)
    return Curve(
        [curve.steps[start : start + block][-1] for start in starts],
        [mean(curve.losses[start : start + block]) for start in starts],
    )


def _at_common_steps(curves: Sequence[Curve]) -> tuple[list[int], list[list[float]]]:
    """The steps that all the curves have, and for each of them the curves' losses."""
    at = [dict(zip(curve.steps, curve.losses, strict=True)) for curve in curves]
    steps = [step for step in curves[0].steps if all(step in losses for losses in at)]
    return steps, [[losses[step] for losses in at] for step in steps]
