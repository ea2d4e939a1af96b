"""How long a comparison takes, measured before it begins."""

import time
from collections.abc import Callable

import torch
from accelerate import PartialState

from headwise.training.comparison import ComparisonRun, Training
from headwise.training.trainer import SafeTrainer

_RATES = 4  # that a model tries with the first seed, as a rule
_CLOSE = 1.5  # of these, with every other seed
_TIMED = 3


def say_how_long(run: ComparisonRun, trainer_of: Callable[[Training], SafeTrainer]) -> None:
    """Print how many trainings there are, and about how long they take."""
    if not PartialState().is_main_process:
        return
    variants, threads = run.selected(), torch.get_num_threads()
    # As a worker has them.
    torch.set_num_threads(max(1, threads // run.workers))
    first = [Training(variant, run.seeds[0], run.learning_rate) for variant in variants]
    a_step = sum(_seconds_of_a_step(trainer_of(training)) for training in first)
    torch.set_num_threads(threads)
    each = _RATES + _CLOSE * (len(run.seeds) - 1)
    minutes = a_step * run.steps * each / run.workers / 60
    print(
        f"{len(variants)} models, each trained about {each:.0f} times for its learning rate and "
        f"seeds, {run.workers} at a time: about {minutes:.0f} minutes of training in all, and more "
        "for scoring",
        flush=True,
    )


def _seconds_of_a_step(trainer: SafeTrainer) -> float:
    """Forward and backward, on one process; the least of a few."""
    model, batch = trainer.model.train(), next(iter(trainer.get_train_dataloader()))
    seconds = []
    for _ in range(_TIMED):
        began = time.perf_counter()
        trainer.compute_loss(model, dict(batch)).backward()
        seconds.append(time.perf_counter() - began)
    return min(seconds) * trainer.args.gradient_accumulation_steps
