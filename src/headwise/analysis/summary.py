"""A record in a few numbers and sentences; none says more than the runs support."""

import math
from typing import NamedTuple

from headwise.analysis.measure import load_distance, unused_share
from headwise.analysis.records import ExpertLoads, HeadLoads, ModelRecord, RunRecord


class Tile(NamedTuple):
    """A number to look at and what it is."""

    value: str
    caption: str


class FinalLoss(NamedTuple):
    """Last validation losses of one variant's runs."""

    label: str
    mean: float
    lowest: float
    highest: float
    runs: int


def final_losses(record: RunRecord) -> list[FinalLoss]:
    """One entry for each variant with a finite last validation loss, the lowest mean first."""
    entries = []
    for runs in record.variants().values():
        last = [run.validation.losses[-1] for run in runs if run.validation.losses]
        last = [loss for loss in last if math.isfinite(loss)]
        if last:
            mean = sum(last) / len(last)
            entries.append(FinalLoss(runs[0].label, mean, min(last), max(last), len(last)))
    return sorted(entries, key=lambda entry: entry.mean)


def headline(record: RunRecord) -> str:
    """One sentence on the losses: the range, and whether the first two differ beyond the seeds.

    Runs that diverged (their last validation loss is not finite) are counted in a second one.
    """
    ends = [run.validation.losses[-1] for run in record.models if run.validation.losses]
    diverged = sum(not math.isfinite(loss) for loss in ends)
    return _order(record) + (f" {_count(diverged, 'run')} diverged." if diverged else "")


def _order(record: RunRecord) -> str:
    losses = final_losses(record)
    if not losses:
        return f"{_count(len(record.models), 'run')}, none with a validation loss."
    best, last = losses[0], losses[-1]
    if len(losses) == 1:
        return f"{best.label} ends at a validation loss of {best.mean:.3f} {record.loss_unit}."
    text = (
        f"Validation loss at the end lies between {best.mean:.3f} ({best.label}) and "
        f"{last.mean:.3f} ({last.label}) {record.loss_unit}"
    )
    second = losses[1]
    lowest = f"{best.label} and {second.label}"
    gap = second.mean - best.mean
    spread = max(best.highest - best.lowest, second.highest - second.lowest)
    if best.runs == 1 and second.runs == 1:
        return text + f"; with one seed each, the order of {lowest} is not a finding."
    if best.runs == 1 or second.runs == 1 or gap <= spread:
        return (
            text + f"; {lowest} are {gap:.3f} apart, seeds of a variant up to {spread:.3f}, "
            "so their order is not a finding."
        )
    return (
        text + f"; the lead over {second.label} is {gap:.3f}, seeds differ by up to {spread:.3f}."
    )


def tiles(record: RunRecord) -> list[Tile]:
    """The numbers at the head of the page: runs, heads on, heads that differ, unused experts."""
    runs, variants = len(record.models), _count(len(record.variants()), "variant")
    found = [Tile(str(runs), f"run{'' if runs == 1 else 's'} of {variants}")]
    shown = representatives(record)
    with_heads = [model for model in shown if model.heads]
    if with_heads:
        model = with_heads[0]
        found.append(Tile(_heads_on(model.heads), f"heads on per token, {model.label}"))
        distance = head_distance(model.heads)
        if distance:
            first, second, value = distance
            found.append(
                Tile(
                    f"{value:.0%}",
                    f"of routed head choices differ between {first} and {second}, {model.label}",
                )
            )
    with_experts = [model.experts for model in shown if model.experts]
    if with_experts:
        unused = total = 0
        for experts in with_experts:
            unused += sum(_never_used(experts))
            total += sum(len(layer) for layer in next(iter(experts.by_domain.values())))
        found.append(Tile(f"{unused} of {total}", "experts of all layers and models never used"))
    return found


def representatives(record: RunRecord) -> list[ModelRecord]:
    """The first run of each variant. Heads and experts of two seeds have nothing in common, so
    their loads are shown for one run and never averaged."""
    return [runs[0] for runs in record.variants().values()]


def head_distance(heads: HeadLoads | None) -> tuple[str, str, float] | None:
    """The first two domains and their `load_distance` over routed heads, mean over layers."""
    if heads is None or len(heads.by_domain) < 2:
        return None
    first, second = list(heads.by_domain)[:2]
    distances = [
        load_distance(heads.routed(first, layer), heads.routed(second, layer))
        for layer in range(len(heads.by_domain[first]))
        if sum(heads.routed(first, layer)) and sum(heads.routed(second, layer))
    ]
    return (first, second, sum(distances) / len(distances)) if distances else None


def _heads_on(heads: HeadLoads | None) -> str:
    layers = [layer for loads in heads.by_domain.values() for layer in loads] if heads else []
    if not layers:
        return "–"
    on, total = sum(map(sum, layers)), sum(map(len, layers))
    if len(set(map(len, layers))) > 1:
        return f"{on / total:.0%}"
    return f"{on / len(layers):.3g} of {total / len(layers):.3g}"


def _never_used(experts: ExpertLoads) -> list[int]:
    """For each layer the experts without a single assignment in any domain."""
    by_layer = zip(*experts.by_domain.values(), strict=True)
    merged = [[sum(loads) for loads in zip(*layers, strict=True)] for layers in by_layer]
    return [round(unused_share(layer) * len(layer)) for layer in merged]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
