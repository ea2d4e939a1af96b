"""`headwise eval`: models on the tasks of lm-evaluation-harness, side by side."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from headwise.hf.loading import check_place
from headwise.ops.choice import check_choice
from headwise.recipes import harness_table
from headwise.recipes.directory import resolved, write_json
from headwise.recipes.harness_tasks import load_tasks, wanted_tasks
from headwise.recipes.loading import load_tokenizer
from headwise.recipes.results import environment
from headwise.recipes.table import Row, write_csv

_BOOTSTRAPS = 1000
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class HarnessRun:
    """Score models on the tasks of lm-evaluation-harness, side by side with standard errors.

    Attributes:
        models: Directories as transformers saves them, converted or not, or names on the Hugging
            Face hub; for example the original first and what was made of it after it.
        tasks: Names that the harness knows, task files (YAML) or directories of them, or what the
            MoH paper measured: paper-llm (0 shots), paper-llama (0 to 32 shots).
        data: Directories with documents for the tasks, instead of those that the harness fetches:
            TASK.json for piqa, arc_easy, openbookqa, winogrande and boolq_no_passage (boolq.json),
            a list of {"instruction": …, "answer": …} of which docs/convert.md shows one, and
            NAME.jsonl for blimp_NAME.
        num_fewshot: Examples before each question; without it the preset's or the task's own. Tasks
            that the harness fixes at 0 stay there.
        limit: How many documents of each task to take, the first ones; without it all.
        batch_size: Texts at a time; the scores do not depend on it.
        precision: Of weights and activations: fp32 or bf16.
        output: Directory for eval.json and eval.csv; must not hold anything yet.
        seed: Seed of the choice of shots; the harness's own by default.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR …")]
    tasks: tuple[str, ...]
    data: tuple[Path, ...] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    precision: Literal["fp32", "bf16"] = "fp32"
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    seed: int = 1234

    def __post_init__(self) -> None:
        for field, kind in (("models", "directory or name"), ("tasks", "task")):
            if not getattr(self, field):
                raise ValueError(f"{field} is empty; give at least one {kind}")
        for field, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ValueError(f"{field} is {value}; it must be at least {least}")
        for directory in self.data:
            if not directory.is_dir():
                raise ValueError(f"data is {directory}, where there is no directory")
        check_choice("precision", self.precision, Literal["fp32", "bf16"])
        if self.output is not None and self.output.exists() and not _is_empty(self.output):
            raise ValueError(f"output is {self.output}, which exists; choose another")


def score_models(run: HarnessRun) -> list[Row]:
    """Score every model on every task, print the table, write it if asked to.

    Returns:
        One row a model, task and metric, groups of tasks included.

    Raises:
        ValueError: If a model, its tokenizer or a task is not there or cannot be read; no model has
            run then.
        OSError: If documents or weights cannot be fetched, or the output cannot be written.
    """
    console = Console()
    for path in run.models:
        _check_model(path)
    console.print("reading the harness's index of tasks", highlight=False)
    wanted = wanted_tasks(run.tasks, run.num_fewshot)
    tasks = load_tasks(wanted, run.data)
    rows = []
    for path in run.models:
        console.print(path, highlight=False)
        rows += _rows(run, path, _evaluate(run, path, tasks))
    console.print(harness_table.for_terminal(rows))
    if run.output is not None:
        write_json(run.output / "eval.json", {"run": resolved(run), "rows": rows})
        write_csv(run.output / "eval.csv", rows)
        console.print(f"saved in {run.output}", highlight=False)
    return rows


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _check_model(path: str) -> None:
    try:
        check_place(path)
        AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"models names {path}, which has no model: {reason}") from error
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise ValueError(f"models names {path}, which has no tokenizer; save one beside it")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            f"models names {path}, whose tokenizer has neither bos_token nor eos_token; the "
            "harness puts one of them before a text"
        )


def _evaluate(run: HarnessRun, path: str, tasks: dict[str, Any]) -> dict[str, Any]:
    """The harness's own results; every model sees the same examples."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=_DTYPES[run.precision]).to(device)
    harness_model = HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(path),
        backend="causal",
        batch_size=run.batch_size,
    )
    set_seed(run.seed)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(run.seed)
    return evaluate(
        harness_model, tasks, limit=run.limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False
    )


def _rows(run: HarnessRun, path: str, results: dict[str, Any]) -> list[Row]:
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
