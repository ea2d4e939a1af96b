"""transformers' Trainer that loses nothing: whole checkpoints only, and a stop at a bad loss."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.progress import Progress, TimeRemainingColumn
from safetensors import SafetensorError
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from headwise.errors import DivergedError
from headwise.progress import SECONDS_BETWEEN_LINES, bar, plain_console, text_column
from headwise.results.files import check_manifest, put_in_place, write_manifest

_PARTIAL = ".partial"


class SafeTrainer(Trainer):
    """Trainer with checkpoints written beside and renamed, and a stop at a loss that is not finite.

    A directory `checkpoint-N` is therefore always whole, whatever killed process or machine. Its
    manifest has the sums of its files, so that nothing missing or damaged is resumed from.

    Example: what happens at step 200 of a run that saves every 100 steps and keeps two.

        output/checkpoint-100/                  is whole
        output/.partial/checkpoint-200/         transformers writes weights, optimizer, random state
        output/.partial/checkpoint-200/manifest.json
        output/checkpoint-200/                  by a rename: now it is whole, too
        output/.partial/                        is removed; later checkpoint-300 ends checkpoint-100

    A kill before the rename leaves `.partial`; `train` sweeps it and goes on from step 100.

    Args:
        title: What is trained, before each line of progress.
        per_step: Units of a step (tokens, images), over all processes, for the speed.
        unit: Their name.
        args, kwargs: Of transformers' Trainer.
    """

    def __init__(self, *args: Any, title: str, per_step: int, unit: str = "token", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.speed = _Speed(per_step, unit)
        self.progress = _Progress(title, self.speed)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(self.progress)
        self.add_callback(_GradientCheck(self))
        self._saving_to: Path | None = None

    def train(self, resume_from_checkpoint: str | None = None) -> Any:
        """transformers' own; the bar is taken down also when training fails.

        A checkpoint of the last step is loaded and nothing is trained: transformers' own takes one
        more step where the data have no length.

        Raises:
            ValueError: If a file of the checkpoint to resume from is missing or damaged.
            FloatingPointError: When a loss or a gradient is not finite.
            OSError: When a checkpoint cannot be written; the ones before stay.
        """
        if self.is_world_process_zero():
            shutil.rmtree(Path(self.args.output_dir) / _PARTIAL, ignore_errors=True)
            if resume_from_checkpoint is not None:
                check_manifest(Path(resume_from_checkpoint), _go_back(resume_from_checkpoint))
        if resume_from_checkpoint is not None:
            # Its history has the evaluation before the first step.
            self.args.eval_on_start = False
            with _reading(resume_from_checkpoint):
                state = TrainerState.load_from_json(
                    str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)
                )
            if state.global_step >= self.args.max_steps and not self.is_fsdp_enabled:
                self.state = state
                self._load_from_checkpoint(resume_from_checkpoint)
                return None
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint)
        finally:
            self.progress.stop()

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """While it is open, the model has the weights that it would keep if training ended now."""
        yield

    def last_checkpoint(self) -> str | None:
        """The newest whole checkpoint of the output directory."""
        output = Path(self.args.output_dir)
        return get_last_checkpoint(str(output)) if output.is_dir() else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raises FloatingPointError at a loss that is not finite, before any weight takes it up."""
        self.speed.begin()
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            self.stop_at(f"the loss is {loss.item()}")
        return loss

    def stop_at(self, what: str) -> NoReturn:
        """Raise FloatingPointError with the step and what is kept."""
        last = self.last_checkpoint()
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise DivergedError(
            f"{what} at step {self.state.global_step + 1}; {kept}. "
            "A lower learning_rate or a longer warmup often helps"
        )

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_to or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        output = Path(super()._get_output_dir(trial))
        self._saving_to = output / _PARTIAL
        name = f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                write_manifest(self._saving_to / name)
                put_in_place(self._saving_to / name, output / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self._saving_to, ignore_errors=True)
            raise OSError(
                f"{output / name} could not be written ({error}); the last good checkpoint is "
                f"{self.last_checkpoint()}"
            ) from error
        finally:
            self._saving_to = None
        if self.is_world_process_zero():
            (output / _PARTIAL).rmdir()
            rotate_checkpoints(str(output), self.args.save_total_limit, use_mtime=False)


def _go_back(checkpoint: str | None) -> str:
    return f"delete {checkpoint} to go on from the one before"


@contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{checkpoint} cannot be read ({error}); {_go_back(checkpoint)}"
        ) from error


class _GradientCheck(TrainerCallback):
    """A loss can be finite and its gradient not: stop before it reaches the weights."""

    def __init__(self, trainer: SafeTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # With fp16 the gradient scaler meets such gradients on purpose and skips the step.
        if args.fp16:
            return
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            self.trainer.stop_at(f"the gradient's norm is {norm.item()}")


class _Speed:
    """Seconds that steps take, without what lies between them (evaluation, saving)."""

    def __init__(self, per_step: int, unit: str) -> None:
        self.per_step, self.unit = per_step, unit
        self._began = 0.0
        self.seconds: list[float] = []

    def begin(self) -> None:
        # Under gradient accumulation a step begins several times; the first counts.
        self._began = self._began or time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self._began = 0.0

    def median(self) -> float:
        """Median seconds of a step; the first ones warm up and do not count when there are more."""
        counted = sorted(self.seconds[2:] or self.seconds)
        return counted[len(counted) // 2] if counted else float("nan")

    def per_second(self) -> float:
        """Units of the median step, all processes together; nan where no step was taken."""
        return self.per_step / self.median()

    def rounded(self) -> int | None:
        """The same in whole numbers; None where no step was taken."""
        return round(self.per_second()) if self.seconds else None


class _Progress(TrainerCallback):
    """A bar with loss, speed and time left; plain lines where the output is not a terminal."""

    def __init__(self, title: str, speed: _Speed):
        self.title, self.speed = title, speed
        self.console = plain_console()
        self.loss = float("nan")
        self.bar: Progress | None = None
        self.said = time.monotonic()
        self.evaluated = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        status = text_column("{task.fields[status]}")
        self.bar = bar(self.console, status, TimeRemainingColumn(), text_column("left"))
        self.task = self.bar.add_task(
            self.title, total=state.max_steps, completed=state.global_step, status=""
        )
        self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.speed.end()
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, status=self._status())

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        self.evaluated += 1
        if state.is_world_process_zero:
            self.say_within(f"held-out text {self.evaluated}/{len(eval_dataloader)}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.evaluated = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self.loss = (logs or {}).get("loss", self.loss)
        if state.is_world_process_zero and not self.console.is_terminal and "loss" in (logs or {}):
            seconds = (state.max_steps - state.global_step) * self.speed.median()
            self._print(
                f"step {state.global_step}/{state.max_steps}  {self._status()}  "
                f"{seconds:.0f} s left of it"
            )

    def say_within(self, status: str) -> None:
        """Say how far an evaluation is: beside the bar, or in a line if the last is long ago."""
        if self.bar is not None:
            self.bar.update(self.task, status=status)
        elif time.monotonic() - self.said >= SECONDS_BETWEEN_LINES:
            self._print(status)

    def _print(self, line: str) -> None:
        self.said = time.monotonic()
        print(f"{self.title}  {line}", flush=True)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _status(self) -> str:
        speed = f"{self.speed.per_second():,.0f} {self.speed.unit}s/s"
        return f"loss {self.loss:.3f}  {speed}"
