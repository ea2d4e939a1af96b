"""record_routing: the latest forward, padding marked, right under activation checkpointing."""

import pytest
import torch
from conversions import MH_MOE
from torch.testing import assert_close

from headwise import MHMoE, MoHConfig, convert, record_routing
from headwise.hf.checkpointing import checkpoint_activations
from headwise.nn import Router


@pytest.fixture(params=["two_stage", "one_stage", "query_norm"])
def model(request, tiny):
    attention = MoHConfig(router=request.param, shared=2, active=4, router_std=0.02)
    return convert(tiny(), attention=attention, mlp=MH_MOE, every=2)


def test_keys_are_the_routers_in_the_models_order(model, ids):
    with record_routing(model) as routings:
        assert routings == {}
        model(ids)
    assert list(routings) == [
        "model.layers.0.self_attn.router",
        "model.layers.1.self_attn.router",
        "model.layers.1.mlp.layer.router",
    ]
    assert all(isinstance(model.get_submodule(name), Router) for name in routings)
    heads, _, experts = routings.values()
    assert heads.weights.shape == (2, 7, 6)
    assert ((heads.weights != 0).sum(-1) == 4).all()
    assert experts.indices.shape == (2, 7, 3, 2)


def test_the_latest_of_two_forwards_and_nothing_afterwards(model, ids):
    with record_routing(model) as routings:
        model(ids)
        first = dict(routings)
        model(ids[:, :3])
    model(ids)
    assert len(routings) == 3
    assert {r.indices.shape[1] for r in first.values()} == {7}
    assert {r.indices.shape[1] for r in routings.values()} == {3}


def test_a_forward_that_fails_leaves_no_hook_behind(model, ids):
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with record_routing(model) as routings:
        model(ids)
        with pytest.raises(IndexError):
            model(ids + 31)
        assert routings == {}, "of a forward before the latest"
        model(ids)
    assert len(routings) == 3
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_padding_is_marked(model, ids, attention_mask):
    with record_routing(model) as routings:
        model(input_ids=ids, attention_mask=attention_mask)
    real = attention_mask.bool()
    for routing in routings.values():
        assert routing.mask[real].all()
        assert not routing.mask[~real].any()
        assert (routing.indices[~real] == -1).all()
        assert (routing.weights[~real] == 0).all()
        assert (routing.indices[real] >= 0).all()


def test_padding_is_marked_from_a_positional_attention_mask(model, ids, attention_mask):
    with record_routing(model) as routings:
        model(ids, attention_mask)
    assert all(routing.mask is not None for routing in routings.values())


def test_a_mask_of_ones_marks_no_padding(model, ids):
    with record_routing(model) as routings:
        model(ids, attention_mask=torch.ones_like(ids))
    assert all(routing.mask.all() for routing in routings.values())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_four_dimensions_says_what_is_seen_not_what_is_padding(model, ids, dtype):
    seen = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    mask = seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -1e30)
    with record_routing(model) as routings:
        logits = model(ids, attention_mask=mask).logits
    assert all(routing.mask is None for routing in routings.values())
    assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_with_a_cache_the_mask_is_longer_than_the_queries(model, ids, attention_mask):
    cache = model(ids[:, :2], attention_mask=attention_mask[:, :2], use_cache=True).past_key_values
    with record_routing(model) as routings:
        model(ids[:, 2:], attention_mask=attention_mask, past_key_values=cache)
    real = attention_mask[:, 2:].bool()
    for routing in routings.values():
        assert routing.indices.shape[:2] == (2, 5)
        assert torch.equal((routing.indices >= 0).flatten(2).all(-1), real)


def test_generation_holds_the_last_step(model, ids):
    with record_routing(model) as routings:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert {r.indices.shape[1] for r in routings.values()} == {1}


def test_any_module_with_routers_can_be_recorded():
    layer = MHMoE(15, num_heads=3, num_experts=7, top_k=2, expert_dim=11)
    with record_routing(layer) as routings:
        _, routing = layer(torch.randn(2, 7, 15))
    assert routings["router"] is routing


def step(model, ids, **kwargs):
    """Loss, gradients and recorded routings of one training step."""
    model.zero_grad()
    with record_routing(model) as routings:
        loss = model(input_ids=ids, labels=ids, **kwargs).loss
        forward = dict(routings)
        loss.backward()
    assert routings == forward, "the backward pass recorded again"
    return loss.detach(), [p.grad.clone() for p in model.parameters()], routings


@pytest.mark.parametrize("padded", [False, True])
def test_checkpointing_counts_once_and_changes_no_gradient(model, ids, padded):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0 if padded else 1
    model.train()
    loss, gradients, routings = step(model, ids, attention_mask=mask)
    runs = []
    model.get_submodule(next(iter(routings))).register_forward_hook(lambda *_: runs.append(1))
    checkpoint_activations(model)
    again_loss, again_gradients, again = step(model, ids, attention_mask=mask)
    assert len(runs) == 2, "the layer was not computed again, so this tests nothing"
    assert list(again) == list(routings)
    assert torch.equal(again_loss, loss)
    assert_close(again_gradients, gradients)


def test_reentrant_checkpointing_is_refused(model, ids):
    checkpoint_activations(model.train(), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"layers\.0.*reentrant.*use_reentrant=False"):
        model(input_ids=ids, labels=ids)
    with record_routing(model), pytest.raises(RuntimeError, match="reentrant"):
        model(input_ids=ids)
    assert model.eval()(ids).logits.isfinite().all()


def test_recording_without_gradients(model, ids):
    with torch.no_grad(), record_routing(model) as routings:
        model(ids)
    assert len(routings) == 3
    assert not any(r.probabilities.requires_grad for r in routings.values())
