"""Learning rates of the models of a comparison: one for all, or the best for each."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from headwise.errors import DivergedError
from headwise.training.comparison import ComparisonRun, Training
from headwise.training.record import Trained

TrainAll = Callable[[Sequence[Training]], list[Trained]]
TryAll = Callable[[Sequence[Training]], list[Trained | None]]
_FACTOR = 2.0  # between neighbours of a grid
_MOST_RATES = 8
# Losses that differ by less may change places with another seed: in the studies of text at scale
# tiny that of a model deviates by 0.3 % over seeds.
_CLOSE = 1.005


class Outcome(NamedTuple):
    """What the trainings of a comparison came to.

    Attributes:
        trained: Of each model and seed, what is compared, by the names of their files.
        tried: All that was trained to choose learning rates; empty where all models have the run's.
    """

    trained: dict[str, Trained]
    tried: list[Trained]


class Grid:
    """The learning rates that are tried for a model, and what each of them came to.

    At first there are three, neighbours by a factor of 2, with the first seed. It goes on to the
    side of the best one until that has a worse one on either side. Rates that are about as good are
    then tried with every seed, and of these the one with the least mean loss is the best: one seed
    alone would often choose by luck. Eight rates are tried at most.

    Args:
        rate: The middle one of the first three.
        seeds: All seeds of the run.

    Attributes:
        losses: Validation losses by rate and seed; infinite where training diverged.
    """

    def __init__(self, rate: float, seeds: Sequence[int]):
        self._rate, self._seeds = rate, seeds
        self.losses: dict[float, dict[int, float]] = {}

    def wanted(self) -> list[tuple[float, int]]:
        """The rates and seeds to try next; none when the best one is known."""
        first = self._seeds[0]
        if not self.losses:
            return [(self._rate * factor, first) for factor in (1 / _FACTOR, 1, _FACTOR)]
        if not self._is_inside(self._best_of_first()) and len(self.losses) < _MOST_RATES:
            return [(self._beyond(self._best_of_first()), first)]
        if left := [(rate, seed) for rate in self._close() for seed in self._left(rate)]:
            return left
        best = self.best
        if best is None or self._is_inside(best) or len(self.losses) == _MOST_RATES:
            return []
        return [(self._beyond(best), first)]

    @property
    def best(self) -> float | None:
        """Of the rates that were tried with every seed that of the least mean loss; of equals the
        lowest. None where each diverged with one seed or another."""
        means = {
            rate: fmean(self.losses[rate].values())
            for rate in sorted(self.losses)
            if not self._left(rate)
        }
        best = min(means, key=means.__getitem__, default=None)
        return None if best is None or math.isinf(means[best]) else best

    def _best_of_first(self) -> float:
        """With the first seed; of equals the lowest."""
        return min(sorted(self.losses), key=lambda rate: self.losses[rate][self._seeds[0]])

    def _close(self) -> list[float]:
        """Rates that are about as good as the best, with the first seed; none that diverged."""
        losses = {rate: by_seed[self._seeds[0]] for rate, by_seed in self.losses.items()}
        least = min(losses.values())
        return [rate for rate in sorted(losses) if losses[rate] <= least * _CLOSE < math.inf]

    def _left(self, rate: float) -> list[int]:
        return [seed for seed in self._seeds if seed not in self.losses[rate]]

    def _is_inside(self, rate: float) -> bool:
        return min(self.losses) < rate < max(self.losses)

    def _beyond(self, rate: float) -> float:
        """The next rate on the side of one that is at the edge."""
        return rate * _FACTOR if rate == max(self.losses) else rate / _FACTOR


def plain(run: ComparisonRun, train_all: TrainAll) -> Outcome:
    """All models and seeds at the run's learning rate."""
    trainings = [Training(v, seed) for v in run.selected() for seed in run.seeds]
    names = [training.name for training in trainings]
    return Outcome(dict(zip(names, train_all(trainings), strict=True)), [])


def fair(run: ComparisonRun, try_all: TryAll) -> Outcome:
    """Each model at the learning rate that is best for it by the validation loss, as `Grid` says.

    Args:
        run: The comparison.
        try_all: Trains; for a rate that is too high it gives None.

    Raises:
        FloatingPointError: If a model diverges at every rate, with one seed or another.
    """
    variants = run.selected()
    grids = {variant.name: Grid(run.learning_rate, run.seeds) for variant in variants}
    tried: dict[str, Trained] = {}
    while wanted := [(v, seed, rate) for v in variants for rate, seed in grids[v.name].wanted()]:
        results = try_all([Training(*each) for each in wanted])
        for (variant, seed, rate), result in zip(wanted, results, strict=True):
            loss = math.inf if result is None else result.row["validation_loss"]
            grids[variant.name].losses.setdefault(rate, {})[seed] = loss
            if result is not None:
                tried[Training(variant, seed, rate).name] = result
    trained = {}
    for variant in variants:
        grid = grids[variant.name]
        rates = " ".join(f"{rate:g}" for rate in sorted(grid.losses))
        if grid.best is None:
            raise DivergedError(
                f"{variant.name} diverged at every learning rate that was tried, with one seed or "
                f"another: {rates}; a lower learning_rate or a longer warmup often helps"
            )
        for name in (Training(variant, seed, grid.best).name for seed in run.seeds):
            row, record = tried[name]
            trained[name] = Trained(row | {"rates_tried": rates}, record)
    return Outcome(trained, [*tried.values()])
