"""Killed as it is about to change a file, again and again: the same as never killed."""

import shlex
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from killing import Killer, kill_a_worker
from outcomes import rows_but
from safetensors.torch import load_file
from torch.testing import assert_close

pytestmark = pytest.mark.long

rows = partial(rows_but, measured=("per_second", "tokens_per_second"))
TRAINING = "--steps 5 --save-every 2 --eval-every 4 --log-every 1 --warmup-steps 1 --batch-size 2"
TEXT = f"{TRAINING} --dim 16 --num-heads 4 --num-layers 2 --mlp-dim 24 --vocab-size 300 " + (
    "--sequence-length 16 --eval-blocks-per-file 1"
)
COMMANDS = {
    "lm": f"train lm {TEXT} --models dense moh_mh_moe",
    "experiment": f"experiment combined {TEXT} --models moh --seeds 0 1 --workers 1",
}
TUNING = (
    "--dense.steps 2 --dense.warmup-steps 1 --routed.steps 5 --routed.warmup-steps 1 "
    "--save-every 2 --eval-every 4 --sequence-length 16 --batch-size 2 --eval-blocks 2"
)


def check_equal(killed: Path, whole: Path) -> None:
    assert rows(killed) == rows(whole)
    assert not list(killed.rglob(".*partial*"))
    paths = [path.relative_to(whole) for path in whole.rglob("models/*/*.safetensors")]
    assert paths
    for path in paths:
        assert_close(load_file(killed / path), load_file(whole / path), rtol=0, atol=0)


@pytest.mark.parametrize("name", COMMANDS)
def test_training_on_text(commands, tmp_path, name):
    data = ["--data", str(commands.text)]
    kill_and_compare([*shlex.split(COMMANDS[name]), *data, "--output"], tmp_path)


def test_training_on_images(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    vit = shlex.split(f"train vit {TRAINING} --eval-images 10")
    kill_and_compare([*vit, "--models", "dense", "--output"], tmp_path, every=16)
    if find_spec("diffusers"):
        classifier = tmp_path / "whole" / "models" / "dense-seed0"
        dit = shlex.split(f"train dit {TRAINING} --models moh_75 --samples 2 --sampling-steps 2")
        dit += ["--classifier", str(classifier), "--output"]
        kill_and_compare(dit, tmp_path / "drawing", every=16)


def test_a_worker_that_trains_on_images(commands, tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    models = "--models dense --seeds 0 1 --workers 2 --steps 24 --eval-images 10"
    vit = shlex.split(f"train vit {TRAINING} {models}")
    commands.run([*vit, "--output", str(whole)])
    process = commands.start([*vit, "--output", str(killed)])
    kill_a_worker(process, when=killed / "checkpoints" / "dense-seed0" / "checkpoint-4")
    commands.run([*vit, "--output", str(killed), "--resume"])
    check_equal(killed, whole)


def test_tuning(commands, tmp_path):
    dense, converted = tmp_path / "lm" / "models" / "dense-seed0", tmp_path / "converted"
    killer, data = Killer(tmp_path / "lm", tmp_path / "log"), ["--data", str(commands.text)]
    train = shlex.split(f"train lm {TEXT} --models dense")
    assert killer.run([*train, *data, "--output", str(tmp_path / "lm")])
    heads = ["--shared", "1", "--active", "3"]
    assert Killer(converted, killer.log).run(["convert", str(dense), "-o", str(converted), *heads])
    kill_and_compare(["tune", str(converted), *shlex.split(TUNING), *data, "-o"], tmp_path)


def kill_and_compare(arguments: list[str], directory: Path, every: int = 3) -> None:
    directory.mkdir(exist_ok=True)
    whole, killed = directory / "whole", directory / "killed"
    assert Killer(whole, directory / "log").run([*arguments, str(whole)])
    kills = Killer(killed, directory / "log").run_to_its_end([*arguments, str(killed)], every)
    assert kills > 2
    check_equal(killed, whole)
