"""A record in a few numbers and sentences; none says more than the runs support."""

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from headwise.analysis.measure import load_distance
from headwise.analysis.permutation import Difference, GroupDifference
from headwise.analysis.records import HeadLoads, ModelRecord, RunRecord

_SMALL_P = 0.05


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


def differences(
    tested: Sequence[GroupDifference], layers: Sequence[int], *, candidate: str, unit: str
) -> list[str]:
    """Sentences: whether domains load heads or experts differently, beyond chance.

    Args:
        tested: Of the runs of a variant; the first is told of in full.
        layers: Indices of the layers that were tested.
        candidate: What they choose from, "head" or "expert".
        unit: What a document is, "document" or "image".
    """
    if not tested:
        return []
    first, *others = tested
    others_p = ", ".join(_p(other.over_all) for other in others)
    of_layers = zip(layers, first.layers, strict=True)
    documents = ", ".join(f"{name} {count:,}" for name, count in first.documents.items())
    return [
        f"{_verdict(first.over_all, candidate)}, over all layers {_p(first.over_all)}: "
        f"{_of_variance(first.over_all, unit)}.",
        f"By layer: {', '.join(f'{layer} {_p(found)}' for layer, found in of_layers)}.",
        _alone(first, layers, candidate),
        *([f"Other seeds, over all layers: {others_p}."] if others else []),
        f"p: how often chance does as much, by {first.permutations:,} permutations of the domains "
        f"of whole {unit}s ({documents}); that of a layer is not corrected for the number of "
        f"layers, that of one {candidate} is for the number of {candidate}s.",
    ]


def _verdict(found: Difference, candidate: str) -> str:
    if found.p_value <= _SMALL_P:
        return f"The {candidate}s differ between the domains beyond chance"
    return f"No difference of the {candidate}s between the domains is found beyond chance"


def _p(found: Difference) -> str:
    return f"p = {found.p_value:.2g}"


def _of_variance(found: Difference, unit: str) -> str:
    if not found.total:
        return f"their loads are the same in all {unit}s"
    share, by_chance = (100 * x / found.total for x in (found.statistic, found.by_chance))
    return (
        f"{share:.1f} % of the variance of loads between {unit}s lies between the domains "
        f"({found.statistic:.3g} of {found.total:.3g}), {by_chance:.1f} % by chance"
    )


def _alone(found: GroupDifference, layers: Sequence[int], candidate: str) -> str:
    """How many heads differ by themselves, and which does most."""
    ranked = sorted(
        (
            (effect, layer, head)
            for layer, in_layer in zip(layers, found.layers, strict=True)
            for head, (effect, p) in enumerate(
                zip(in_layer.effects, in_layer.p_values, strict=True)
            )
            if p <= _SMALL_P
        ),
        reverse=True,
    )
    every = _count(sum(found.candidates()), candidate)
    text = f"Differ by themselves, at p ≤ {_SMALL_P} corrected: {len(ranked)} of {every}"
    if not ranked:
        return f"{text}."
    effect, layer, head = ranked[0]
    return (
        f"{text}, most of all {candidate} {head} of layer {layer}, by {effect:.1f} percentage "
        "points."
    )


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
