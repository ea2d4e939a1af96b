"""Dense against routed heads after training: gated, timed at short contexts, said and kept."""

import copy
import dataclasses

import pytest
import torch
import transformers

import headwise
from headwise.analysis.records import from_json
from headwise.analysis.report import render_report
from headwise.cli import main
from headwise.recipes import train
from headwise.recipes.lm import LanguageModelRun
from headwise.training import speed
from headwise.training.speed import filled_cache, read_token, time_models
from headwise.training.timing import interleaved
from tiny import ONE_STEP, RUN, SIZES, llama

CONTEXTS = (67, 131)


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    monkeypatch.setattr(speed, "_SECONDS", 0.0)


def dense():
    sizes = {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    return llama(**sizes, max_position_embeddings=16).eval()


def routed(router="two_stage"):
    attention = headwise.MoHConfig(shared=1, active=2, router=router, router_std=0.02)
    return headwise.convert(dense(), attention=attention).eval()


def test_prompt_and_token_are_timed_at_each_context():
    timed = time_models(dense(), routed(), contexts=CONTEXTS)
    assert [(s.step, s.context) for s in timed.speeds] == [
        ("next token", 67), ("prompt", 67), ("next token", 131), ("prompt", 131),
    ]  # fmt: skip
    assert all(s.dense > 0 and s.routed > 0 for s in timed.speeds)
    assert "50% of heads on" in timed.note
    assert "kernels" in timed.note


def test_rounds_that_take_too_long_are_three():
    calls = []
    options = {"rounds": 7, "seconds": 0.0, "warmups": 2, "device": torch.device("cpu")}
    interleaved({"a": lambda: calls.append(1)}, **options)
    interleaved({"a": lambda: calls.append(2)}, **options, most_seconds=0.0)
    assert (calls.count(1), calls.count(2)) == (2 + 7, 2 + 3)


def test_wrong_logits_are_not_timed(monkeypatch):
    computed = speed.attention.head_attention
    monkeypatch.setattr(speed.attention, "head_attention", lambda *a, **k: 1.1 * computed(*a, **k))
    timed = time_models(dense(), routed(), contexts=CONTEXTS)
    assert timed.speeds == []
    assert timed.note.startswith("Not timed: MoH's logits have ")


def test_a_filled_cache_stays_as_long_and_carries_past_the_trained_positions():
    for model in (dense(), routed()):
        cache = filled_cache(model, 67)
        read_token(model, torch.tensor([[3]]), cache)
        assert cache.get_seq_length() == 67


@pytest.mark.parametrize(
    ("config", "kind", "fields"),
    [
        ("GPT2Config", "GPT2LMHeadModel", {}),
        ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
        ("MistralConfig", "MistralForCausalLM", {"num_key_value_heads": 3, "sliding_window": 5}),
    ],
)
def test_models_of_other_families_are_timed_too(config, kind, fields):
    sizes = getattr(transformers, config)(**SIZES, **fields)
    model = getattr(transformers, kind)(sizes).eval()
    converted = headwise.convert(copy.deepcopy(model), attention=headwise.MoHConfig())
    assert all(s.routed > 0 for s in time_models(model, converted, contexts=[17]).speeds)


def run_of(text, output, **fields):
    tiny = {"speed_contexts": CONTEXTS} | RUN | ONE_STEP
    return LanguageModelRun(data=text, output=output, **tiny | fields)


def test_the_demo_says_and_keeps_its_speed(numbers, tmp_path, capsys):
    run = run_of(numbers, tmp_path / "run", models=("dense", "moh"))
    train(run)
    printed = " ".join(capsys.readouterr().out.split())
    assert "next token at 67 tokens" in printed
    assert "MoH / dense" in printed
    record = from_json((run.output / "record.json").read_text())
    assert len(record.speeds) == 4
    page = (run.output / "report.html").read_text()
    assert "Speed at long contexts" in page
    (run.output / "report.html").unlink()
    main(["report", str(run.output)])
    assert (run.output / "report.html").read_text() == page
    assert "Speed at long" not in render_report(dataclasses.replace(record, speed_note=""))


@pytest.mark.parametrize("fields", [{"models": ("dense", "moe")}, {"speed_contexts": ()}])
def test_runs_without_both_models_or_contexts_time_nothing(numbers, tmp_path, capsys, fields):
    train(run_of(numbers, tmp_path / "run", **{"models": ("dense", "moh")} | fields))
    assert "Timing" not in capsys.readouterr().out


def test_contexts_are_the_demos_and_checked():
    assert LanguageModelRun().speed_contexts == (4096, 16384)
    with pytest.raises(ValueError, match="speed_contexts is 0; it must be at least 1"):
        LanguageModelRun(speed_contexts=(0,))
