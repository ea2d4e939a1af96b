"""A record in a few numbers and sentences; none says more than the runs support."""

from operator import itemgetter
from typing import NamedTuple

from headwise.analysis.measure import load_distance
from headwise.analysis.records import HeadLoads, ModelRecord, RunRecord


class Tile(NamedTuple):
    """A number to look at and what it is."""

    value: str
    caption: str


def headline(record: RunRecord) -> str:
    """One sentence on the losses: the range, and whether the first two differ beyond the seeds.

    Runs that diverged (their last validation loss is not finite) are counted in a second one.
    """
    diverged = sum(bool(x.validation.losses) and x.final_loss() is None for x in record.models)
    return _order(record) + (f" {_count(diverged, 'run')} diverged." if diverged else "")


def _order(record: RunRecord) -> str:
    ends = [
        (runs[0].label, [loss for run in runs if (loss := run.final_loss()) is not None])
        for runs in record.variants().values()
    ]
    ranked = sorted(((sum(x) / len(x), label, x) for label, x in ends if x), key=itemgetter(0))
    if not ranked:
        return f"{_count(len(record.models), 'run')}, none with a validation loss."
    lowest, best, losses = ranked[0]
    if len(ranked) == 1:
        return f"{best} ends at a validation loss of {lowest:.3f} {record.loss_unit}."
    highest, last, _ = ranked[-1]
    text = (
        f"Validation loss at the end lies between {lowest:.3f} ({best}) and "
        f"{highest:.3f} ({last}) {record.loss_unit}"
    )
    next_lowest, second, others = ranked[1]
    gap = next_lowest - lowest
    spread = max(max(x) - min(x) for x in (losses, others))
    if len(losses) == len(others) == 1:
        return text + f"; with one seed each, the order of {best} and {second} is not a finding."
    if len(losses) == 1 or len(others) == 1 or gap <= spread:
        return (
            text + f"; {best} and {second} are {gap:.3f} apart, seeds of a variant up to "
            f"{spread:.3f}, so their order is not a finding."
        )
    return text + f"; the lead over {second} is {gap:.3f}, seeds differ by up to {spread:.3f}."


def tiles(record: RunRecord) -> list[Tile]:
    """The numbers at the head of the page: runs, heads on, heads that differ, unused experts."""
    runs, variants = len(record.models), _count(len(record.variants()), "variant")
    found = [Tile(str(runs), f"run{'' if runs == 1 else 's'} of {variants}")]
    shown = representatives(record)
    for model in [model for model in shown if model.heads][:1]:
        found.append(Tile(_heads_on(model.heads), f"heads on per token, {model.label}"))
        if distance := head_distance(model.heads):
            first, second, value = distance
            what = f"of routed head choices differ between {first} and {second}, {model.label}"
            found.append(Tile(f"{value:.0%}", what))
    never_used = [
        not any(of_domains)
        for model in shown
        if model.experts
        for layer in zip(*model.experts.by_domain.values(), strict=True)
        for of_domains in zip(*layer, strict=True)
    ]
    if never_used:
        counted = f"{sum(never_used)} of {len(never_used)}"
        found.append(Tile(counted, "experts of all layers and models never used"))
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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
