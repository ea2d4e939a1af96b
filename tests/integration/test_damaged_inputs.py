"""Models and data with a damaged file: a line that names it, and nothing lost."""

import json
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from datasets import Dataset

from damage import Damage, contents, damaged_copy, damages, two_fifths, wrong_values
from fuzz_inputs import LINES, write_models
from headwise.cli import main

# Without one of these nothing can be read; the others only say more of a model, or more text.
NEEDED = (
    "config.json", "model.safetensors", "a.txt", "a.parquet", "images.parquet", "a.mixture.json",
    "piqa.json",
)  # fmt: skip
GONE = {"removed", "emptied", "halved", "a directory"}
TUNED = (
    "--sequence-length 8 --batch-size 2 --routed.steps 1 --routed.warmup-steps 0 --eval-blocks 1"
)
TRAINED = (
    "--dim 16 --num-heads 2 --num-layers 1 --mlp-dim 32 --vocab-size 300 --sequence-length 8 "
    "--batch-size 2 --steps 1 --warmup-steps 0 --eval-blocks-per-file 1 --models dense"
)
# The directory that is damaged, and what reads it (here); all lie in `saved`.
OF_MODELS = {
    "generate": ("dense", "generate {here} --prompt a"),
    "write-text": ("dense", "write-text {here} -o {new}/a.parquet --count 2 --length 3"),
    "convert": ("dense", "convert {here} -o {new}/a"),
    "generate converted": ("converted", "generate {here} --prompt a"),
    "tune": ("converted", f"tune {{here}} -o {{new}}/a --data {{saved}}/text/a.txt {TUNED}"),
    "draw": ("dit", "draw {here} -o {new}/a.png --steps 1"),
    "eval": ("vit", "eval {here} --images {saved}/images"),
}
OF_DATA = {
    "tune on text": (
        "text", f"tune {{saved}}/converted -o {{new}}/a --data {{here}}/a.txt {TUNED}",
    ),
    "tune on tokens": (
        "tokens", f"tune {{saved}}/converted -o {{new}}/a --data {{here}}/a.parquet {TUNED}",
    ),
    "convert by tokens": (
        "tokens", "convert {saved}/dense -o {new}/a --calibrate {here}/a.parquet",
    ),
    "train on domains": (
        "domains", f"train multilingual --data {{here}} --output {{new}}/a {TRAINED}",
    ),
    "train on a mixture": (
        "mixture", f"train lm --data {{here}}/a.mixture.json --output {{new}}/a {TRAINED}",
    ),
    "eval on images": ("images", "eval {saved}/vit --images {here}"),
    "eval on a table": ("table", "eval {saved}/vit --images {here}/images.parquet"),
    "eval on documents": ("documents", "eval {saved}/dense --tasks piqa --data {here}"),
}  # fmt: skip
COMMANDS = OF_MODELS | OF_DATA


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """One tiny model of each kind, and each kind of data."""
    root = tmp_path_factory.mktemp("saved")
    write_models(root)
    for name in ("text", "tokens", "mixture", "table", "documents", "domains/one", "domains/two"):
        (root / name).mkdir(parents=True)
    for name in ("text", "domains/one", "domains/two"):
        (root / name / "a.txt").write_text(LINES)
    rows = Dataset.from_dict({"input_ids": [[3] * 16] * 30})
    rows.to_parquet(str(root / "tokens" / "a.parquet"))
    source = {"dataset": "text", "data_files": str(root / "text" / "a.txt")}
    (root / "mixture" / "a.mixture.json").write_text(json.dumps([source]))
    images = [{"bytes": file.read_bytes()} for file in sorted((root / "images").rglob("*.png"))]
    rows = Dataset.from_dict({"image": images, "label": [0, 1]})
    rows.to_parquet(str(root / "table" / "images.parquet"))
    question = "Please choose the correct solution to the question: a\n\n"
    choices = "Solution1: b\n\nSolution2: c\n\nAnswer format: solution1/solution2"
    asked = {"instruction": question + choices, "answer": "solution1"}
    (root / "documents" / "piqa.json").write_text(json.dumps([asked] * 2))
    return root


class Ends:
    """Runs the commands; the status of each, and what it wrote to stderr."""

    def __init__(self, saved: Path, new: Path, capsys: pytest.CaptureFixture):
        self.saved, self.new, self.capsys = saved, new, capsys

    def run(self, command: str, here: Path) -> tuple[int, str]:
        shutil.rmtree(self.new, ignore_errors=True)
        self.new.mkdir()
        self.capsys.readouterr()
        line = COMMANDS[command][1].format(here=here, saved=self.saved, new=self.new)
        status = 0
        try:
            main(shlex.split(line))
        except SystemExit as end:
            status = int(end.code or 0)
        return status, self.capsys.readouterr().err

    def faults(self, command: str, cases: Iterable[Damage]) -> list[str]:
        """What went otherwise than it should, a line a case."""
        found = []
        for file, how, damage in cases:
            directory = self.saved / COMMANDS[command][0]
            copy = damaged_copy(directory, self.saved / "copy", file, damage)
            before = contents(copy)
            status, said = self.run(command, copy)
            fine = status == 0 or (
                status in (1, 2)
                and said.startswith("headwise: ")
                and said.count("\n") == 1
                # Where a mixture's words are others, its source is named.
                and (str(copy) in said or "source 'text'" in said)
                and not any(self.new.iterdir())
            )
            gone = file in NEEDED and how in GONE - ({"halved"} if file == "a.txt" else set())
            if not fine or (gone and status == 0) or contents(copy) != before:
                found.append(f"{file} {how}: {status} {said[:300]}")
        return found


@pytest.fixture
def ends(saved, tmp_path, capsys) -> Ends:
    return Ends(saved, tmp_path / "new", capsys)


HAVE_CONFIGS = ("generate", "convert", "generate converted", "draw", "eval")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_file_is_named_and_nothing_lost(saved, ends, command):
    directory = saved / COMMANDS[command][0]
    status, said = ends.run(command, directory)
    assert status == 0, said
    assert ends.faults(command, two_fifths(damages(directory))) == []


@pytest.mark.parametrize("command", HAVE_CONFIGS)
def test_a_wrong_value_in_a_config_is_laid_to_the_directory(saved, ends, command):
    cases = wrong_values(saved / COMMANDS[command][0] / "config.json")
    assert ends.faults(command, two_fifths(cases)) == []


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_all_damages(saved, ends, command):
    assert ends.faults(command, damages(saved / COMMANDS[command][0])) == []


@pytest.mark.long
@pytest.mark.parametrize("command", HAVE_CONFIGS)
def test_all_wrong_values(saved, ends, command):
    cases = wrong_values(saved / COMMANDS[command][0] / "config.json")
    assert ends.faults(command, cases) == []
