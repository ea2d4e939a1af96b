"""How a run is computed does not change what it learns: as one, in parts, in bf16, by kernels.

Four seeds of a tiny model. Each seed's losses stay near those of the plain run, and over the seeds
the mean difference is 0 within three times its standard error: no way of computing is biased.
"""

import statistics

import pytest
from outcomes import losses

SEEDS, LATER = 4, 0.02
# No balance loss: each part of a batch balances itself, near the whole's and not equal.
FIELDS = (
    "--models", "moh_mh_moe", "--steps", "12", "--seeds", *map(str, range(SEEDS)),
    "--log-every", "1", "--balance-coefficient", "0",
)  # fmt: skip


@pytest.fixture(scope="module")
def plain(commands, tmp_path_factory) -> list[list[float]]:
    run = tmp_path_factory.mktemp("runs") / "plain"
    commands.run(commands.train(run, *FIELDS))
    return losses(run)


def check_alike(got: list[list[float]], plain: list[list[float]], at_first: float) -> None:
    """`at_first` bounds the first two losses; a choice between near equals moves later ones."""
    assert len(got) == SEEDS
    pairs = zip(got, plain, strict=True)
    differences = [[x - y for x, y in zip(*pair, strict=True)] for pair in pairs]
    assert max(abs(x) for of_seed in differences for x in of_seed[:2]) < at_first
    assert max(abs(x) for of_seed in differences for x in of_seed) < LATER
    means = [statistics.fmean(of_seed) for of_seed in differences]
    error = statistics.stdev(means) / SEEDS**0.5
    assert abs(statistics.fmean(means)) <= 3 * error


def test_another_seed_would_be_noticed(plain):
    difference = [abs(x - y) for x, y in zip(plain[0], plain[1], strict=True)]
    assert max(difference) > 3 * LATER


@pytest.mark.parametrize("size", ["1", "2"])
def test_in_parts(commands, headwise, plain, tmp_path, size):
    headwise(*commands.train(tmp_path / "run", *FIELDS, "--device-batch-size", size))
    check_alike(losses(tmp_path / "run"), plain, 1e-5)


def test_in_bf16(commands, headwise, plain, tmp_path):
    headwise(*commands.train(tmp_path / "run", *FIELDS, "--precision", "bf16"))
    check_alike(losses(tmp_path / "run"), plain, 0.01)


def test_by_kernels(commands, headwise, plain, tmp_path, native_kernels):
    headwise(*commands.train(tmp_path / "run", *FIELDS))
    check_alike(losses(tmp_path / "run"), plain, 1e-5)
