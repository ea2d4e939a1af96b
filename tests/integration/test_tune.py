"""`headwise convert` and `headwise tune` as commands: killed, and by two processes."""

import shlex
from pathlib import Path

import pytest
from killing import LAUNCH, TWO_PROCESSES, kill
from outcomes import weights
from torch.testing import assert_close

from headwise.results.rows import read_csv

ROOT = Path(__file__).parents[2]
NAME = "routed-seed0"
# accelerate shards on accelerators only; told that these CPUs are some, it does the same on them.
AS_ACCELERATORS = """
import runpy
from accelerate.state import PartialState
from accelerate.utils import DistributedType

initialise = PartialState.__init__

def as_accelerators(self, *args, **kwargs):
    initialise(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

PartialState.__init__ = as_accelerators
runpy.run_module("headwise", run_name="__main__")
"""


TINY = shlex.split(
    "--routed.steps 20 --routed.warmup-steps 1 --sequence-length 32 --batch-size 4 --eval-every 10 "
    "--save-every 5 --log-every 5 --eval-blocks 6"
)


@pytest.fixture(scope="module")
def converted(commands, tmp_path_factory) -> Path:
    """A trained tiny model, with 3 of its 4 heads on."""
    path = tmp_path_factory.mktemp("models")
    commands.run(commands.train(path / "run", "--models", "dense", "--steps", "10"))
    trained = path / "run" / "models" / "dense-seed0"
    commands.run(
        ["convert", str(trained), "-o", str(path / "moh"), "--shared", "1", "--active", "3"]
    )
    return path / "moh"


def tune(commands, model: Path, output: Path, *fields: str) -> list[str]:
    return [
        "tune", str(model), "-o", str(output), "--data", str(commands.text), *TINY, *fields,
    ]  # fmt: skip


def perplexities(run: Path) -> list[float]:
    return [float(row["perplexity"]) for row in read_csv(run / "results.csv")]


@pytest.fixture(scope="module")
def whole(commands, converted, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    printed = commands.run(tune(commands, converted, run))
    assert "routed  step 20  perplexity" in printed
    return run


@pytest.mark.long
def test_killed_and_resumed_equals_never_killed(commands, converted, tmp_path, whole):
    run = tmp_path / "killed"
    process = commands.start(tune(commands, converted, run))
    kill(process, when=run / "checkpoints" / NAME / "checkpoint-10")
    assert not (run / "models").exists(), "the run was over before the kill"
    printed = commands.run(tune(commands, converted, run, "--resume"))
    assert "step 5/" not in printed
    assert_close(weights(run, NAME), weights(whole, NAME), rtol=0, atol=0)


@pytest.mark.long
def test_two_processes(commands, converted, tmp_path, whole):
    printed = commands.run(
        tune(commands, converted, tmp_path / "two", "--device-batch-size", "1"),
        launcher=TWO_PROCESSES,
    )
    assert printed.count("step 20/20") == 1
    assert perplexities(tmp_path / "two") == pytest.approx(perplexities(whole), rel=1e-4)


def test_two_processes_with_half_of_the_model_each(commands, converted, tmp_path, whole):
    script = tmp_path / "as_accelerators.py"
    script.write_text(AS_ACCELERATORS)
    config = ("--config_file", str(ROOT / "docs" / "fsdp2.yaml"), "--num_processes", "2")
    printed = commands.run(
        tune(commands, converted, tmp_path / "halves"), launcher=(*LAUNCH, *config), script=script
    )
    assert printed.count("step 20/20") == 1
    checkpoint = tmp_path / "halves" / "checkpoints" / NAME / "checkpoint-20"
    assert (checkpoint / "pytorch_model_fsdp.bin").exists()
    assert perplexities(tmp_path / "halves") == pytest.approx(perplexities(whole), rel=1e-4)
    assert weights(tmp_path / "halves", NAME).keys() == weights(whole, NAME).keys()
