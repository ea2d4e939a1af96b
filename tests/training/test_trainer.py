"""Real training with SafeTrainer: what is kept when the loss or the disk fails."""

import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from damage import empty, flip_a_bit, halve
from headwise.training.trainer import SafeTrainer
from tiny import llama

ROWS = torch.randint(0, 31, (64, 7), generator=torch.Generator().manual_seed(0))


def small() -> PreTrainedModel:
    return llama(hidden_size=16, num_attention_heads=4, num_key_value_heads=2)


def trainer(
    output: Path, model: PreTrainedModel | None = None, optimizers: tuple = (None, None), **args
) -> SafeTrainer:
    arguments = {
        "max_steps": 6, "save_steps": 2, "save_total_limit": 2, "logging_steps": 1,
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none",
        "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }  # fmt: skip
    return SafeTrainer(
        model=model or small(),
        args=TrainingArguments(output_dir=str(output), **arguments | args),
        train_dataset=[{"input_ids": row, "labels": row} for row in ROWS],
        eval_dataset=[{"input_ids": row, "labels": row} for row in ROWS[:8]],
        data_collator=default_data_collator,
        optimizers=optimizers,
        title="tiny",
        per_step=28,
    )


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def explodes_after(steps: int, model: PreTrainedModel) -> tuple:
    """An optimizer whose learning rate becomes 1e30 after that many steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 if n < steps else 1e33)
    return optimizer, schedule


class AtStep(TrainerCallback):
    """Calls something once, when a step has ended."""

    def __init__(self, step: int, call: Callable[[], object]):
        self.step, self.call = step, call

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.call()


@contextmanager
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Yields a function that sets the size at which every file of this process is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_checkpoints_are_whole_and_the_last_two_stay(tmp_path):
    run = trainer(tmp_path)
    run.train()
    assert entries(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert run.last_checkpoint() == str(tmp_path / "checkpoint-6")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert_close(weights(saved), weights(run.model), rtol=0, atol=0)


def test_checkpoints_do_not_touch_what_else_lies_there(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    trainer(tmp_path).train()
    assert entries(tmp_path) == ["checkpoint-4", "checkpoint-6", "notes.txt"]


def test_leftover_of_a_kill_is_swept_and_never_resumed_from(tmp_path):
    def leave(name: str) -> None:
        leftover = tmp_path / ".partial" / name
        leftover.mkdir(parents=True)
        (leftover / "model.safetensors").write_text("half")

    leave("checkpoint-2")
    run = trainer(tmp_path)
    assert run.last_checkpoint() is None
    run.train()
    assert entries(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    leave("checkpoint-6")  # the last one: no other save comes after it
    trainer(tmp_path).train(resume_from_checkpoint=run.last_checkpoint())
    assert entries(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_resumed_equals_never_stopped(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    stopped = trainer(tmp_path / "stopped")
    stopped.add_callback(AtStep(5, lambda: (_ for _ in ()).throw(KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = trainer(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=resumed.last_checkpoint())
    assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)
    assert [x for x in resumed.state.log_history if "loss" in x] == [
        x for x in whole.state.log_history if "loss" in x
    ]


def test_loss_that_is_not_finite_stops_and_keeps_checkpoints(tmp_path):
    model = small()
    run = trainer(tmp_path, model, explodes_after(4, model), max_steps=8, save_steps=4)
    last = re.escape(str(tmp_path / "checkpoint-4"))
    with pytest.raises(FloatingPointError, match=rf"nan.* at step \d; .* is {last}\."):
        run.train()
    assert entries(tmp_path) == ["checkpoint-4"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert all(p.isfinite().all() for p in saved.parameters())


def test_gradient_that_is_not_finite_reaches_no_checkpoint(tmp_path):
    # With weights of 1e30 the loss is still finite (log 31): the norms make zeros of them.
    model = small()
    run = trainer(tmp_path, model, explodes_after(2, model))
    with pytest.raises(FloatingPointError, match="gradient's norm is nan at step 4"):
        run.train()
    saved = AutoModelForCausalLM.from_pretrained(run.last_checkpoint())
    assert all(p.isfinite().all() for p in saved.parameters())


def test_bad_loss_before_any_checkpoint_says_so(tmp_path):
    with pytest.raises(FloatingPointError, match=r"at step 2; there is no checkpoint yet"):
        trainer(tmp_path, learning_rate=1e30).train()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_full_disk_names_the_last_good_checkpoint(tmp_path, file):
    run, good = trainer(tmp_path), tmp_path / "checkpoint-2"
    with file_size_limit() as set_limit:
        run.add_callback(AtStep(3, lambda: set_limit((good / file).stat().st_size - 1)))
        with pytest.raises(OSError, match="could not be written") as failure:
            run.train()
    assert str(tmp_path / "checkpoint-4") in str(failure.value)
    assert str(failure.value).endswith(f"the last good checkpoint is {good}")
    assert entries(tmp_path) == ["checkpoint-2"]
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(good))
    assert again.state.global_step == 6


@pytest.mark.parametrize("damage", [Path.unlink, empty, halve, partial(flip_a_bit, bit=0)])
def test_damaged_checkpoint_is_named_and_the_one_before_goes_on(tmp_path, damage):
    trainer(tmp_path / "whole").train()
    names = entries(tmp_path / "whole" / "checkpoint-6")
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "manifest.json"} < {*names}
    for name in names:
        run = shutil.copytree(tmp_path / "whole", tmp_path / name)
        broken = run / "checkpoint-6"
        damage(broken / name)
        again = trainer(run, max_steps=8)
        with pytest.raises(ValueError, match=f"^{broken}/.*; delete {broken} to go on") as failure:
            again.train(resume_from_checkpoint=again.last_checkpoint())
        assert name in str(failure.value)
        assert again.state.global_step == 0
    shutil.rmtree(broken)
    again.train(resume_from_checkpoint=again.last_checkpoint())
    assert again.state.global_step == 8


def evaluated(history: list[dict[str, float]]) -> list[float]:
    return [entry["step"] for entry in history if "eval_loss" in entry]


def test_resuming_does_not_evaluate_again_before_the_first_step(tmp_path):
    evaluate = {
        "eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True, "save_steps": 3,
    }  # fmt: skip
    run = trainer(tmp_path, **evaluate)
    run.train()
    whole = run.state.log_history
    shutil.rmtree(tmp_path / "checkpoint-6")
    again = trainer(tmp_path, **evaluate)
    again.train(resume_from_checkpoint=again.last_checkpoint())
    assert evaluated(again.state.log_history) == evaluated(whole) == [0, 4, 6]
