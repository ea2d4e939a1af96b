"""`headwise eval`: models side by side, those of language on tasks, image classifiers on images."""

import logging

import torch

from headwise.commands.eval.run import EvalRun
from headwise.commands.eval.table import comparison
from headwise.parsing import parsed
from headwise.progress import plain_console
from headwise.results.files import write_json
from headwise.results.rows import Row, write_csv
from headwise.training.directory import resolved
from headwise.training.fields import warn_if_emulated


def main(argv: list[str]) -> None:
    """Run the command."""
    run = parsed(EvalRun, argv, "headwise eval")
    # The harness warns of what is meant here: a model that is loaded, documents of one's own.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    score_models(run)


def score_models(run: EvalRun) -> list[Row]:
    """Score every model on everything, print the table, write it if asked to.

    Returns:
        One row a model, task (groups of tasks included; or the images) and metric.

    Raises:
        ValueError: If a model, what prepares its inputs, a task or images are not there, cannot be
            read or do not fit each other; no model has run on them then.
        OSError: If documents or weights cannot be fetched, or the output cannot be written.
    """
    # Imported here: each kind works without what the other needs, and help without both.
    if run.tasks:
        from headwise.commands.eval.tasks import score_on_tasks as score
    else:
        from headwise.commands.eval.images import score_on_images as score
    warn_if_emulated(run.precision, "cuda" if torch.cuda.is_available() else "cpu")
    console = plain_console()
    rows = score(run, console)
    console.print(comparison(rows).for_terminal())
    if run.output is not None:
        write_json(run.output / "eval.json", {"run": resolved(run), "rows": rows})
        write_csv(run.output / "eval.csv", rows)
        console.print(f"saved in {run.output}")
    return rows
