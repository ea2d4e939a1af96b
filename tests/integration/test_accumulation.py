"""Gradient accumulation with SafeTrainer and a converted model."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainingArguments, default_data_collator

from headwise import MHMoEConfig, MoHConfig, convert
from headwise.training.trainer import SafeTrainer
from tiny import llama

ROWS = torch.randint(0, 31, (64, 7), generator=torch.Generator().manual_seed(0))


def trained(output: Path, balance: float, batch: int, accumulation: int, steps: int = 2):
    """Losses and weights after some steps of plain gradient descent."""
    model = convert(
        llama(hidden_size=16, num_attention_heads=4, num_key_value_heads=2),
        attention=MoHConfig(balance_coefficient=balance, router="two_stage", router_std=0.02),
        mlp=MHMoEConfig(
            num_heads=2, num_experts=5, top_k=2, expert_dim=8, balance_coefficient=balance
        ),
    )
    arguments = TrainingArguments(
        output_dir=str(output / f"{balance} {batch}"), per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, max_steps=steps, max_grad_norm=0,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = SafeTrainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ROWS],
        data_collator=default_data_collator,
        optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
        title="tiny",
        per_step=28,
    )
    trainer.train()
    losses = torch.tensor([x["loss"] for x in trainer.state.log_history if "loss" in x])
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def test_two_micro_batches_equal_one_batch_of_double_size(tmp_path):
    assert_close(trained(tmp_path, 0.0, 2, 2), trained(tmp_path, 0.0, 4, 1))


def test_balance_loss_is_averaged_over_micro_batches(tmp_path):
    (without,), _ = trained(tmp_path, 0.0, 2, 2, steps=1)
    (with_balance,), _ = trained(tmp_path, 1.0, 2, 2, steps=1)
    # Untrained routers choose almost evenly, where a balance loss is K: 1 head, 2 experts.
    assert (with_balance - without).item() == pytest.approx(1 + 2, abs=0.1)
