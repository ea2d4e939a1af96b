"""Language models on the tasks of lm-evaluation-harness, by name, preset, file or local data."""

import difflib
import functools
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from rich.console import Console

from headwise.commands.eval.documents import read_documents, source_of
from headwise.commands.eval.run import EvalRun
from headwise.errors import reading
from headwise.loading import load_causal_lm, load_config, load_tokenizer
from headwise.results.rows import Row, environment

_BOOTSTRAPS = 1000
# Source: arXiv 2410.11842, Tables 3 and 4; the shots are those in Table 4's heads, 0 without one.
# The paper names benchmarks, and the released code says that the harness ran them: TruthfulQA is
# mc1 or mc2 there, so that both are run; CEVAL is taken as ceval-valid, LAMBADA as lambada_openai.
_LLM = ("sciq", "piqa", "winogrande", "openbookqa", "logiqa", "truthfulqa_mc1", "truthfulqa_mc2")
PRESETS: dict[str, dict[str, int]] = {
    "paper-llm": dict.fromkeys(_LLM, 0),
    "paper-llama": {
        "mmlu": 5, "ceval-valid": 5, "cmmlu": 5, "gsm8k": 8, "truthfulqa_mc1": 0,
        "truthfulqa_mc2": 0, "hellaswag": 10, "logiqa": 0, "boolq": 32, "lambada_openai": 0,
        "sciq": 0, "piqa": 0, "winogrande": 0, "nq_open": 32, "arc_challenge": 25,
    },
}  # fmt: skip


def score_on_tasks(run: EvalRun, console: Console) -> list[Row]:
    """Score every model on every task.

    Returns:
        One row a model, task and metric, groups of tasks included.

    Raises:
        ValueError: If a model, its tokenizer or a task is not there or cannot be read; no model has
            run then.
        OSError: If documents or weights cannot be fetched.
    """
    for path in run.models:
        _check_model(path)
    console.print("reading the harness's index of tasks")
    wanted = wanted_tasks(run.tasks, run.num_fewshot)
    tasks = load_tasks(wanted, run.data)
    rows = []
    for path in run.models:
        console.print(path)
        rows += _rows(run, path, _evaluate(run, path, tasks))
    return rows


def _check_model(path: str) -> None:
    load_config(path, "language model")
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise ValueError(f"models names {path}, which has no tokenizer; save one beside it")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            f"models names {path}, whose tokenizer has neither bos_token nor eos_token; the "
            "harness puts one of them before a text"
        )


def _evaluate(run: EvalRun, path: str, tasks: dict[str, Any]) -> dict[str, Any]:
    """The harness's own results; every model sees the same examples."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_causal_lm(path, dtype=run.dtype).to(device)
    harness_model = HFLM(
        pretrained=model,
        tokenizer=load_tokenizer(path),
        backend="causal",
        batch_size=run.batch_size,
    )
    set_seed(run.seed)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(run.seed)
    return evaluate(
        harness_model, tasks, limit=run.limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False
    )


def _rows(run: EvalRun, path: str, results: dict[str, Any]) -> list[Row]:
    groups = results.get("groups", {})
    group_of = {part: name for name in groups for part in results["group_subtasks"][name]}
    rows = []
    for task, scores in results["results"].items():
        for key, value in scores.items():
            metric, _, answer_filter = key.partition(",")
            if not answer_filter or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{answer_filter}")
            rows.append({
                "model": path,
                "task": task,
                "group": group_of.get(task, ""),
                "metric": metric if answer_filter == "none" else f"{metric} {answer_filter}",
                "value": value,
                "standard_error": error if isinstance(error, float) else None,
                "documents": scores["sample_len"],
                "num_fewshot": results["n-shot"].get(task),
                "task_version": results["versions"].get(task),
                "data": " ".join(map(str, run.data)),
                "batch_size": run.batch_size,
                "seed": run.seed,
                **environment(run.precision),
                "lm_eval": version("lm_eval"),
            })  # fmt: skip
    return rows


def wanted_tasks(tasks: Sequence[str], num_fewshot: int | None) -> dict[str, int | None]:
    """Names and files of tasks, with shots where they are not the task's own.

    Args:
        tasks: Presets, names, files, or directories of files `*.yaml`.
        num_fewshot: Shots of all tasks; None leaves them to the preset, then to the task.

    Raises:
        ValueError: If a directory has no task file.
    """
    wanted: dict[str, int | None] = {}
    for name in tasks:
        if name in PRESETS:
            wanted |= PRESETS[name]
        elif Path(name).is_dir():
            files = sorted(map(str, Path(name).glob("*.yaml")))
            if not files:
                raise ValueError(f"tasks names {name}, a directory without a task file (*.yaml)")
            wanted |= dict.fromkeys(files)
        else:
            wanted[name] = None
    return wanted if num_fewshot is None else dict.fromkeys(wanted, num_fewshot)


def load_tasks(wanted: dict[str, int | None], data: Sequence[Path] = ()) -> dict[str, Any]:
    """The tasks with their documents, as the harness's `evaluate` takes them.

    Args:
        wanted: As `wanted_tasks` gives them.
        data: Directories with the documents; without them the harness fetches its own.

    Raises:
        ValueError: If a task is unknown, its file cannot be read, or data has no form of it.
        OSError: If documents cannot be fetched.
    """
    for name in wanted:
        _check_name(source_of(name).task if data else name)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    for name, shots in wanted.items():
        tasks, groups = _from_files(name, shots, data) if data else _from_harness(name)
        for task in tasks.values():
            _set_shots(task, shots)
        loaded["tasks"] |= tasks
        loaded["groups"] |= groups
    return loaded


@functools.cache
def task_manager() -> Any:
    """The harness's index of its tasks; reading it takes seconds.

    Raises:
        ValueError: If the harness is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            "lm-evaluation-harness is not installed; the extra eval has it: "
            "`pip install 'headwise[eval]'`"
        ) from error
    return TaskManager()


def _check_name(name: str) -> None:
    known = task_manager().task_index
    if name in known or Path(name).is_file():
        return
    near = difflib.get_close_matches(name, (*PRESETS, *known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "give a preset, a name or a file (*.yaml)"
    raise ValueError(f"tasks names {name!r}, which is unknown; {hint}")


def _from_harness(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        loaded = task_manager().load([name])
    except OSError as error:
        raise OSError(
            f"documents of {name} cannot be fetched ({error}); give data to read them from files"
        ) from error
    # A task file can be wrong in as many ways as there are kinds of errors.
    except Exception as error:
        raise ValueError(f"tasks names {name}, which cannot be used: {error}") from error
    return loaded["tasks"], loaded["groups"]


def _from_files(
    name: str, shots: int | None, data: Sequence[Path]
) -> tuple[dict[str, Any], dict[str, Any]]:
    from datasets import Dataset

    if shots:
        raise ValueError(f"num_fewshot is {shots}; with data, which has no examples, it must be 0")
    source = source_of(name)
    documents = read_documents(source, data)
    with reading(source.file, "a table"):
        table = Dataset.from_list(documents)
    spec = {
        "task": source.task,
        "custom_dataset": lambda **_: {"validation": table},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        **source.changes,
    }
    # Only inside a group does the harness take a task of its own with changes.
    loaded = task_manager().load([{"group": "local", "task": [spec]}])
    (task,) = loaded["tasks"].values()
    return {name: task}, {}


def _set_shots(task: Any, shots: int | None) -> None:
    """As the harness's `simple_evaluate` does: 0 in the task's own file stays."""
    own = task.get_config("num_fewshot")
    if own != 0:
        task.set_config("num_fewshot", (own or 0) if shots is None else shots)
