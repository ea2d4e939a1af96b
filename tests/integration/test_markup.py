"""Prompts, paths and names in brackets, which rich's markup would end a command at."""

import json

NAME = "[INST] x[/b]"


def joined(printed: str) -> str:
    """Without the spaces and ends of lines at which paths are broken."""
    return "".join(printed.split())


def test_brackets_anywhere_are_text(headwise, commands, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / NAME
    fields = ("--steps", 1, "--models", "dense", "moh", "--sample-prompt", "a[/INST]")
    printed = headwise(*commands.train(run, *map(str, fields)), "--speed-contexts")
    assert "continues 'a[/INST]'" in printed
    assert joined(f"{NAME}/report.html") in joined(printed)
    model = run / "models" / "dense-seed0"
    question = {
        "instruction": "Answer the question: [/b]?\n\nAnswer format: true/false", "answer": "true",
    }  # fmt: skip
    (run / "boolq.json").write_text(json.dumps([question]))
    converted, written, tuned = (
        tmp_path / f"{NAME} {i}{end}" for i, end in enumerate(("", ".parquet", ""))
    )
    assert joined(NAME) in joined(headwise("convert", model, "-o", converted))
    assert joined(NAME) in joined(
        headwise("write-text", model, "-o", written, "--count", 20, "--length", 64)
    )
    small = ("--sequence-length", 64, "--batch-size", 2, "--eval-blocks", 1)
    stage = ("--routed.steps", 1, "--routed.warmup-steps", 0)
    assert joined(NAME) in joined(
        headwise("tune", converted, "-o", tuned, "--data", written, *small, *stage)
    )
    scored = ("--tasks", "boolq_no_passage", "--data", run, "-o", tmp_path / f"{NAME} eval")
    assert joined(NAME) in joined(headwise("eval", model, *scored))
