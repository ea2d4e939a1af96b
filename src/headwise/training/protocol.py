"""Learning rates of the models of a comparison: one for all, or the best for each."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from headwise.errors import DivergedError
from headwise.training.comparison import ComparisonRun, Training
from headwise.training.record import Trained

TrainAll = Callable[[Sequence[Training]], list[Trained]]
TryAll = Callable[[Sequence[Training]], list[Trained | None]]
_FACTOR = 2.0  # between neighbours of a grid
_MOST_RATES = 8


class Outcome(NamedTuple):
    """What the trainings of a comparison came to.

    Attributes:
        trained: Of each model and seed, what is compared, by the names of their files.
        tried: Of each model and learning rate with the first seed; empty where all have the run's.
    """

    trained: dict[str, Trained]
    tried: list[Trained]


class Grid:
    """The learning rates that are tried for a model, and what each of them came to.

    At first there are three, neighbours by a factor of 2. It goes on to the side of the best one
    until that has a worse one on either side, or eight are tried.

    Attributes:
        losses: Of each rate that was tried, the validation loss; infinite where training diverged.
    """

    def __init__(self, rate: float):
        self._first = [rate / _FACTOR, rate, rate * _FACTOR]
        self.losses: dict[float, float] = {}

    def wanted(self) -> list[float]:
        """The rates to try next; none when the best one is known."""
        if not self.losses:
            return self._first
        if self.is_inside or len(self.losses) == _MOST_RATES:
            return []
        return [self.best * _FACTOR if self.best == max(self.losses) else self.best / _FACTOR]

    @property
    def best(self) -> float:
        """The rate of the least loss; of equals the lowest."""
        return min(sorted(self.losses), key=self.losses.__getitem__)

    @property
    def is_inside(self) -> bool:
        """Whether a lower and a higher rate than the best one were tried."""
        return min(self.losses) < self.best < max(self.losses)


def plain(run: ComparisonRun, train_all: TrainAll) -> Outcome:
    """All models and seeds at the run's learning rate."""
    trainings = [Training(v, seed) for v in run.selected() for seed in run.seeds]
    return Outcome(_by_name(trainings, train_all(trainings)), [])


def fair(run: ComparisonRun, train_all: TrainAll, try_all: TryAll) -> Outcome:
    """Each model at the learning rate whose validation loss is the least with the first seed.

    Args:
        run: The comparison.
        train_all: Trains.
        try_all: Trains with rates that may be too high: for those it gives None.

    Raises:
        FloatingPointError: If a model diverges at every rate, or with another seed at its best one.
    """
    variants, first = run.selected(), run.seeds[0]
    grids = {variant.name: Grid(run.learning_rate) for variant in variants}
    tried: list[Trained] = []
    while wanted := [(v, rate) for v in variants for rate in grids[v.name].wanted()]:
        results = try_all([Training(variant, first, rate) for variant, rate in wanted])
        for (variant, rate), result in zip(wanted, results, strict=True):
            loss = math.inf if result is None else result.row["validation_loss"]
            grids[variant.name].losses[rate] = loss
        tried += [result for result in results if result is not None]
    for variant in variants:
        rates = grids[variant.name].losses
        if math.isinf(min(rates.values())):
            raise DivergedError(
                f"{variant.name} diverged at every learning rate that was tried: "
                f"{_in_words(rates)}; a lower learning_rate or a longer warmup often helps"
            )
    # Those of the first seed are finished already.
    chosen = [Training(v, seed, grids[v.name].best) for v in variants for seed in run.seeds]
    trained = [
        Trained(result.row | {"rates_tried": _in_words(grids[variant.name].losses)}, result.record)
        for (variant, *_), result in zip(chosen, train_all(chosen), strict=True)
    ]
    return Outcome(_by_name(chosen, trained), tried)


def _by_name(trainings: list[Training], trained: list[Trained]) -> dict[str, Trained]:
    return {x.name: result for x, result in zip(trainings, trained, strict=True)}


def _in_words(rates: Iterable[float]) -> str:
    return " ".join(f"{rate:g}" for rate in sorted(rates))
