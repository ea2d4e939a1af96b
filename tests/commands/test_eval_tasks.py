"""headwise eval: scores worked by hand, side by side, in batches; what it writes and refuses."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._index import TaskIndex
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise import MoHConfig, convert
from headwise.cli import main
from headwise.commands.eval import score_models
from headwise.commands.eval.run import EvalRun
from headwise.commands.eval.tasks import PRESETS, task_manager, wanted_tasks
from headwise.results.rows import read_csv
from tiny import llama, tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
PAIRS = [
    {"prompt": f"number {n} comes", "good": f"after {n - 1}.", "bad": f"after {n + 7}."}
    for n in range(2, 103)
]
TASK = """task: pairs
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: 0
doc_to_choice: "{{{{[good, bad]}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(autouse=True, scope="module")
def datasets_cache(tmp_path_factory):
    """Not the user's, for what is made of task files; and the harness's verbosity as it was."""
    cache, logger = tmp_path_factory.mktemp("datasets"), logging.getLogger("lm_eval")
    level = logger.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        yield cache
    logger.setLevel(level)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories: a model, and itself with half and with all of the heads on."""
    root = tmp_path_factory.mktemp("models")
    of_numbers = tokenizer(" ".join(f"number {n} comes after {n - 1}." for n in range(400)))
    dense = llama(vocab_size=300, max_position_embeddings=512, initializer_range=0.5)
    dense.save_pretrained(root / "dense")
    for name, active in (("half", 3), ("all", 6)):
        attention = MoHConfig(shared=1, active=active, router="query_norm")
        convert(root / "dense", attention=attention).save_pretrained(root / name)
    for name in ("dense", "half", "all"):
        of_numbers.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task file over the pairs."""
    root = tmp_path_factory.mktemp("tasks")
    (root / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in PAIRS))
    (root / "pairs.yaml").write_text(TASK.format(root / "pairs.jsonl"))
    return root / "pairs.yaml"


def log_likelihood(model, words, prompt, answer):
    context, whole = (words(text)["input_ids"] for text in (prompt, f"{prompt} {answer}"))
    with torch.no_grad():
        scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(scores[i - 1, whole[i]].item() for i in range(len(context), len(whole)))


def accuracy(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    words = AutoTokenizer.from_pretrained(directory)
    right = [
        log_likelihood(model, words, pair["prompt"], pair["good"])
        > log_likelihood(model, words, pair["prompt"], pair["bad"])
        for pair in PAIRS
    ]
    return sum(right) / len(right)


def test_scores_are_those_worked_by_hand(models, task, tmp_path, capsys):
    paths = [str(models / name) for name in ("dense", "half", "all")]
    main(["eval", *paths, "--tasks", str(task.parent), "-o", str(tmp_path / "new")])
    printed = capsys.readouterr().out
    assert max(map(len, printed.split("saved")[0].splitlines())) <= 80
    rows = json.loads((tmp_path / "new" / "eval.json").read_text())["rows"]
    table = read_csv(tmp_path / "new" / "eval.csv")
    assert [row["value"] for row in table] == [str(row["value"]) for row in rows]
    assert [row["model"] for row in rows] == paths
    for row, path in zip(rows, paths, strict=True):
        p = accuracy(path)
        assert row["value"] == pytest.approx(p)
        error = (p * (1 - p) / (len(PAIRS) - 1)) ** 0.5
        assert row["standard_error"] == pytest.approx(error)
        assert f"{p:.3f} ±{error:.3f}" in printed
        assert (row["task"], row["metric"], row["documents"]) == ("pairs", "acc", len(PAIRS))
        assert row["lm_eval"]
        assert row["device"]
    assert 0 < rows[0]["value"] < 1
    assert rows[0]["value"] == rows[2]["value"]
    assert rows[0]["value"] != rows[1]["value"]


def test_limit_takes_the_first_documents(models, task, capsys):
    run = EvalRun((str(models / "half"),), (str(task),), limit=7, precision="bf16")
    (row,) = score_models(run)
    assert (row["documents"], row["num_fewshot"], row["precision"]) == (7, 0, "bf16")
    assert "saved" not in capsys.readouterr().out


def test_a_group_is_printed_and_its_parts_are_kept(models, task, monkeypatch, capsys):
    part = yaml.safe_load(task.read_text()) | {"fewshot_split": "validation"}
    parts = [part | {"task": name} for name in ("one", "two")]
    group = {"group": "both", "task": parts, "aggregate_metric_list": [{"metric": "acc"}]}
    index = task_manager().task_index
    monkeypatch.setitem(index, "both", TaskIndex.entry_from_config(group))
    run = EvalRun((str(models / "half"),), ("both",), num_fewshot=3)
    rows = {row["task"]: row for row in score_models(run)}
    assert {name: row["group"] for name, row in rows.items()} == {
        "both": "", "both::one": "both", "both::two": "both",
    }  # fmt: skip
    assert {row["num_fewshot"] for row in rows.values()} == {3}
    assert rows["both"]["documents"] == 2 * len(PAIRS)
    assert "one" not in capsys.readouterr().out


def harness(directory, batch_size):
    model = AutoModelForCausalLM.from_pretrained(directory)
    words = AutoTokenizer.from_pretrained(directory)
    return HFLM(pretrained=model, tokenizer=words, backend="causal", batch_size=batch_size)


@pytest.mark.parametrize("name", ["dense", "half"])
def test_likelihoods_do_not_depend_on_the_batch(models, name):
    texts = [("", PAIRS[0]["good"]), ("number", " 7"), (" ".join(["number 7"] * 20), " comes")]
    texts += [(pair["prompt"], f" {pair['bad']}") for pair in PAIRS[:8]]
    results = []
    for batch_size in (1, 3, 11):
        requests = [Instance("loglikelihood", {}, text, 0) for text in texts]
        scores = harness(models / name, batch_size).loglikelihood(requests)
        results.append(torch.tensor([score for score, _ in scores]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_continuations_do_not_depend_on_the_batch(models):
    prompts = ["number", " ".join(["number 7"] * 9), "comes after 3."]
    settings = {"until": ["."], "max_gen_toks": 11, "do_sample": False}
    results = []
    for batch_size in (1, 3):
        requests = [Instance("generate_until", {}, (prompt, settings), 0) for prompt in prompts]
        batched = harness(models / "half", batch_size)
        results.append(batched.generate_until(requests, disable_tqdm=True))
    assert results[0] == results[1]


def test_the_harness_knows_every_task_of_the_presets():
    known = task_manager().task_index
    assert [name for tasks in PRESETS.values() for name in tasks if name not in known] == []


def test_shots_of_presets_can_be_overridden():
    assert wanted_tasks(["paper-llama", "arc_easy"], None) | {"arc_easy": None, "boolq": 32} == (
        PRESETS["paper-llama"] | {"arc_easy": None}
    )
    assert set(wanted_tasks(["paper-llm"], 3).values()) == {3}


def test_the_harness_own_command_loads_converted_models(models, task, tmp_path, datasets_cache):
    command = [sys.executable, "-m", "headwise.lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={models / 'half'}", "--tasks", str(task)]
    command += ["--output_path", str(tmp_path)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(datasets_cache)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.rglob("results*.json")
    value = json.loads(results.read_text())["results"]["pairs"]["acc,none"]
    assert value == pytest.approx(accuracy(models / "half"))


@pytest.mark.parametrize("name", ["piqa", "arc_easy", "boolq_no_passage", "winogrande"])
def test_local_data_gives_the_harness_own_tasks(models, name):
    if not (SHARED / "eval").is_dir():
        pytest.skip(f"{SHARED / 'eval'} is not there")
    run = EvalRun((str(models / "half"),), (name,), data=(SHARED / "eval",), limit=5)
    rows = score_models(run)
    assert {row["task"] for row in rows} == {name}
    assert {row["documents"] for row in rows} == {5}


def test_minimal_pairs_of_local_data(models):
    if not (SHARED / "blimp").is_dir():
        pytest.skip(f"{SHARED / 'blimp'} is not there")
    names = [f"blimp_{path.stem}" for path in sorted((SHARED / "blimp").glob("*.jsonl"))]
    run = EvalRun((str(models / "half"),), tuple(names), data=(SHARED / "blimp",), limit=5)
    assert [row["task"] for row in score_models(run)] == names


@pytest.fixture
def refused(fails):
    """What `headwise eval` ends with; before, it says what it reads."""
    return lambda *arguments, status=2: fails(status, "eval", *arguments, quiet=False)


def test_wrong_fields_are_refused(models, task, tmp_path, refused):
    dense, output = models / "dense", tmp_path / "new"
    for arguments, message in (
        (("--limit", 0), "limit is 0; it must be at least 1"),
        (("--batch-size", 0), "batch_size is 0"),
        (("--num-fewshot", -1), "num_fewshot is -1; it must be at least 0"),
        (("--data", tmp_path / "none"), "where there is no directory"),
        (("-o", dense), "which exists; choose another"),
    ):
        assert message in refused(dense, "--tasks", task, *arguments)
    assert "tasks and images are both empty" in refused(dense, "-o", output, "--tasks")
    assert "models is empty" in refused("-o", output, "--tasks", task)
    assert not output.exists()


def test_wrong_tasks_are_refused(models, tmp_path, refused):
    dense, output = models / "dense", tmp_path / "new"

    def message(*tasks):
        return refused(dense, "-o", output, "--tasks", *tasks)

    assert "tasks names 'piqaa', which is unknown; did you mean 'piqa'?" in message("piqaa")
    assert "did you mean 'paper-llama'?" in message("paper-lama")
    (tmp_path / "empty").mkdir()
    assert "without a task file" in message(tmp_path / "empty")
    for content in ("task: [", "text", "task: x\noutput_type: guess\n"):
        (tmp_path / "wrong.yaml").write_text(content)
        assert "wrong.yaml, which cannot be used" in message(tmp_path / "wrong.yaml")
    assert "data has no form of" in message("sciq", "--data", tmp_path)
    assert "no piqa.json" in message("piqa", "--data", tmp_path)
    assert "num_fewshot is 2; with data" in message("piqa", "--data", tmp_path, "--num-fewshot", 2)
    assert not output.exists()


def test_wrong_models_are_refused(models, task, tmp_path, refused):
    assert "none holds no model" in refused(tmp_path / "none", "--tasks", task)
    (tmp_path / "empty").mkdir()
    assert "empty holds no model" in refused(tmp_path / "empty", "--tasks", task)
    AutoModelForCausalLM.from_pretrained(models / "dense").save_pretrained(tmp_path / "alone")
    message = refused(models / "dense", tmp_path / "alone", "--tasks", task)
    assert "alone, which has no tokenizer; save one" in message
    words = AutoTokenizer.from_pretrained(models / "dense")
    words.eos_token = None
    words.save_pretrained(tmp_path / "alone")
    assert "neither bos_token nor" in refused(tmp_path / "alone", "--tasks", task)


def test_without_a_network_data_is_named(models, monkeypatch, refused):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(models / "dense", "--tasks", "piqa", status=1)
    assert "documents of piqa cannot be fetched" in message
    assert "give data to read them from files" in message


def test_without_the_harness_the_extra_is_named(models, monkeypatch, refused):
    task_manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    message = refused(models / "dense", "--tasks", "piqa")
    assert "pip install 'headwise[eval]'" in message
