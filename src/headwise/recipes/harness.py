"""Language models on the tasks of lm-evaluation-harness."""

from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from transformers import set_seed

from headwise.recipes.harness_tasks import load_tasks, wanted_tasks
from headwise.recipes.loading import load_causal_lm, load_config, load_tokenizer
from headwise.recipes.scoring import EvalRun
from headwise.results.rows import Row, environment

_BOOTSTRAPS = 1000


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
