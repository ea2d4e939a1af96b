"""The decoder with heads of any widths: Llama where they are equal, and what it promises else."""

import re

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, LlamaForCausalLM

import tiny
from gradients import assert_checkpointing_changes_none
from headwise import MoHConfig, convert, record_routing
from headwise.loading import load_causal_lm
from headwise.models import DecoderConfig, DecoderForCausalLM

B, T, V = 2, 7, 31
ROUTED = {"shared_heads": 1, "active_heads": 3}
SIZES = {
    "vocab_size": V, "hidden_size": 23, "intermediate_size": 29, "num_hidden_layers": 2,
    "head_dims": (5, 4, 5, 4, 7), "rotary_dim": 4,
}  # fmt: skip
MODELS = {"dense": {}, "moh": ROUTED, "equal": {"head_dims": (5,) * 5}}
ALL = pytest.mark.parametrize("name", MODELS)


def decoder(**changes):
    """Its weights are drawn wider than it starts, so that heads differ."""
    torch.manual_seed(0)
    config = DecoderConfig(**SIZES | {"initializer_range": 0.3, "router_std": 0.5} | changes)
    return DecoderForCausalLM(config).eval()


def ids(*shape):
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(1))


def as_llama(**changes):
    """A Llama, converted where changes say so, and a decoder of ours with its weights."""
    llama = tiny.llama(vocab_size=V, initializer_range=0.3, tie_word_embeddings=True).eval()
    heads = {"head_dims": (4,) * 6, "rotary_dim": 4, "hidden_size": 24}
    if changes:
        routed = MoHConfig(router="two_stage", shared=1, active=3, router_std=0.5)
        llama, heads = convert(llama, attention=routed), heads | changes
    ours, names = decoder(**heads), {
        "model.": "", "self_attn": "attention", "post_attention_layernorm": "mlp_norm",
        "input_layernorm": "attention_norm",
    }  # fmt: skip
    state = {}
    for name, weight in llama.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = weight
    ours.load_state_dict(state)
    return llama, ours


@pytest.mark.parametrize("changes", [{}, ROUTED], ids=["dense", "moh"])
def test_with_equal_heads_it_is_a_llama(changes):
    llama, ours = as_llama(**changes)
    assert isinstance(llama, LlamaForCausalLM)
    mask, x = torch.ones(B, T, dtype=torch.long), ids(B, T)
    mask[0, :3] = 0
    given = {"input_ids": x, "attention_mask": mask}
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    want = llama(**given, position_ids=positions).logits
    assert_close(ours(**given).logits[mask == 1], want[mask == 1])
    losses = [model.train()(x, labels=x).loss for model in (ours, llama)]
    assert_close(*losses)
    assert (losses[0] != ours.eval()(x, labels=x).loss) == bool(changes), "the balance losses"


@ALL
def test_outputs_do_not_depend_on_batch_mates_padding_and_later_tokens(name):
    model, x = decoder(**MODELS[name]), ids(B, T)
    want = model(x).logits
    assert_close(model(x[:1]).logits, want[:1])
    later = torch.cat([x[:, :4], (x[:, 4:] + 3) % V], dim=1)
    assert_close(model(later).logits[:, :4], want[:, :4])
    mask = torch.ones(B, T + 3, dtype=torch.long)
    for side in (slice(None, 3), slice(T, None)):
        padded = mask.clone()
        padded[:, side] = 0
        garbage = torch.full((B, T + 3), 17)
        garbage[padded == 1] = x.flatten()
        y = model(garbage, attention_mask=padded).logits
        assert_close(y[padded == 1], want.flatten(0, 1))


@ALL
def test_it_saves_and_loads_as_language_models_do(name, tmp_path):
    model, x = decoder(**MODELS[name]), ids(B, T)
    model.save_pretrained(tmp_path)
    again = load_causal_lm(tmp_path).eval()
    assert type(again) is DecoderForCausalLM
    assert AutoConfig.from_pretrained(tmp_path).head_dims == model.config.head_dims
    assert again.lm_head.weight is again.embed_tokens.weight
    assert torch.equal(again(x).logits, model(x).logits)


@ALL
def test_it_writes_the_likeliest_tokens(name):
    model, x = decoder(**MODELS[name], bos_token_id=0, eos_token_id=V - 1), ids(1, T)
    want = x
    with torch.no_grad():
        for _ in range(3):
            want = torch.cat([want, model(want).logits[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(x, **options), want)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), x], dim=1)
    mask = (torch.arange(T + 2) >= 2).long()[None]
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 2:], want)


@ALL
def test_a_step_reaches_every_parameter(name):
    model, x = decoder(**MODELS[name]).train(), ids(5, 17)
    model(x, labels=x).loss.backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_balance_losses_join_in_training_and_routers_are_recorded():
    model, x = decoder(**ROUTED, balance_coefficient=0.3), ids(B, T)
    plain = model(x, labels=x).loss
    with record_routing(model) as routings:
        loss = model.train()(x, labels=x).loss
    assert [*routings] == ["layers.0.attention.router", "layers.1.attention.router"]
    assert_close(loss, plain + model.routing_loss(routings))
    with record_routing(decoder()) as none:
        decoder()(x)
    assert none == {}


@ALL
def test_gradients_of_parts_add_up_to_those_of_the_batch(name):
    """With num_items_in_batch, as Trainer accumulates; in eval mode, without balance losses."""
    model, x = decoder(**MODELS[name]).double(), ids(B, T)
    labels = x.clone()
    labels[0, :3] = -100
    model(x, labels=labels).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for row, label in zip(x, labels, strict=True):
        model(row[None], labels=label[None], num_items_in_batch=torch.tensor(10)).loss.backward()
    assert_close({n: p.grad for n, p in model.named_parameters()}, want)


@ALL
def test_gradient_checkpointing_changes_no_gradient(name):
    x = ids(B, T)
    assert_checkpointing_changes_none(
        lambda: decoder(**MODELS[name]).train(), lambda model: model(x, labels=x).loss
    )


def test_weights_start_as_the_config_says():
    model = decoder(**ROUTED, hidden_size=101, initializer_range=0.05, router_std=0.5)
    for name, weight in model.named_parameters():
        std = 0 if "norm" in name else 0.5 if "router" in name else 0.05
        assert weight.std().item() == pytest.approx(std, rel=0.2), name
        assert "norm" not in name or (weight == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dims": ()}, "head_dims is (); it must have an entry for each head"),
        ({"head_dims": (5, 0)}, "head_dims[1] is 0; it must be at least 1"),
        ({"rotary_dim": 3}, "rotary_dim is 3; it must be even, and at most min(head_dims) = 4"),
        ({"rotary_dim": 6}, "rotary_dim is 6; it must be even, and at most min(head_dims) = 4"),
        ({"shared_heads": 1}, "shared_heads is 1 and active_heads is None; give both"),
        ({"shared_heads": 4, "active_heads": 3}, "shared_heads is 4, more than active_heads = 3"),
        ({"use_cache": True}, "use_cache is True; the model has no cache, so it must be False"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_impossible_sizes_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DecoderConfig(**SIZES | changes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.zeros(T).long()}, "input_ids has shape [7]; it must be [B, T]"),
        ({"input_ids": torch.zeros(B, T)}, "input_ids is torch.float32; it must be an integer"),
        ({"attention_mask": torch.ones(B, 3)}, "attention_mask has shape [2, 3]; it must be [2, 7"),
        ({"labels": torch.zeros(B, 3).long()}, "labels has shape [2, 3]; it must be [2, 7]"),
        ({"use_cache": True}, "use_cache is True; the model has no cache"),
    ],
)
def test_wrong_inputs_are_refused_by_name(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        decoder()(**{"input_ids": ids(B, T)} | given)
