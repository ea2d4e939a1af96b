"""convert(layers=): which layers change, and what the others stay."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conversions import MH_MOE, QUERY_NORM, TWO_STAGE, tiny_dit
from torch.testing import assert_close

import headwise
from headwise import MHMoE, MoHConfig, convert, record_routing, restore
from headwise.hf.surgery import RoutedMLP

LEARNED = replace(TWO_STAGE, router_std=0.5)
FIVE = {"num_hidden_layers": 5}


def routed(model):
    layers = model.model.layers
    return [i for i, layer in enumerate(layers) if hasattr(layer.self_attn, "router")]


def mixtures(model):
    return [i for i, x in enumerate(model.model.layers) if isinstance(x.mlp, RoutedMLP)]


@pytest.mark.parametrize(
    ("layers", "every", "attentions", "mlps"),
    [
        (None, 1, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        (None, 2, [0, 1, 2, 3, 4], [1, 3]),
        ([3, 1], 1, [1, 3], [1, 3]),
        ((0, 2, 3, 4), 2, [0, 2, 3, 4], [2, 4]),
        (range(1, 4), 3, [1, 2, 3], [3]),
    ],
)
@pytest.mark.parametrize("attention", [LEARNED, QUERY_NORM])
def test_these_layers_are_converted(
    tiny, ids, tmp_path, attention, layers, every, attentions, mlps
):
    model = convert(tiny(**FIVE), attention=attention, mlp=MH_MOE, layers=layers, every=every)
    assert (routed(model), mixtures(model)) == (attentions, mlps)
    with record_routing(model) as routings:
        want = model(ids).logits
    assert len(routings) == len(attentions) + len(mlps)
    model.save_pretrained(tmp_path)
    again = headwise.load(tmp_path)
    assert (routed(again), mixtures(again)) == (attentions, mlps)
    assert again.conversion == model.conversion
    assert torch.equal(again(ids).logits, want)
    assert all(type(model.model.layers[i].mlp.layer) is MHMoE for i in mlps)


def test_the_other_layers_compute_what_they_did(tiny, ids):
    dense = tiny(**FIVE)
    dense.set_attn_implementation("sdpa")
    model = convert(copy.deepcopy(dense), attention=QUERY_NORM, layers=[2, 4])
    want = dense(ids, output_hidden_states=True).hidden_states
    got = model(ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(got[i], want[i]) for i in (0, 1, 2))
    assert not torch.equal(got[3], want[3])
    assert torch.equal(restore(model)(ids).logits, dense(ids).logits)


def test_budgets_of_single_layers_keep_the_models_numbers(tiny):
    attention = MoHConfig(shared=(0, 1, 2, 3, 4), active=5)
    model = convert(tiny(**FIVE), attention=attention, layers=[1, 4])
    layers = model.model.layers
    assert [layers[i].self_attn.router.budget.shared_heads for i in (1, 4)] == [1, 4]


def test_training_balances_the_layers_that_route(tiny, ids):
    model = convert(tiny(**FIVE), attention=LEARNED, layers=[1]).train()
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[1].self_attn.router.routed.weight.grad.any()


def test_an_older_version_would_refuse_it(tiny, tmp_path):
    convert(tiny(), attention=QUERY_NORM, layers=[1]).save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())["headwise"]
    assert (kept["format"], kept["layers"]) == (3, [1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0, 2]}, r"layers has 2; the model has 2 layers.* in 0\.\.1"),
        ({"layers": [-1]}, r"layers\[0\] is -1; it must be at least 0"),
        ({"layers": [1, 1]}, r"layers is \[1, 1\]; it must name at least one layer, each once"),
        ({"layers": []}, r"layers is \[\]; it must name at least one layer"),
        ({"layers": [1.0]}, r"layers\[0\] is 1.0; it must be an int"),
        ({"layers": [True]}, r"layers\[0\] is True; it must be an int"),
        ({"layers": 1}, "layers is 1; it must be a list"),
        ({"layers": [1], "every": 2, "mlp": MH_MOE}, "every is 2, but layers names 1 layers"),
        ({"layers": [1], "ternary": True}, r"layers is \[1\]; with ternary=True it must be None"),
    ],
)
def test_what_names_no_layers_is_refused(tiny, options, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        convert(model, attention=QUERY_NORM, **options)
    assert type(model) is type(tiny())
    assert model.state_dict().keys() == tiny().state_dict().keys()


def test_a_model_of_diffusers_too(tmp_path):
    model = tiny_dit(num_layers=3)
    original = type(model)
    inputs = {
        "hidden_states": torch.randn(1, 2, 8, 8), "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([1]),
    }  # fmt: skip
    dense = model(**inputs).sample
    convert(model, attention=MoHConfig(shared=1, active=2), layers=[0, 2])
    attentions = [block.attn1 for block in model.transformer_blocks]
    assert [hasattr(x, "router") for x in attentions] == [True, False, True]
    model.save_pretrained(tmp_path)
    again = headwise.load(tmp_path)
    assert again.conversion.layers == (0, 2)
    # Weights that lie elsewhere in memory are multiplied in another order on some processors.
    assert_close(again(**inputs).sample, model(**inputs).sample)
    back = restore(model)
    assert type(back) is original
    assert torch.equal(back(**inputs).sample, dense)
    back.save_pretrained(tmp_path / "dense")
    original.from_pretrained(tmp_path / "dense")
