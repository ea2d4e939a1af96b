"""Balancing by biases in converted models: when they move, by what, and that nothing is lost."""

import copy
from dataclasses import replace

import pytest
import torch
from conversions import MH_MOE, MOE
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from headwise import convert, record_routing, update_biases
from headwise.hf.checkpointing import checkpoint_activations
from headwise.ops import count_choices

MLP = replace(MH_MOE, scores="sigmoid", bias_rate=0.25)


@pytest.fixture
def model(tiny):
    return convert(tiny(), mlp=MLP).train()


def routers(model):
    return [layer.mlp.layer.router for layer in model.model.layers]


def steps(model, ids, count, checkpointing=False):
    """So many steps of SGD on rows of their own."""
    if checkpointing:
        checkpoint_activations(model)
    for step in range(count):
        rows = ids.roll(step, 0)[: 1 + step % 2]
        model.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    return model


def assert_equal(model, other):
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_forward_in_training_moves_the_biases_by_the_loads_of_the_one_before(
    model, ids, attention_mask
):
    inputs = {"input_ids": ids, "attention_mask": attention_mask, "labels": ids}
    with record_routing(model) as routings:
        model(**inputs)
    loads = [count_choices(routing) for routing in routings.values()]
    assert all(load.sum() == attention_mask.sum() * 3 * 2 for load in loads), "padding counted"
    moved = [0.25 * (load.mean() - load).sign() for load in loads]
    for router, load in zip(routers(model), loads, strict=True):
        assert torch.equal(router.load, load)
        assert not router.bias.any()
    with pytest.warns(UserWarning, match="computes no loss"):
        model(input_ids=ids)
    model.eval()(**inputs)
    assert not any(router.bias.any() for router in routers(model)), "not a step of training"
    model.train()(**inputs)
    for router, want in zip(routers(model), moved, strict=True):
        assert torch.equal(router.bias, want)


def test_who_updates_after_each_step_does_not_update_twice(model, ids):
    with record_routing(model) as routings:
        model(input_ids=ids, labels=ids)
    update_biases(model, routings)
    biases = [router.bias.clone() for router in routers(model)]
    assert all(bias.any() for bias in biases)
    model(input_ids=ids, labels=ids)
    assert all(torch.equal(r.bias, b) for r, b in zip(routers(model), biases, strict=True))


def test_checkpointing_changes_nothing(model, ids):
    again = copy.deepcopy(model)
    steps(model, ids, 4)
    steps(again, ids, 4, checkpointing=True)
    assert any(router.bias.any() for router in routers(model))
    assert_equal(again, model)


def test_saved_and_resumed_equals_never_saved(model, ids, tmp_path):
    whole = steps(copy.deepcopy(model), ids, 4)
    steps(model, ids, 2).save_pretrained(tmp_path)
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_equal(resumed, model)
    assert all(router.load.any() for router in routers(resumed))
    steps(resumed.train(), ids.roll(2, 0), 2)
    assert_equal(resumed, whole)


def test_biases_load_exactly_in_another_dtype(model, ids, tmp_path):
    for router in routers(model):
        router.bias.fill_(1.001)
        router.load.fill_(257)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == routers(loaded)[0].weight.dtype == torch.bfloat16
    for half in (loaded, model.bfloat16()):
        for router in routers(half):
            assert torch.equal(router.bias, torch.full((7,), 1.001))
            assert torch.equal(router.load, torch.full((7,), 257.0))


def train_on_half(rank, path, ids, mask):
    """In one of two processes, under what broadcasts the first one's buffers to the other."""
    together = AutoModelForCausalLM.from_pretrained(path).train()
    apart = copy.deepcopy(together)
    checkpoint_activations(apart)
    apart = DistributedDataParallel(apart)
    for _ in range(2):
        together(input_ids=ids, attention_mask=mask, labels=ids)
        rows = {"input_ids": ids[[rank]], "attention_mask": mask[[rank]], "labels": ids[[rank]]}
        apart(**rows).loss.backward()
    for one, other in zip(routers(together), routers(apart.module), strict=True):
        assert one.bias.any()
        assert torch.equal(other.bias, one.bias)
        # Both processes counted all of `together`.
        assert torch.equal(2 * other.load, one.load)
    distributed.barrier()


def test_two_processes_move_the_biases_as_one_would(model, ids, tmp_path, two_processes):
    model.save_pretrained(tmp_path / "model")
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    two_processes(train_on_half, tmp_path / "model", ids, mask)


def test_without_a_rate_nothing_is_stored(tiny, ids):
    model = convert(tiny(), mlp=MOE).train()
    model(input_ids=ids, labels=ids)
    assert not [name for name in model.state_dict() if name.endswith(("router.bias", "load"))]


def test_the_bias_does_not_change_the_loss_of_the_chosen(model, ids):
    """A bias that keeps the choice keeps the model's outputs, bit for bit."""
    want = model.eval()(ids).logits
    for router in routers(model):
        router.bias.fill_(0.5)
    assert_close(model(ids).logits, want, rtol=0, atol=0)
