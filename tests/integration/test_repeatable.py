"""One seed, one result: run twice, killed and resumed, and by two processes."""

from functools import partial
from pathlib import Path

import pytest
from killing import TWO_PROCESSES, kill
from outcomes import losses
from outcomes import weights as weights_of
from torch.testing import assert_close

STEPS = 60
FIELDS = ("--models", "moh_mh_moe", "--steps", str(STEPS))
NAME = "moh_mh_moe-seed0"
weights = partial(weights_of, name=NAME)


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    commands.run(commands.train(run, *FIELDS))
    return run


def test_two_runs_with_a_seed_are_equal(commands, tmp_path, whole, headwise):
    headwise(*commands.train(tmp_path / "again", *FIELDS))
    assert_close(weights(tmp_path / "again"), weights(whole), rtol=0, atol=0)
    assert losses(tmp_path / "again") == losses(whole)


def test_killed_and_resumed_equals_never_killed(commands, tmp_path, whole):
    run = tmp_path / "killed"
    process = commands.start(commands.train(run, *FIELDS))
    kill(process, when=run / "checkpoints" / NAME / "checkpoint-20")
    assert not (run / "models").exists(), "the run was over before the kill"
    printed = commands.run(commands.train(run, *FIELDS, "--resume"))
    assert "step 5/" not in printed
    assert f"step {STEPS}/{STEPS}" in printed
    assert_close(weights(run), weights(whole), rtol=0, atol=0)
    assert losses(run) == losses(whole)


def test_killed_before_the_first_checkpoint(commands, tmp_path, whole, headwise):
    run = tmp_path / "killed"
    process = commands.start(commands.train(run, *FIELDS))
    kill(process, when=run / "run.json")
    assert not (run / "checkpoints" / NAME / "checkpoint-10").exists()
    headwise(*commands.train(run, *FIELDS, "--resume"))
    assert_close(weights(run), weights(whole), rtol=0, atol=0)


def test_two_processes_train_one_set_of_models(commands, tmp_path, whole):
    run = tmp_path / "two"
    printed = commands.run(commands.train(run, *FIELDS), launcher=TWO_PROCESSES)
    assert printed.count(f"step {STEPS}/{STEPS}") == 1
    states = (run / "checkpoints" / NAME / f"checkpoint-{STEPS}").glob("rng_state_*.pth")
    assert len(list(states)) == 2
    # Each process balances its own half of the batch: near, not equal.
    (got,), (want,) = losses(run), losses(whole)
    assert got == pytest.approx(want, abs=0.01)


def test_several_processes_refuse_several_workers(commands, tmp_path):
    arguments = commands.train(tmp_path / "run", *FIELDS, "--workers", "2")
    process = commands.start(arguments, launcher=TWO_PROCESSES)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "workers is 2, and there are 2 processes" in printed
    assert not (tmp_path / "run").exists()
