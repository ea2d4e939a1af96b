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
    cycle,
    legend,
    mean,
    new_figure,
    styled,
)
from headwise.analysis.records import Curve, ModelRecord, RunRecord

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
        curves = [run.validation for run in runs]
        mean = mean_curve(curves)
        every = max(1, len(mean.steps) // 7)
        axes.plot(
            mean.steps,
            mean.losses,
            color=colour,
            linestyle=dash,
            linewidth=1.5,
            marker=cycle(MARKERS, index),
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
        tops += settled[:1] + [loss for loss in training.losses[-1:] if math.isfinite(loss)]
    if tops:
        # The first tenth falls from far above; what tells variants apart lies below it.
        axes.set_ylim(top=max(tops) * 1.03)
    axes.set_title("Loss while training")
    axes.set_xlabel("Step (optimizer updates)")
    axes.set_ylabel(f"Loss ({record.loss_unit})")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    legend(axes, outside=False)
    return figure


@styled
def final_losses(record: RunRecord) -> Figure:
    """The last validation loss of every run, a row for each variant; a bar marks the mean."""
    variants = {name: runs for name, runs in record.variants().items() if _finals(runs)}
    figure, axes = new_figure(4.6, 3.6)
    names = list(record.variants())
    for row, (name, runs) in enumerate(variants.items()):
        index, finals = names.index(name), _finals(runs)
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
    axes.set_xlabel(f"Loss ({record.loss_unit})\naxis does not start at 0")
    axes.set_ylabel("Variant")
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="y", visible=False)
    legend(axes, outside=True)
    return figure


@styled
def recovery_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Recovered quality against tokens tuned on, a line for each share of heads, mean over seeds.

    The band is the range over seeds; 100 % is the original.
    """
    figure, axes = new_figure(5.6, 3.6)
    axes.axhline(100, color=INK, linewidth=1, label="original")
    lines = dict.fromkeys((row["stage"], row["active_heads"]) for row in rows)
    for index, (stage, share) in enumerate(lines):
        values: dict[int, list[float]] = {}
        for row in rows:
            if (row["stage"], row["active_heads"]) == (stage, share):
                values.setdefault(int(row["tokens"]), []).append(float(row["recovery"]))
        tokens, colour = sorted(values), cycle(VARIANTS[1:], index)
        axes.plot(
            tokens,
            [mean(values[t]) for t in tokens],
            color=colour,
            linestyle=cycle(DASHES, index),
            marker=cycle(MARKERS, index),
            markersize=3.5,
            label=f"{float(share):.4g} of the heads" if stage == "routed" else "every head on",
        )
        lowest, highest = ([end(values[t]) for t in tokens] for end in (min, max))
        axes.fill_between(tokens, lowest, highest, color=colour, alpha=0.18, linewidth=0)
    axes.set_title("Quality recovered by tuning")
    axes.set_xlabel("Tokens tuned on")
    axes.set_ylabel("Original's perplexity / model's (%)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1000:,.0f}k"))
    axes.legend(loc="lower right")
    return figure


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean loss at the steps that all the curves have."""
    at = [dict(zip(curve.steps, curve.losses, strict=True)) for curve in curves]
    steps = [step for step in curves[0].steps if all(step in losses for losses in at)]
    return Curve(steps, [mean([losses[step] for losses in at]) for step in steps])


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


def _range_at(steps: Sequence[int], curves: Sequence[Curve]) -> tuple[list[float], list[float]]:
    at = [dict(zip(curve.steps, curve.losses, strict=True)) for curve in curves]
    columns = [[losses[step] for losses in at] for step in steps]
    return [min(column) for column in columns], [max(column) for column in columns]


def _finals(runs: Sequence[ModelRecord]) -> list[float]:
    last = [run.validation.losses[-1] for run in runs if run.validation.losses]
    return [loss for loss in last if math.isfinite(loss)]
