"""Whether groups of documents load heads differently, or chance would do as much."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Shares of variance that differ by less are equal: sums in another order round otherwise.
_ROUNDING = 1e-12
_NUMBERS_AT_A_TIME = 2**20


@dataclass(frozen=True)
class Difference:
    """How loads of some heads or experts differ between groups of documents.

    Attributes:
        statistic: Variance of the loads that lies between the groups, summed over the candidates.
        by_chance: What it is on average where the groups are dealt out at random.
        total: Variance of the loads between documents, summed over the candidates; the most that
            the statistic can be.
        p_value: How probable chance makes a statistic as large.
    """

    statistic: float
    by_chance: float
    total: float
    p_value: float


@dataclass(frozen=True)
class LayerDifference(Difference):
    """That of one layer, whose candidates are heads or experts.

    The p-value of the layer is not corrected for the number of layers.

    Attributes:
        effects: Of each candidate, the highest mean load of a group minus the lowest, in percentage
            points.
        p_values: Of each candidate, corrected for the number of candidates in all layers.
    """

    effects: list[float]
    p_values: list[float]

    def __post_init__(self) -> None:
        if len(self.effects) != len(self.p_values):
            raise ValueError(
                f"effects has {len(self.effects)} entries, p_values {len(self.p_values)}"
            )


@dataclass(frozen=True)
class GroupDifference:
    """How loads differ between groups of documents.

    Attributes:
        documents: How many each group has.
        permutations: How often the groups were dealt out anew.
        over_all: Of all layers together.
        layers: Of each layer.
    """

    documents: dict[str, int]
    permutations: int
    over_all: Difference
    layers: list[LayerDifference]

    def candidates(self) -> list[int]:
        """Heads or experts of each layer."""
        return [len(layer.effects) for layer in self.layers]


def permutation_test(
    loads: Sequence[Floats],
    groups: Sequence[str],
    *,
    weights: Sequence[float] | NDArray[Any] | None = None,
    permutations: int = 9_999,
    seed: int = 0,
) -> GroupDifference:
    """Whether the loads of heads or experts differ between groups by more than chance.

    With w_d the share of document d in all weights, x_dh its load of head h, W_g the sum of w_d
    over the documents of group g, m_gh its mean load and m_h that of all documents:

        statistic = sum over h of B_h,   B_h = sum over g of W_g · (m_gh - m_h)²
        total     = sum over h of T_h,   T_h = sum over d of w_d · (x_dh - m_h)²
        p         = (1 + number of permutations with at least the observed statistic)
                    / (1 + number of permutations)

    A permutation deals the groups out anew over whole documents, because tokens of a document are
    not independent. A head's p-value compares its B_h / T_h with the largest of all heads in each
    permutation, so that 5 % of models without any difference have a head at p ≤ 0.05. A head whose
    load is the same in all documents, as a shared head's, has B_h / T_h = 0. Ties count.

    **Source**: the sums of squares of PERMANOVA (Anderson, Austral Ecology 26, 2001), here
    weighted; p-values as Phipson and Smyth, arXiv 1603.05766; correction by the maximum as
    Westfall and Young, Resampling-Based Multiple Testing (1993), in a single step.

    Args:
        loads: For each layer [documents, heads], or experts; in 0..1.
        groups: Of each document, its domain or class.
        weights: Of each document, its tokens, so that a group's mean is that over its tokens.
            Default: all weigh the same.
        permutations: How many; the least p-value is 1 / (permutations + 1).
        seed: Of the permutations. The same seed gives the same result, in whatever order the
            documents are.

    Raises:
        ValueError: If there are fewer than two groups or a group has one document; if loads,
            groups and weights do not fit each other, a load is not finite or a weight not above 0;
            if permutations is below 1.

    Example (worked by hand): one head, group a with loads 0.1 and 0.3, b with 0.5 and 0.7. The
    means are 0.2 and 0.6, that of all is 0.4: B = 0.04 of T = 0.05, an effect of 40 percentage
    points. Of the six ways to deal out two a and two b, this one and its mirror image reach that:
    p is 1/3, but for the drawing.
    """
    documents = _documents_of(groups)
    if permutations < 1:
        raise ValueError(f"permutations is {permutations}; it must be at least 1")
    x, w = _checked(loads, len(groups), weights)
    # In an order that depends on the documents alone.
    canonical = np.lexsort((*x.T, w))
    weighed, x = _centred(x[canonical], w[canonical])
    place = {group: place for place, group in enumerate(documents)}
    by_group = np.argsort([place[groups[i]] for i in canonical], kind="stable")
    parts = _Parts(
        starts=np.cumsum([0, *documents.values()])[:-1],
        sizes=np.array([layer.shape[1] for layer in loads]),
    )
    observed, effects = _between(weighed[None, by_group], parts)
    total = _by_part(weighed[:, -1] @ x**2, parts)
    orders = _orders(len(x), permutations, weighed.shape[1], seed)
    permuted = (_between(weighed[order], parts)[0] for order in orders)
    tally = _tally(observed[0], permuted, total, first_head=1 + len(loads))
    p_values, of_heads = ((1 + n) / (1 + permutations) for n in (tally.reached, tally.largest))
    columns = zip(observed[0], tally.sums / permutations, total, p_values, strict=True)
    over_all, *rest = (Difference(*map(float, column)) for column in columns)
    ends = np.cumsum(parts.sizes)
    layers = [
        LayerDifference(
            **asdict(of_layer),
            effects=(100 * effects[0, heads]).tolist(),
            p_values=of_heads[heads].tolist(),
        )
        for of_layer, heads in zip(rest, map(slice, ends - parts.sizes, ends), strict=False)
    ]
    return GroupDifference(documents, permutations, over_all, layers)


class _Parts(NamedTuple):
    """Where each group begins among the documents, and how many heads each layer has."""

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]


class _Tally(NamedTuple):
    """In how many permutations a part, as `_by_part` has them, was as large as observed; for each
    head, in how many the largest of all heads was; sums of the statistics."""

    reached: Floats
    largest: Floats
    sums: Floats


def _tally(
    observed: Floats, permuted: Iterable[Floats], total: Floats, *, first_head: int
) -> _Tally:
    most = _shares(observed, total) - _ROUNDING
    reached, sums, largest = (np.zeros_like(x) for x in (total, total, total[first_head:]))
    for variance in permuted:
        shares = _shares(variance, total)
        reached += (shares >= most).sum(0)
        largest += (shares[:, first_head:].max(1, keepdims=True) >= most[first_head:]).sum(0)
        sums += variance.sum(0)
    return _Tally(reached, largest, sums)


def _centred(x: Floats, w: Floats) -> tuple[Floats, Floats]:
    """Loads less their mean: times their share of the weights, which is the last column; as is."""
    w = w / w.sum()
    x = x - w @ x
    x[:, np.ptp(x, axis=0) == 0] = 0  # exactly, whatever the mean was rounded to
    return np.column_stack([w[:, None] * x, w]), x


def _between(weighed: Floats, parts: _Parts) -> tuple[Floats, Floats]:
    """Variance between the groups, which follow each other, as `_by_part`; effects of the heads.

    Of [permutations, documents, heads + 1], as `_centred` gives them.
    """
    sums = np.stack([np.add.reduceat(rows, parts.starts) for rows in weighed])
    weights = sums[..., -1:]
    means = sums[..., :-1] / weights
    return _by_part((weights * means**2).sum(1), parts), np.ptp(means, axis=1)


def _by_part(of_heads: Floats, parts: _Parts) -> Floats:
    """Sums over all heads, over those of each layer, and the heads, [..., 1 + layers + heads]."""
    of_layers = np.add.reduceat(of_heads, np.cumsum(parts.sizes) - parts.sizes, axis=-1)
    return np.concatenate([of_heads.sum(-1, keepdims=True), of_layers, of_heads], axis=-1)


def _shares(variance: Floats, total: Floats) -> Floats:
    """0 where nothing varies."""
    return np.divide(variance, total, out=np.zeros_like(variance), where=total > 0)


def _orders(
    documents: int, permutations: int, columns: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """Random orders of the documents, as many at a time as memory is meant for, [·, documents]."""
    generator = np.random.default_rng(seed)
    at_a_time = max(1, _NUMBERS_AT_A_TIME // (documents * columns))
    for done in range(0, permutations, at_a_time):
        count = min(at_a_time, permutations - done)
        yield generator.permuted(np.tile(np.arange(documents), (count, 1)), axis=1)


def _documents_of(groups: Sequence[str]) -> dict[str, int]:
    """Documents of each group, by name."""
    documents = dict(sorted(Counter(groups).items()))
    if len(documents) < 2:
        raise ValueError(f"groups names {list(documents)}; there must be two or more to compare")
    for group, count in documents.items():
        if count < 2:
            raise ValueError(f"groups has one document of {group!r}; each group must have two")
    return documents


def _checked(
    loads: Sequence[Floats], documents: int, weights: Sequence[float] | NDArray[Any] | None
) -> tuple[Floats, Floats]:
    """Loads of all layers side by side, and the weights."""
    if not loads:
        raise ValueError("loads is empty; it must hold at least one layer")
    for layer, values in enumerate(loads):
        if values.ndim != 2 or len(values) != documents or not values.size:
            raise ValueError(
                f"loads[{layer}] is {list(values.shape)}; groups has {documents} documents, so it "
                f"must be [{documents}, heads]"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"loads[{layer}] holds values that are not finite")
    w = np.ones(documents) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (documents,):
        raise ValueError(f"weights is {list(w.shape)}; it must be [{documents}], as groups")
    if not (w > 0).all() or not math.isfinite(w.sum()):
        raise ValueError(f"weights has entries down to {w.min()}; all must be above 0 and finite")
    return np.concatenate(loads, axis=1, dtype=np.float64), w
