"""Training towards what another model predicts, and how much of that model's quality is there."""

import math
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from torch.utils.data import DataLoader

from headwise.training.trainer import SafeTrainer


class RecoveringTrainer(SafeTrainer):
    """Adds distillation to the loss, and to each evaluation the perplexity and what it recovers.

        loss = loss of the model + distill · KL(original ‖ model), mean over the labelled tokens
        recovery = 100 % · perplexity of the original / perplexity of the model

    Args:
        original: A model of the same vocabulary, to learn from and to be measured by.
        distill: Factor of the divergence; 0 for none.
    """

    def __init__(self, *args: Any, original: nn.Module, distill: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.original, self.distill = self._placed(original), distill

    def _placed(self, original: nn.Module) -> nn.Module:
        """On the device, or over the devices in shards as the model itself."""
        original.eval().requires_grad_(False)
        if self.is_fsdp_enabled:
            return fsdp2_prepare_model(self.accelerator, original)
        return original.to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """transformers' own, and in training the divergence from the original."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.distill and model.training:
            wanted = self._of_original(inputs).logits
            nats, tokens = divergence(outputs.logits, wanted, inputs["labels"])
            # As the model's own loss: a share of the whole batch's, over all processes.
            items = tokens if num_items_in_batch is None else num_items_in_batch
            processes = 1 if num_items_in_batch is None else self.accelerator.num_processes
            loss = loss + self.distill * nats * processes / items
        return (loss, outputs) if return_outputs else loss

    @cached_property
    def original_loss(self) -> float:
        """Mean loss of the original on the evaluation dataset, in nats per token."""
        nats = tokens = 0.0
        # Every process takes all of it: one that has shards of the model must be there for each.
        batches = DataLoader(
            self.eval_dataset, self.args.per_device_eval_batch_size, collate_fn=self.data_collator
        )
        for done, batch in enumerate(batches, start=1):
            counted = (batch["labels"][:, 1:] != -100).sum().item()
            nats += counted * self._of_original(self._prepare_inputs(batch)).loss.item()
            tokens += counted
            if self.is_world_process_zero():
                self.progress.say_within(f"the original on held-out text {done}/{len(batches)}")
        return nats / tokens

    @torch.no_grad()
    def _of_original(self, inputs: dict[str, Any]) -> Any:
        with self.accelerator.autocast():
            return self.original(**inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """transformers' own; an evaluation gains `eval_perplexity` and `eval_recovery` (%)."""
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(logs["eval_loss"])
            logs["eval_recovery"] = 100 * math.exp(self.original_loss - logs["eval_loss"])
            if self.is_world_process_zero():
                self.progress.console.print(
                    f"{self.progress.title}  step {self.state.global_step}  perplexity "
                    f"{logs['eval_perplexity']:.4g}, {logs['eval_recovery']:.1f} % of the original"
                )
        super().log(logs, start_time)


def divergence(logits: Tensor, wanted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """KL(softmax(wanted) ‖ softmax(logits)) in nats, summed over the labelled tokens; and how many.

    Position t predicts the label of t + 1; a label of -100 does not count.

    Args:
        logits: [B, T, V], of the model that learns.
        wanted: [B, T, V], of the teacher.
        labels: [B, T].
    """
    counted = labels[:, 1:] != -100
    p = log_softmax(wanted[:, :-1][counted].float(), dim=-1)
    q = log_softmax(logits[:, :-1][counted].float(), dim=-1)
    return kl_div(q, p, reduction="sum", log_target=True), counted.sum()
