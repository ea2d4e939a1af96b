"""Experts fitted to a text: groups of neurons that are active together, and who needs them."""

import copy
import re
from dataclasses import replace

import pytest
import torch
import transformers
from conversions import GROUPED, QUERY_NORM
from torch.testing import assert_close

from headwise import (
    MHMoEConfig,
    MoEConfig,
    MoHConfig,
    convert,
    fit,
    fit_experts,
    load,
    record_routing,
)
from headwise.hf.fitting.grouping import grouped_by_activity
from tiny import llama

MLP_DIM = 40
FITTED = MoEConfig(
    num_experts=6, top_k=3, expert_dim=5, shared_expert_dim=10, router="fitted", experts_from="mlp"
)
SLICES = MoEConfig(num_experts=8, top_k=5, expert_dim=5, experts_from="mlp")
STEPS = 150


def batches(count=12, seed=1):
    """Texts that repeat themselves after 3 to 6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        periods = torch.randint(3, 7, (32, 1), generator=generator)
        tokens = torch.randint(4, 31, (32, 6), generator=generator)
        ids = tokens.gather(1, torch.arange(24) % periods)
        found.append({"input_ids": ids, "labels": ids})
    return found


@pytest.fixture(scope="module", params=["Llama", "Qwen3", "Mistral"])
def trained(request):
    """A model that has learned something."""
    torch.manual_seed(0)
    kind = request.param
    sizes = GROUPED | {"intermediate_size": MLP_DIM}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches(STEPS, seed=0):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


def loss(model):
    with torch.no_grad():
        return sum(model(**given).loss.item() for given in batches(seed=2))


def test_it_loses_less_than_slices_do(trained):
    experts = fit_experts(trained, batches(), FITTED)
    fitted = convert(copy.deepcopy(trained), mlp=experts)
    slices = convert(copy.deepcopy(trained), mlp=SLICES)
    assert loss(trained) < loss(fitted) < loss(slices)


def test_with_every_expert_on_the_model_is_as_it_was():
    model, ids = llama(intermediate_size=MLP_DIM).eval(), torch.randint(31, (3, 11))
    want = model(ids).logits
    convert(model, mlp=fit_experts(model, batches(), replace(FITTED, top_k=6)))
    assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)


def test_a_layer_by_hand():
    """Of the neurons in their order, those of the shared expert and of the chosen ones count."""
    model, x = llama(intermediate_size=MLP_DIM).eval(), torch.randn(1, 1, 24)
    mlp = copy.deepcopy(model.model.layers[1].mlp)
    experts = fit_experts(model, batches(), FITTED)
    order, router = experts.orders[1], experts.routers[1]
    assert sorted(order.tolist()) == list(range(MLP_DIM))
    scores = router["weight"] @ x.flatten() + router["bias"]
    chosen = scores.topk(3).indices
    gates = torch.cat(
        [router["gain"][:2], torch.zeros(6).index_copy(0, chosen, router["gain"][2:][chosen])]
    )
    units = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    kept = torch.zeros_like(units)
    kept[..., order] = units[..., order] * gates.repeat_interleave(5)
    convert(model, mlp=experts)
    with torch.no_grad():
        assert_close(model.model.layers[1].mlp(x), mlp.down_proj(kept), rtol=1e-4, atol=1e-6)


def test_neurons_on_which_the_loss_depends_most_are_shared():
    model = llama(intermediate_size=MLP_DIM).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 7:17] *= 30
    assert sorted(fit_experts(model, batches(), FITTED).orders[0][:10].tolist()) == list(
        range(7, 17)
    )


def test_groups_are_active_for_the_same_tokens():
    profiles = torch.rand(200, 4).repeat(1, 9) + 0.1 * torch.rand(200, 36)
    order = grouped_by_activity(profiles, 4)
    assert all(len(set((group % 4).tolist())) == 1 for group in order.unflatten(0, (4, 9)))
    assert torch.equal(order, grouped_by_activity(profiles, 4))


def test_units_that_are_never_active_are_grouped_too():
    order = grouped_by_activity(torch.zeros(5, 6), 3)
    assert sorted(order.tolist()) == list(range(6))
    assert sorted(grouped_by_activity(torch.rand(5, 6), 1).tolist()) == list(range(6))


def test_it_saves_loads_generates_and_learns(tmp_path):
    model = llama(intermediate_size=MLP_DIM).eval()
    ids = torch.randint(31, (3, 11))
    convert(model, mlp=fit_experts(model, batches(), FITTED))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.conversion == model.conversion
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert {p.dtype for p in load(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    options = {"max_new_tokens": 5, "do_sample": False}
    without = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), without)
    model.train()(**batches(1)[0]).loss.backward()
    learned = [p for name, p in model.named_parameters() if "router" in name or "experts" in name]
    assert all(p.grad.isfinite().all() and p.grad.any() for p in learned)


def test_together_with_heads_and_in_some_layers_only():
    model, given = llama(intermediate_size=MLP_DIM, num_hidden_layers=3).eval(), batches()
    experts = fit_experts(model, given, FITTED, layers=[2, 0])
    heads = fit(model, given, MoHConfig(router="fitted", active=4), layers=[0, 2])
    both = convert(copy.deepcopy(model), attention=heads, mlp=experts)
    assert both.conversion.layers == (0, 2)
    with record_routing(both) as routings, torch.no_grad():
        both(given[0]["input_ids"])
    assert sum("mlp" in name for name in routings) == 2
    every_second = fit_experts(model, given, FITTED, layers=[1])
    convert(copy.deepcopy(model), attention=QUERY_NORM, mlp=every_second, layers=[0, 1], every=2)
    with pytest.raises(ValueError, match=r"mlp was fitted to layers \[1\]; .* not \[0, 1, 2\]"):
        convert(copy.deepcopy(model), mlp=every_second, layers=[0, 1, 2])


def test_without_labels_what_counts_is_the_length_of_what_neurons_add():
    model = llama(intermediate_size=MLP_DIM).eval()
    unlabelled = [{"input_ids": batch["input_ids"]} for batch in batches()]
    convert(model, mlp=fit_experts(model, unlabelled, FITTED))
    with torch.no_grad():
        assert model(**batches(1)[0]).loss.isfinite()


def refuses(message, **changes):
    given = {"model": llama(intermediate_size=MLP_DIM), "batches": batches(), "config": FITTED}
    with pytest.raises(ValueError, match=re.escape(message)):
        fit_experts(**given | changes)


def test_what_it_refuses():
    refuses("router is 'linear'; of what is fitted it must be 'fitted'", config=SLICES)
    refuses("config is None; it must be a MoEConfig", config=None)
    refuses("it must be a model of transformers", model=torch.nn.Linear(1, 1))
    refuses("batches is empty", batches=[])
    short = {name: x[:1, :9] for name, x in batches(1)[0].items()}
    refuses("batches hold 18 tokens to fit to; a score has 25 weights", batches=[short] * 2)
    wide = "shared_expert_dim 10 and 6 experts of 5 are 40 units; with router 'fitted' they must be"
    refuses(wide, model=llama(intermediate_size=41))
    refuses("activation is 'gelu'", config=replace(FITTED, activation="gelu"))
    refuses("layers has 5; the model has 2 layers", layers=[5])
    converted = convert(llama(), attention=MoHConfig())
    refuses("is converted already; fit the original", model=converted)
    with pytest.raises(ValueError, match=r"give what headwise.fit_experts\("):
        convert(llama(intermediate_size=MLP_DIM), mlp=FITTED)
    with pytest.raises(ValueError, match="router is 'fitted'; in an MHMoEConfig"):
        MHMoEConfig(
            num_heads=2, num_experts=6, top_k=3, expert_dim=5, router="fitted", experts_from="mlp"
        )


def test_experts_of_another_model_are_refused_and_nothing_changes():
    experts = fit_experts(llama(intermediate_size=MLP_DIM).eval(), batches(), FITTED)
    other = llama(intermediate_size=MLP_DIM, hidden_size=48)
    before = [name for name, _ in other.named_modules()]
    with pytest.raises(ValueError, match="mlp was fitted to another model"):
        convert(other, mlp=experts)
    assert [name for name, _ in other.named_modules()] == before
