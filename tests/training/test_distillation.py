"""The divergence by hand, and a loss that does not depend on how a batch is cut."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, default_data_collator

from headwise.training.distillation import RecoveringTrainer, divergence

CONFIG = LlamaConfig(
    vocab_size=13, hidden_size=8, intermediate_size=11, num_hidden_layers=1, num_attention_heads=2
)


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(CONFIG)


def trainer(tmp_path, distill=0.7, **changes) -> RecoveringTrainer:
    blocks = [{"input_ids": ids, "labels": ids} for ids in torch.randint(13, (3, 5))]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1,
        save_strategy="no", per_device_train_batch_size=3, per_device_eval_batch_size=2, **changes,
    )  # fmt: skip
    return RecoveringTrainer(
        model=model(0), args=arguments, train_dataset=blocks, eval_dataset=blocks,
        data_collator=default_data_collator, title="toy", per_step=15,
        original=model(1), distill=distill,
    )  # fmt: skip


def test_divergence_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2, for the one position that counts."""
    p = torch.tensor([[[3.0, 1.0], [9.0, 1.0], [1.0, 1.0]]]).log()
    nats, tokens = divergence(torch.zeros(1, 3, 2), p, torch.tensor([[0, 1, -100]]))
    assert tokens == 1
    assert nats.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_a_model_does_not_diverge_from_itself():
    logits = torch.randn(2, 5, 13)
    nats, tokens = divergence(logits, logits, torch.randint(13, (2, 5)))
    assert tokens == 8
    assert_close(nats, torch.tensor(0.0))


def test_the_divergence_joins_the_loss_of_training_only(tmp_path):
    it = trainer(tmp_path)
    batch = default_data_collator(it.train_dataset)
    own = it.model(**batch)
    nats, tokens = divergence(own.logits, it.original(**batch).logits, batch["labels"])
    assert_close(it.compute_loss(it.model.train(), batch), own.loss + 0.7 * nats / tokens)
    assert_close(it.compute_loss(it.model.eval(), batch), own.loss)


def test_evaluations_say_how_far_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("headwise.training.trainer.SECONDS_BETWEEN_LINES", 0)
    it = trainer(tmp_path)
    for _ in range(2):
        it.evaluate()
    first, of_original = "toy  held-out text {}/2", "toy  the original on held-out text {}/2"
    said = [line for line in capsys.readouterr().out.splitlines() if "held-out" in line]
    assert said == [
        *(first.format(n) for n in (1, 2)),
        *(of_original.format(n) for n in (1, 2)),
        *(first.format(n) for n in (1, 2)),
    ]


def test_only_the_model_learns(tmp_path):
    it = trainer(tmp_path, distill=1.0)
    it.train()
    assert_close(dict(it.original.named_parameters()), dict(model(1).named_parameters()))
    assert not torch.equal(it.model.lm_head.weight, model(0).lm_head.weight)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    whole = trainer(tmp_path)
    parts = trainer(tmp_path, gradient_accumulation_steps=3)
    parts.args.per_device_train_batch_size = parts._train_batch_size = 1
    for it in (whole, parts):
        it.train_dataset = whole.train_dataset
        it.train()
    assert_close(dict(parts.model.named_parameters()), dict(whole.model.named_parameters()))


def test_recovery_is_the_originals_perplexity_over_the_models(tmp_path):
    it = trainer(tmp_path)
    metrics = it.evaluate()
    batch = default_data_collator(it.eval_dataset)
    model, original = (m.eval()(**batch).loss.item() for m in (it.model, it.original))
    logged = it.state.log_history[-1]
    assert metrics["eval_loss"] == pytest.approx(model, rel=1e-5)
    assert logged["eval_perplexity"] == pytest.approx(math.exp(model), rel=1e-5)
    assert logged["eval_recovery"] == pytest.approx(100 * math.exp(original - model), rel=1e-5)
