"""Trainers that compute the loss themselves: TRL's, sentence-transformers', Trainer's own ways."""

from dataclasses import replace

import pytest
import torch
from conversions import LEARNED, MH_MOE
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    Trainer,
    TrainingArguments,
)

from headwise import add_balance_loss, convert, load, record_routing
from headwise.hf.batching import IS_SUPPORTED
from tiny import LINES, SIZES, tokenizer

trl = pytest.importorskip("trl", reason="trl is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
ATTENTION = replace(LEARNED, balance_coefficient=0.7)
QUIET = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
STEP = QUIET | {
    "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3, "logging_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def words():
    made = tokenizer(LINES, pad_token="<pad>")
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return made


def converted(words, kind=LlamaForCausalLM, **changes):
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(words), "pad_token_id": words.pad_token_id} | changes
    return convert(kind(LlamaConfig(**sizes)), attention=ATTENTION, mlp=MH_MOE)


def check_routers_learn(trainer):
    model = trainer.model
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".router." in n}
    trainer.train()
    after = dict(model.named_parameters())
    assert before
    assert all(not torch.equal(after[name], value) for name, value in before.items())


CHOICES = [{"prompt": f"line {i}", "chosen": " yes it is", "rejected": " no"} for i in range(8)]
TEXTS = [{"text": f"line {i} and {i + 1}"} for i in range(8)]
KTO = [{"prompt": f"line {i}", "completion": " yes", "label": i % 2 == 0} for i in range(8)]


def saved(model, path):
    model.save_pretrained(path / "model")
    return str(path / "model")


def sft(model, words, path, **options):
    arguments = trl.SFTConfig(path, **STEP, max_length=32, **options)
    data = Dataset.from_list(TEXTS)
    return trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=words)


def dpo(model, words, path, **options):
    model = saved(model, path)  # from where the reference model is loaded, too
    arguments = trl.DPOConfig(path, **STEP, max_length=32, **options)
    data = Dataset.from_list(CHOICES)
    return trl.DPOTrainer(model, args=arguments, train_dataset=data, processing_class=words)


def kto(model, words, path, **options):
    model = saved(model, path)
    arguments = trl.KTOConfig(path, **STEP, max_length=32, **options)
    data = Dataset.from_list(KTO)
    return trl.KTOTrainer(model, args=arguments, train_dataset=data, processing_class=words)


def grpo(model, words, path, **options):
    arguments = trl.GRPOConfig(path, **STEP, max_completion_length=5, num_generations=2, **options)
    data = Dataset.from_list([{"prompt": f"line {i}"} for i in range(8)])
    return trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=arguments,
        train_dataset=data,
        processing_class=words,
    )


TRAINERS = {"sft": sft, "dpo": dpo, "kto": kto, "grpo": grpo}


@pytest.mark.works_with("TRL", "SFT, DPO, KTO and GRPO add and log the balance loss")
@pytest.mark.parametrize("build", TRAINERS.values(), ids=TRAINERS)
def test_trl_adds_and_logs_the_balance_loss(words, tmp_path, build):
    model = converted(words)
    trainer = build(model, words, tmp_path)
    check_routers_learn(trainer)
    logged = [entry["aux_loss"] for entry in trainer.state.log_history if "aux_loss" in entry]
    assert len(logged) == 2
    assert all(0 < value < 10 for value in logged)
    with pytest.raises(ValueError, match="which adds the model's aux_loss itself"):
        add_balance_loss(trainer)


@pytest.mark.parametrize("build", TRAINERS.values(), ids=TRAINERS)
def test_trl_leaves_it_out_where_its_coefficient_is_0(words, tmp_path, build):
    trainer = build(converted(words), words, tmp_path, router_aux_loss_coef=0.0)
    trainer.train()
    assert not any("aux_loss" in entry for entry in trainer.state.log_history)


def test_sft_adds_it_once(words, tmp_path):
    model = converted(words)
    trainer = sft(model, words, tmp_path)
    model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with record_routing(model) as routings:
        loss = trainer.compute_loss(model, dict(inputs))
    labels = inputs["labels"]
    plain = load_again(model, tmp_path)(**{k: inputs[k] for k in ("input_ids",)}, labels=labels)
    torch.testing.assert_close(loss - model.routing_loss(routings), plain.loss)


def load_again(model, path):
    model.save_pretrained(path / "again")
    return load(path / "again")


@pytest.mark.works_with("TRL", "trains a directory by its path")
def test_sft_by_path(words, tmp_path):
    converted(words).save_pretrained(tmp_path / "model")
    trainer = sft(str(tmp_path / "model"), words, tmp_path / "run")
    assert type(trainer.model).__name__ == "RoutedLlamaForCausalLM"
    trainer.train()


def test_sft_with_adapters(words, tmp_path):
    from peft import LoraConfig

    arguments = trl.SFTConfig(tmp_path, **STEP, max_length=32)
    trainer = trl.SFTTrainer(
        converted(words), arguments, train_dataset=Dataset.from_list(TEXTS),
        processing_class=words, peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    trainer.train()
    assert all(e["aux_loss"] > 0 for e in trainer.state.log_history if "aux_loss" in e)


@pytest.mark.works_with("TRL", "reward models, by `add_balance_loss`")
def test_reward_models(words, tmp_path):
    model = converted(words, LlamaForSequenceClassification, num_labels=1)
    trainer = trl.RewardTrainer(
        model,
        trl.RewardConfig(tmp_path, **STEP, max_length=32),
        train_dataset=Dataset.from_list(CHOICES),
        processing_class=words,
    )
    check_routers_learn(add_balance_loss(trainer))


@pytest.mark.works_with(
    "transformers", "label smoothing and `compute_loss_func`, by `add_balance_loss`"
)
@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func", "labels"])
@pytest.mark.parametrize("steps", [1, 2])
def test_trainer_adds_it_once(tiny, ids, tmp_path, how, steps):
    """The gradient of the first step, against that of the loss without balance and of balance."""
    model = convert(tiny(), attention=ATTENTION, mlp=MH_MOE)
    again = load_again(model, tmp_path)

    def loss_of(outputs, labels, num_items_in_batch=None):
        return outputs.logits.square().sum() / num_items_in_batch

    arguments = TrainingArguments(
        tmp_path, **QUIET, max_steps=1, gradient_accumulation_steps=steps, max_grad_norm=0.0,
        per_device_train_batch_size=2 // steps, optim="sgd", learning_rate=1.0,
        label_smoothing_factor=0.3 if how == "label_smoothing_factor" else 0.0,
    )  # fmt: skip
    dataset = [{"input_ids": row, "labels": row} for row in ids]

    def trained(model):
        return Trainer(
            model, arguments, train_dataset=dataset,
            compute_loss_func=loss_of if how == "compute_loss_func" else None,
        )  # fmt: skip

    add_balance_loss(trained(model)).train()
    name = "model.layers.0.self_attn.router.routed.weight"
    moved = again.get_parameter(name).detach() - model.get_parameter(name).detach()

    again.config.router_aux_loss_coef = 0.0
    without = load_again(again, tmp_path)
    trained(without).train()
    plain = again.get_parameter(name).detach() - without.get_parameter(name).detach()
    again.train()
    for row in ids.split(2 // steps):
        with record_routing(again) as routings:
            again(row)
        (again.routing_loss(routings) / steps).backward()
    torch.testing.assert_close(moved - plain, again.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


@pytest.mark.works_with("sentence-transformers", "trains and embeds, by `add_balance_loss`")
def test_sentence_transformers(words, tmp_path):
    st = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    converted(words, LlamaModel).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    embedder = st.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    arguments = st.SentenceTransformerTrainingArguments(str(tmp_path / "run"), **STEP)
    pairs = [{"anchor": f"line {i}", "positive": f"line {i} again"} for i in range(8)]
    trainer = st.SentenceTransformerTrainer(
        embedder, arguments, train_dataset=Dataset.from_list(pairs),
        loss=MultipleNegativesRankingLoss(embedder),
    )  # fmt: skip
    check_routers_learn(add_balance_loss(trainer))
    assert embedder.encode(["line 3"]).shape == (1, SIZES["hidden_size"])


def test_a_mixture_of_transformers_keeps_its_own_balance_and_its_coefficient(ids):
    """aux_loss · coefficient is what the loss has of both, as TRL takes it."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    config = Qwen3MoeConfig(
        **SIZES, **experts, num_key_value_heads=2, head_dim=4, router_aux_loss_coef=0.01
    )
    model = convert(Qwen3MoeForCausalLM(config), attention=ATTENTION).train()
    with record_routing(model) as routings:
        output = model(ids, labels=ids, output_router_logits=True)
    plain = model.eval()(ids, labels=ids).loss
    torch.testing.assert_close(output.loss, plain + 0.01 * output.aux_loss)
    of_heads = model.routing_loss(routings)
    torch.testing.assert_close(
        model.train()(ids, labels=ids).loss - of_heads, plain, rtol=1e-4, atol=1e-5
    )
    assert 0.01 * output.aux_loss > of_heads


def test_what_is_no_trainer_of_a_converted_model_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="trainer is a str; it must be a Trainer"):
        add_balance_loss("trainer")
    trainer = Trainer(tiny(), TrainingArguments(tmp_path, **QUIET))
    with pytest.raises(ValueError, match="a LlamaForCausalLM, which holds no converted model"):
        add_balance_loss(trainer)


@pytest.mark.works_with("TRL", "GRPO writes by continuous batching")
@pytest.mark.skipif(not IS_SUPPORTED, reason="transformers is too old")
def test_grpo_writes_by_continuous_batching(words, tmp_path):
    # Otherwise the cache takes most of the memory.
    pages = {"num_blocks": 16}
    trainer = grpo(
        converted(words), words, tmp_path, use_transformers_continuous_batching=True,
        transformers_continuous_batching_config=pages,
    )  # fmt: skip
    check_routers_learn(trainer)
    assert trainer.model.config._attn_implementation == "headwise"
