"""A run of two models from end to end: what it leaves, and what can be done with it."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import headwise as library
from headwise.parity import count_parameters
from headwise.results.rows import read_csv

PAIR = ("--models", "dense", "moh_mh_moe", "--steps", "20", "--report-to", "tensorboard")


@pytest.fixture(scope="module")
def arguments(commands, tmp_path_factory):
    return commands.train(tmp_path_factory.mktemp("runs") / "pair", *PAIR)


@pytest.fixture(scope="module")
def printed(commands, arguments) -> str:
    return commands.run(arguments)


@pytest.fixture(scope="module")
def run(printed, arguments) -> Path:
    return Path(arguments[arguments.index("--output") + 1])


def model(run: Path, name: str = "moh_mh_moe"):
    return AutoModelForCausalLM.from_pretrained(run / "models" / f"{name}-seed0")


def test_directory_holds_the_run_and_nothing_half_written(run):
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "checkpoints", "experts.csv", "figure.png", "heads.csv", "models", "record.json",
        "report.html", "results.csv", "run.json",
    ]  # fmt: skip
    assert not list(run.rglob("*.partial"))


def test_configuration_is_kept(run):
    saved = json.loads((run / "run.json").read_text())
    assert saved["run"]["models"] == ["dense", "moh_mh_moe"]
    assert (saved["run"]["steps"], saved["run"]["learning_rate"]) == (20, 3e-3)
    assert saved["fingerprint"].keys() == {"library"}


def test_progress_and_comparison_are_printed(printed):
    assert "dense, seed 0  step 20/20  loss " in printed
    assert "Language models at equal FLOPs per token" in printed
    assert "report.html" in printed


def test_a_row_for_each_model(run):
    rows = {row["model"]: row for row in read_csv(run / "results.csv")}
    assert list(rows) == ["dense", "moh_mh_moe"]
    for name, row in rows.items():
        total, active = count_parameters(model(run, name))
        assert (int(row["parameters"]), int(row["active_parameters"])) == (total, active)
        assert (row["steps"], row["seen"]) == ("20", str(20 * 4 * 64))
        assert 2 < float(row["perplexity_library"]) < 512
        assert float(row["perplexity_library_q1"]) < float(row["perplexity_library_q3"])
        assert float(row["per_second"]) > 0
    assert [row["active_heads"] for row in rows.values()] == ["1.0", "0.75"]
    dense, routed = (float(row["router_flops"]) for row in rows.values())
    assert dense == 0 < routed < 0.05
    dense, routed = (float(row["flops"]) for row in rows.values())
    assert routed == pytest.approx(dense, rel=0.05)  # this small, 8 columns of an MLP are 2 %


def test_record_has_curves_and_loads(run):
    dense, routed = json.loads((run / "record.json").read_text())["models"]
    assert dense["training"]["steps"] == [5, 10, 15, 20]
    assert dense["validation"]["steps"] == [10, 20]
    assert dense["training"]["losses"][0] > dense["training"]["losses"][-1]
    assert dense["heads"] is None
    (loads,) = routed["heads"]["by_domain"].values()
    assert [round(sum(layer), 4) for layer in loads] == [3, 3]  # heads on of 4, in 2 layers
    assert routed["texts"]


def test_a_row_for_each_layer_with_experts(run):
    (row,) = read_csv(run / "experts.csv")
    experts = model(run).conversion.mlp.num_experts
    where = ("model", "seed", "layer", "domain", "experts")
    assert [row[key] for key in where] == ["moh_mh_moe", "0", "1", "library", str(experts)]
    assert 1 <= float(row["effective"]) <= int(row["used"]) <= experts
    assert 0 <= float(row["overlap"]) <= 1
    assert 1 / experts <= float(row["largest"]) <= 1 / 2  # of experts that a sub-token has two of
    assert 2 / experts <= float(row["overlap_by_chance"]) <= 1
    assert row["specialisation"] == row["specialisation_by_chance"] == ""  # a single domain
    assert row["p_value"] == ""


def test_a_row_for_each_head(run):
    rows = read_csv(run / "heads.csv")
    assert [(row["model"], row["layer"], row["head"]) for row in rows] == [
        ("moh_mh_moe", layer, head) for layer in "01" for head in "0123"
    ]
    loads = {"True": [], "False": []}
    for row in rows:
        loads[row["shared"]].append(float(row["load_library"]))
    assert set(loads["True"]) == {1}
    assert sum(loads["True"] + loads["False"]) == pytest.approx(3 * 2, abs=1e-4)
    assert {row["p_value"] for row in rows} == {""}  # a single domain


def test_saved_model_is_ours_and_generates(run):
    loaded = model(run)
    assert isinstance(loaded.conversion.mlp, library.MHMoEConfig)
    tokenizer = AutoTokenizer.from_pretrained(run / "models" / "moh_mh_moe-seed0")
    inputs = tokenizer("def main", return_tensors="pt", return_token_type_ids=False)
    output = loaded.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("def main")


def test_saved_model_predicts_what_its_last_checkpoint_does(run):
    ids = torch.arange(40).unsqueeze(0)
    last = run / "checkpoints" / "moh_mh_moe-seed0" / "checkpoint-20"
    with torch.no_grad():
        saved, checkpoint = model(run)(ids), AutoModelForCausalLM.from_pretrained(last)(ids)
    assert torch.equal(saved.logits, checkpoint.logits)


def test_tensorboard_files(run):
    for name in ("dense", "moh_mh_moe"):
        files = list((run / "checkpoints" / f"{name}-seed0").rglob("events.out.tfevents.*"))
        assert files
        assert all(file.stat().st_size for file in files)


def test_generate_is_repeatable_and_follows_the_seed(run, headwise):
    directory = run / "models" / "moh_mh_moe-seed0"
    options = ("--prompt", "def main", "--max-new-tokens", 20)
    texts = [headwise("generate", directory, *options, "--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("def main")
    greedy = [
        headwise("generate", directory, *options, "--temperature", 0, "--seed", s) for s in (1, 2)
    ]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    ("directory", "options", "message"),
    [
        (".", {}, "holds no model .* the run in it has .*models/dense-seed0"),
        ("checkpoints", {}, "holds no model"),
        ("models/dense-seed0", {"--prompt": ""}, "prompt is empty"),
        ("models/dense-seed0", {"--temperature": -1}, "temperature is -1"),
        ("models/dense-seed0", {"--max-new-tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_generate_refuses(run, headwise, capsys, directory, options, message):
    fields = [part for pair in ({"--prompt": "x"} | options).items() for part in pair]
    with pytest.raises(SystemExit, match="2"):
        headwise("generate", run / directory, *fields)
    assert re.search(message, capsys.readouterr().err)


def test_report_is_drawn_again_the_same(run, headwise):
    page = run / "report.html"
    before = page.read_text()
    page.unlink()
    assert headwise("report", run).strip() == str(page)
    assert page.read_text() == before


def test_resuming_a_finished_run_only_redraws(run, arguments, headwise):
    kept = [p for p in run.rglob("*") if p.is_file() and p.parent != run]
    before = {path: path.stat().st_mtime_ns for path in kept}
    table = (run / "results.csv").read_text()
    (run / "report.html").unlink()
    printed = headwise(*arguments, "--resume")
    assert "step" not in printed.splitlines()[0]
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert (run / "results.csv").read_text() == table
    assert (run / "report.html").exists()
