"""README's word: its code and its commands run, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from headwise.cli import main
from processes import run_python
from tiny import RUN, flags

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALLER = {
    # Dense and MoH are timed at two lengths, which would take a minute.
    "train lm": flags(data="text.txt", steps=2, speed_contexts=32, **RUN),
    "train vit": shlex.split("--steps 2 --warmup-steps 0 --batch-size 8"),
    # The classifier is what the line before it trained.
    "train dit": shlex.split(
        "--steps 2 --warmup-steps 0 --batch-size 8 --samples 1 --sampling-steps 2 "
        "--classifier runs/vit/models/dense-seed0"
    ),
    "write-text": shlex.split("--count 4 --length 16"),
    "tune": shlex.split(
        "--data text.txt --routed.steps 1 --routed.warmup-steps 0 --sequence-length 16 "
        "--batch-size 2 --eval-blocks 2"
    ),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """README's calls of `headwise`, without their first word."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("headwise ")]


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: f"{len(block)} characters")
def test_readmes_code_runs(block, tmp_path):
    run_python(block, cwd=tmp_path)


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.skipif(not commands(), reason="README.md has no line in a bash block with headwise")
def test_readmes_commands_run(tmp_path, monkeypatch, capsys, verbosity):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(500)))
    for command in commands():
        kind = " ".join(command[: 1 + (command[0] == "train")])
        main([*command, *SMALLER.get(kind, [])])
        assert capsys.readouterr().out


def test_readmes_links_lead_to_files():
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []
