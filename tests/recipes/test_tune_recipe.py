"""Tuning runs on a tiny model and real text: what they leave, and what they refuse."""

import dataclasses
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from headwise import MoEConfig, MoHConfig, convert
from headwise.data.split_tokens import load_tokens
from headwise.data.text import MixedBlocks
from headwise.recipes.tune import SCHEDULES, TuningRun, tune
from headwise.results.rows import Row, read_csv
from tiny import llama, tokenizer

TEXT = Path(textwrap.__file__)


@pytest.fixture(scope="module")
def of_the_text() -> PreTrainedTokenizerFast:
    return tokenizer(TEXT.read_text())


@pytest.fixture(scope="module")
def original(tmp_path_factory, of_the_text) -> Path:
    """A random model with the tokenizer of the text."""
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_attention_heads": 4}
    path = tmp_path_factory.mktemp("original")
    for part in (llama(**sizes, bos_token_id=0, eos_token_id=0), of_the_text):
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory, of_the_text) -> Path:
    path = tmp_path_factory.mktemp("converted")
    attention = MoHConfig(shared=1, active=3, router="query_norm")
    for part in (convert(original, attention=attention), of_the_text):
        part.save_pretrained(path)
    return path


def run(path: Path, output: Path, *, dense: int = 0, routed: int = 4, **changes) -> TuningRun:
    small = SCHEDULES["small"](str(path), output)
    tiny = {
        "data": str(TEXT), "batch_size": 2, "sequence_length": 16, "eval_blocks": 3,
        "eval_every": 2, "save_every": 2, "log_every": 1,
        "dense": dataclasses.replace(small.dense, steps=dense, warmup_steps=1),
        "routed": dataclasses.replace(small.routed, steps=routed, warmup_steps=1),
    }  # fmt: skip
    return dataclasses.replace(small, **(tiny | changes))


def rows(output: Path) -> list[Row]:
    return read_csv(output / "results.csv")


def final(output: Path, model: str = "routed-seed0") -> dict[str, torch.Tensor]:
    return load_file(output / "models" / model / "model.safetensors")


def test_two_stages(converted, tmp_path, capsys):
    output = tmp_path / "run"
    tune(run(converted, output, dense=2, routed=3))
    got = [(r["stage"], r["step"], r["tokens"], r["active_heads"]) for r in rows(output)]
    assert got == [
        ("dense", "0", "0", "1.0"), ("dense", "2", "64", "1.0"), ("routed", "0", "64", "0.75"),
        ("routed", "2", "128", "0.75"), ("routed", "3", "160", "0.75"),
    ]  # fmt: skip
    assert rows(output)[0]["recovery"] == "100.0"
    assert (output / "recovery.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert printed.count("routed  step 3  perplexity") == 1
    assert "75 %" in printed

    dense, routed = (output / "models" / f"{stage}-seed0" for stage in ("dense", "routed"))
    assert type(AutoModelForCausalLM.from_pretrained(dense)) is LlamaForCausalLM
    model = AutoModelForCausalLM.from_pretrained(routed)
    given = AutoModelForCausalLM.from_pretrained(converted)
    budgets = [str(x.model.layers[0].self_attn.router.budget) for x in (model, given)]
    assert budgets[0] == budgets[1]
    assert PreTrainedTokenizerFast.from_pretrained(routed)("def").input_ids
    card = (routed / "README.md").read_text()
    assert f"{rows(output)[-1]['recovery']} % recovered" in card
    assert "Tuned on 160 tokens" in card
    assert 'from_pretrained("run/models/routed-seed0")' in card


def test_the_routed_stage_begins_where_the_dense_one_ended(converted, tmp_path):
    tune(run(converted, tmp_path / "run", dense=2, routed=1))
    dense, routed = (final(tmp_path / "run", f"{stage}-seed0") for stage in ("dense", "routed"))
    began = load_file(converted / "model.safetensors")
    for name in began:
        moved = (dense[name] - began[name]).abs().max()
        assert (routed[name] - dense[name]).abs().max() <= moved, name


def test_a_plain_model_goes_through_the_first_stage_only(original, tmp_path):
    tune(run(original, tmp_path / "run", dense=2))
    assert {r["stage"] for r in rows(tmp_path / "run")} == {"dense"}
    assert [p.name for p in (tmp_path / "run" / "models").iterdir()] == ["dense-seed0"]


def test_two_runs_with_a_seed_are_equal_and_another_seed_differs(converted, tmp_path):
    seeds = {"a": 0, "b": 0, "c": 1}
    weights = {}
    for name, seed in seeds.items():
        tune(run(converted, tmp_path / name, seed=seed))
        weights[name] = final(tmp_path / name, f"routed-seed{seed}")
    assert_close(weights["a"], weights["b"], rtol=0, atol=0)
    with pytest.raises(AssertionError):
        assert_close(weights["a"], weights["c"], rtol=0, atol=0)


def test_resumed_after_the_first_stage(converted, tmp_path, monkeypatch):
    """Stopped as the second stage begins; what the first one left is not trained again."""
    whole, cut = (run(converted, tmp_path / name, dense=2) for name in ("whole", "cut"))
    tune(whole)
    with monkeypatch.context() as patch:
        patch.setattr("headwise.recipes.tune._load", _fails_on_second_stage(cut.output))
        with pytest.raises(KeyboardInterrupt):
            tune(cut)
    first = cut.output / "models" / "dense-seed0" / "model.safetensors"
    written = first.stat().st_mtime_ns
    tune(dataclasses.replace(cut, resume=True))
    assert first.stat().st_mtime_ns == written
    assert_close(final(whole.output), final(cut.output), rtol=0, atol=0)
    want, got = ([row["perplexity"] for row in rows(run.output)] for run in (whole, cut))
    assert got == want


def test_resumed_writes_the_same_tables(converted, tmp_path):
    """Between two evaluations, and after the end."""
    began = run(converted, tmp_path / "run", save_every=3)
    tune(began)
    whole = rows(began.output)
    assert [row["step"] for row in whole] == ["0", "2", "4"]
    shutil.rmtree(began.output / "models")
    shutil.rmtree(began.output / "checkpoints" / "routed-seed0" / "checkpoint-4")
    for _ in range(2):
        tune(dataclasses.replace(began, resume=True))
        for row in (again := rows(began.output)):
            row["tokens_per_second"] = whole[0]["tokens_per_second"]
        assert again == whole
    assert [p.name for p in (began.output / "models").iterdir()] == ["routed-seed0"]


def test_damaged_stage_is_found_and_its_card_may_be_edited(converted, tmp_path):
    began = run(converted, tmp_path / "run")
    tune(began)
    finished = began.output / "models" / "routed-seed0"
    (finished / "README.md").write_text("mine")
    tune(dataclasses.replace(began, resume=True))
    for name in ("model.safetensors", "recovery.json"):
        content = (finished / name).read_bytes()
        (finished / name).write_bytes(content[:-1])
        with pytest.raises(ValueError, match=f"^{finished / name} is damaged, .* train that model"):
            tune(dataclasses.replace(began, resume=True))
        (finished / name).write_bytes(content)


def _fails_on_second_stage(output: Path):
    from headwise.recipes.tune import _load

    def load(path: str | Path):
        if path == output / "models" / "dense-seed0":
            raise KeyboardInterrupt
        return _load(path)

    return load


def token_file(path: Path, rows: list[list[int]]) -> str:
    Dataset.from_dict({"input_ids": rows}).to_parquet(str(path))
    return str(path)


def test_tokens_instead_of_text(converted, tmp_path):
    tokens = torch.randint(300, (30, 16)).tolist()
    tune(run(converted, tmp_path / "run", data=token_file(tmp_path / "tokens.parquet", tokens)))
    assert len(rows(tmp_path / "run")) == 3


def test_measured_on_text_of_its_own(converted, original, tmp_path):
    """Then all of the data is trained on, and no row of the other text."""
    data = token_file(tmp_path / "data.parquet", [[i] * 16 for i in range(8)])
    given = torch.randint(300, (3, 16))
    eval_data = token_file(tmp_path / "eval.parquet", given.tolist())
    began = run(converted, tmp_path / "run", data=data, eval_data=eval_data)
    tune(began)
    model = AutoModelForCausalLM.from_pretrained(original)
    with torch.no_grad():
        loss = model(input_ids=given, labels=given).loss
    want = pytest.approx(loss.exp().item(), rel=1e-4)
    assert float(rows(began.output)[0]["original_perplexity"]) == want
    (stream,) = load_tokens(data, None, 16).whole().values()
    assert sorted(set(stream.tolist())) == list(range(8))
    blocks = MixedBlocks({"data": stream}, sequence_length=16, num_blocks=8, exponent=0.5, seed=0)
    assert {block["input_ids"][0].item() for block in blocks} == set(range(8))


def test_wrong_input_is_refused_before_anything_is_written(
    converted, original, of_the_text, tmp_path
):
    tokens = token_file(tmp_path / "large.parquet", [[300] * 16] * 30)
    short = token_file(tmp_path / "short.parquet", [[3] * 5] * 30)
    other = tmp_path / "other"
    LlamaForCausalLM.from_pretrained(original).save_pretrained(other)
    tokenizer(TEXT.read_text(), vocab_size=290).save_pretrained(other)
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(converted).save_pretrained(bare)
    experts = tmp_path / "experts"
    mlp = MoEConfig(num_experts=3, top_k=1, expert_dim=5)
    for part in (convert(original, mlp=mlp), of_the_text):
        part.save_pretrained(experts)
    for changes, message in [
        (
            {"path": experts, "original": str(original), "dense": 2},
            "the model has experts for its MLPs, .* with --dense.steps 0",
        ),
        ({"path": original}, "dense.steps is 0, and the model in .* has no routed heads"),
        ({"data": tokens}, "the text has token 300, and the model in .* has embeddings for 0..299"),
        ({"data": short}, "sequence_length is 16, but .* has rows of at most 5 tokens"),
        ({"data": str(tmp_path / "none.parquet")}, "there is no file"),
        ({"eval_data": tokens}, "the text has token 300, and the model in .*"),
        ({"eval_data": str(tmp_path / "none.parquet")}, "there is no file"),
        ({"original": str(other)}, "original is .*, whose tokenizer is not that of"),
        ({"path": bare}, "has no tokenizer, and text needs one"),
        ({"sequence_length": 9999}, "sequence_length is 9999; the model in .* takes at most"),
        ({"path": tmp_path}, r"holds no model \(no config\.json\)"),
        ({"report_to": ("paper",)}, "report_to names 'paper'"),
        ({"device_batch_size": 3}, "device_batch_size is 3; it must divide"),
    ]:
        path = changes.pop("path", converted)
        with pytest.raises(ValueError, match=message):
            tune(run(path, tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": -1.0}, "distill is -1.0"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"routed": 0}, "dense.steps and routed.steps are both 0"),
        ({"resume": True, "overwrite": True}, "resume and overwrite are both set"),
        ({"precision": "fp64"}, "precision is 'fp64'"),
        ({"schedule": "large"}, "schedule is 'large'"),
    ],
)
def test_wrong_fields(converted, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(converted, tmp_path / "run", **changes)
