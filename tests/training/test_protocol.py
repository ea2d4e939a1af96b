"""The learning rate of each model: which ones are tried, which one is kept, what diverges."""

import math

import pytest

from headwise.analysis.records import Curve, ModelRecord
from headwise.recipes.lm import LanguageModelRun
from headwise.training.comparison import Training
from headwise.training.protocol import Grid, fair, plain
from headwise.training.record import Trained

RUN = LanguageModelRun(models=("dense", "moh"), seeds=(5, 7), learning_rate=3e-3)


def walked(grid: Grid, losses: dict[float, float], others: float = 0.0) -> list[list[float]]:
    """The rounds of rates that a grid wants, where each comes to its loss, or that and `others`
    with another seed than the first, 0."""
    rounds = []
    while wanted := grid.wanted():
        rounds.append([rate if seed == 0 else (rate, seed) for rate, seed in wanted])
        for rate, seed in wanted:
            grid.losses.setdefault(rate, {})[seed] = losses[rate] + (others if seed else 0)
    return rounds


def test_a_best_rate_in_the_middle_ends_the_search():
    grid = Grid(0.25, [0])
    assert walked(grid, {0.125: 4.0, 0.25: 3.0, 0.5: 3.5}) == [[0.125, 0.25, 0.5]]
    assert grid.best == 0.25


def test_a_grid_widens_to_the_side_of_its_best_rate_until_a_worse_one_follows():
    grid = Grid(0.25, [0])
    losses = {0.125: 4.0, 0.25: 3.0, 0.5: 2.5, 1.0: 2.0, 2.0: math.inf}
    assert walked(grid, losses) == [[0.125, 0.25, 0.5], [1.0], [2.0]]
    assert grid.best == 1.0
    down = {0.5: 4.0, 0.25: 3.0, 0.125: 2.5, 0.0625: 2.6}
    assert walked(Grid(0.25, [0]), down)[1:] == [[0.0625]]


def test_of_equal_rates_the_lowest_is_best():
    grid = Grid(0.25, [0])
    assert walked(grid, {0.0625: 3.1, 0.125: 3.0, 0.25: 3.0, 0.5: 3.0})[1:] == [[0.0625]]
    assert grid.best == 0.125


def test_eight_rates_are_tried_at_most_and_the_best_is_at_the_edge_then():
    grid = Grid(1.0, [0])
    walked(grid, {2.0**n: -float(n) for n in range(-1, 10)})
    assert sorted(grid.losses) == [2.0**n for n in range(-1, 7)]
    assert grid.best == 64.0


def test_rates_that_are_about_as_good_are_tried_with_every_seed_and_the_mean_decides():
    grid = Grid(0.25, [0, 7, 9])
    losses = {0.125: 4.0, 0.25: 3.0, 0.5: 3.01}
    close = [(0.25, 7), (0.25, 9), (0.5, 7), (0.5, 9)]
    assert walked(grid, losses) == [[0.125, 0.25, 0.5], close]
    assert grid.best == 0.25
    # With the other seeds 0.25 is the worse one: the means are 3.04 and 3.01. That is at the edge.
    grid.losses[0.25] |= {7: 3.06, 9: 3.06}
    assert grid.wanted() == [(1.0, 0)]
    grid.losses[1.0] = {0: 3.5}
    assert (grid.best, grid.wanted()) == (0.5, [])


def test_a_rate_that_is_clearly_worse_is_tried_once():
    grid = Grid(0.25, [0, 7])
    assert walked(grid, {0.125: 4.0, 0.25: 3.0, 0.5: 3.02})[1:] == [[(0.25, 7)]]


def test_a_rate_that_diverges_with_another_seed_is_not_the_best():
    grid = Grid(0.25, [0, 7])
    grid.losses = {0.125: {0: 3.01, 7: 3.01}, 0.25: {0: 3.0, 7: math.inf}, 0.5: {0: 4.0}}
    assert grid.best == 0.125
    assert grid.wanted() == [(0.0625, 0)]


class Laboratory:
    """Trains as a formula says: the loss of a model is a parabola in the logarithm of its rate."""

    def __init__(self, best: dict[str, float], highest: float = math.inf):
        self.best, self.highest = best, highest
        self.trained: list[str] = []

    def try_all(self, trainings: list[Training]) -> list[Trained | None]:
        return [self._train(training) for training in trainings]

    def _train(self, training: Training) -> Trained | None:
        self.trained.append(training.name)
        rate = RUN.learning_rate if training.rate is None else training.rate
        if rate > self.highest:
            return None
        loss = 3 + math.log2(rate / self.best[training.variant.name]) ** 2
        record = ModelRecord(
            training.variant.name, training.variant.label, training.seed, Curve([], []),
            Curve([], []), None, None, [], [], None,
        )  # fmt: skip
        row = {"model": training.variant.name, "learning_rate": rate, "validation_loss": loss}
        return Trained(row, record)


def test_each_model_has_its_own_best_rate_with_every_seed():
    laboratory = Laboratory({"dense": 3e-3, "moh": 12e-3})
    outcome = fair(RUN, laboratory.try_all)
    assert [*outcome.trained] == [
        "dense-seed5-lr0.003", "dense-seed7-lr0.003", "moh-seed5-lr0.012", "moh-seed7-lr0.012",
    ]  # fmt: skip
    tried = {name: trained.row["rates_tried"] for name, trained in outcome.trained.items()}
    assert tried["dense-seed7-lr0.003"] == "0.0015 0.003 0.006"
    assert tried["moh-seed5-lr0.012"] == "0.0015 0.003 0.006 0.012 0.024"
    assert sorted((x.row["model"], x.row["learning_rate"]) for x in outcome.tried) == [
        ("dense", 0.0015), ("dense", 0.003), ("dense", 0.003), ("dense", 0.006),
        ("moh", 0.0015), ("moh", 0.003), ("moh", 0.006), ("moh", 0.012), ("moh", 0.012),
        ("moh", 0.024),
    ]  # fmt: skip
    assert len(laboratory.trained) == len(set(laboratory.trained)) == 10, "none is trained twice"


def test_a_rate_at_which_a_model_diverges_is_no_error_and_not_the_best():
    laboratory = Laboratory({"dense": 3e-3, "moh": 12e-3}, highest=7e-3)
    outcome = fair(RUN, laboratory.try_all)
    assert "moh-seed7-lr0.006" in outcome.trained
    assert outcome.trained["moh-seed7-lr0.006"].row["rates_tried"] == "0.0015 0.003 0.006 0.012"


def test_a_model_that_diverges_everywhere_is_named():
    laboratory = Laboratory({"dense": 3e-3, "moh": 3e-3}, highest=1e-9)
    said = r"dense diverged at every .* or another: 4\.6875e-05 .* 0\.006; a lower learning_rate"
    with pytest.raises(FloatingPointError, match=said):
        fair(RUN, laboratory.try_all)


def test_plain_trains_each_once_at_the_rate_of_the_run():
    laboratory = Laboratory({"dense": 1.0, "moh": 1.0})
    outcome = plain(RUN, laboratory.try_all)
    assert [*outcome.trained] == laboratory.trained
    assert laboratory.trained == ["dense-seed5", "dense-seed7", "moh-seed5", "moh-seed7"]
    assert outcome.tried == []
