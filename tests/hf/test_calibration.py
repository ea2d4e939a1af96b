"""calibrate: which heads are named, and a model left as it was."""

import copy
from dataclasses import replace

import pytest
import torch
from conversions import QUERY_NORM, TWO_STAGE

from headwise import MoHConfig, calibrate, convert


@pytest.fixture
def batches(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)},
        {"input_ids": ids.flip(1), "labels": ids.flip(1)},
    ]


def enlarge(model, layer, heads, factor):
    """Make the queries of these heads of a tiny model longer."""
    weight = model.model.layers[layer].self_attn.q_proj.weight.data
    for head in heads:
        weight[4 * head : 4 * head + 4] *= factor


def cut(model, layer, heads):
    """Nothing of these heads is read any more."""
    weight = model.model.layers[layer].self_attn.o_proj.weight.data
    for head in heads:
        weight[:, 4 * head : 4 * head + 4] = 0


def test_the_longest_queries_are_shared(tiny, batches):
    model = tiny()
    enlarge(model, 0, (1, 4), 10)
    enlarge(model, 1, (5, 0), 10)
    assert calibrate(model, batches, QUERY_NORM, by="query_norm").shared == ((1, 4), (0, 5))


def test_heads_that_nobody_reads_are_not_shared(tiny, batches):
    model = tiny()
    cut(model, 0, (0, 2, 3, 5))
    cut(model, 1, (0, 1, 2, 4))
    calibrated = calibrate(model, batches, QUERY_NORM, by="loss")
    # To cut a head may lower the loss of a random model: then one that changes nothing is better.
    alone = {layer: set(heads) for layer, heads in enumerate(calibrated.shared)}
    losses = {}
    for layer, heads in ((0, (1, 4)), (1, (3, 5))):
        for head in heads:
            without = copy.deepcopy(model)
            cut(without, layer, (head,))
            losses[layer, head] = sum(without(**batch).loss.item() for batch in batches)
    whole = sum(model(**batch).loss.item() for batch in batches)
    for (layer, head), loss in losses.items():
        assert (head in alone[layer]) == (loss > whole)


def test_the_gradient_of_a_gate_is_what_scaling_the_head_does_to_the_loss(tiny, batches):
    model = tiny().double()
    calibrated = calibrate(model, batches, QUERY_NORM)
    slopes, step = torch.zeros(2, 6), 1e-4
    for layer, attention in enumerate(module.self_attn for module in model.model.layers):
        weight = attention.o_proj.weight.data
        for head in range(6):
            columns = weight[:, 4 * head : 4 * head + 4]
            kept = columns.clone()
            for batch in batches:
                losses = []
                for sign in (1, -1):
                    columns.copy_(kept * (1 + sign * step))
                    losses.append(model(**batch).loss.item())
                slopes[layer, head] += abs(losses[0] - losses[1]) / (2 * step)
            columns.copy_(kept)
    best = slopes.topk(2).indices.sort().values
    assert calibrated.shared == tuple(tuple(row) for row in best.tolist())


def test_groups_are_named_whole(tiny, batches):
    model = tiny()
    enlarge(model, 0, (3,), 10)
    enlarge(model, 1, (0,), 10)
    config = MoHConfig(router="query_norm", shared=3, active=3, route_groups=True)
    with pytest.raises(ValueError, match="layer 0"):
        calibrate(model, batches, config, by="query_norm")
    model = tiny(num_key_value_heads=3)
    enlarge(model, 0, (3,), 10)
    enlarge(model, 1, (0,), 10)
    config = MoHConfig(router="query_norm", shared=2, active=4, route_groups=True)
    calibrated = calibrate(model, batches, config, by="query_norm")
    assert calibrated.shared == ((2, 3), (0, 1))
    convert(model, attention=calibrated)


def test_budgets_of_layers_stay(tiny, batches):
    config = MoHConfig(router="query_norm", shared=lambda layer, _: layer + 1, active=[4, 5])
    calibrated = calibrate(tiny(), batches, config)
    assert [len(heads) for heads in calibrated.shared] == [1, 2]
    assert calibrated.active == (4, 5)


@pytest.mark.parametrize("by", ["gradient", "loss", "query_norm"])
def test_the_model_is_left_as_it_was(tiny, batches, ids, by):
    model = tiny().train()
    original = copy.deepcopy(model)
    calibrate(model, batches, QUERY_NORM, by=by)
    assert repr(model) == repr(original)
    assert model.training
    assert model.config.to_dict() == original.config.to_dict()
    assert model.config._attn_implementation == original.config._attn_implementation
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(model.eval()(ids).logits, original.eval()(ids).logits)


def test_what_it_refuses(tiny, batches):
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="batches holds Tensor; each must be a dict"):
        calibrate(tiny(), [ids], QUERY_NORM)
    with pytest.raises(ValueError, match="batches holds no labels in a dict; each must"):
        calibrate(tiny(), [{"input_ids": ids}], QUERY_NORM)
    calibrate(tiny(), [{"input_ids": ids}], QUERY_NORM, by="query_norm")
    wrong = {"empty": [], "a NoneType": None, "a Tensor": ids, "a dict": batches[0]}
    for what, given in wrong.items():
        with pytest.raises(ValueError, match=f"batches is {what}; it must be a list of at least"):
            calibrate(tiny(), given, QUERY_NORM)
    with pytest.raises(ValueError, match="shared is 0 in every layer, so there is nothing to cho"):
        calibrate(tiny(), batches, replace(QUERY_NORM, shared=0))
    with pytest.raises(ValueError, match=r"cannot read batches\[0\] \(input_ids \[3\]"):
        calibrate(tiny(), [{"input_ids": ids[0], "labels": "a"}], QUERY_NORM)
    with pytest.raises(ValueError, match="by is 'norm'"):
        calibrate(tiny(), batches, QUERY_NORM, by="norm")
    with pytest.raises(ValueError, match="is converted already; calibrate the original"):
        calibrate(convert(tiny(), attention=QUERY_NORM), batches, QUERY_NORM)
    with pytest.raises(ValueError, match="shared has budgets of 3 layers; the model has 2"):
        calibrate(tiny(), batches, replace(TWO_STAGE, shared=[1, 1, 1]))
