"""Routing replay: the choice of one engine in another, scores and gradients of the other."""

from dataclasses import replace

import pytest
import torch
from conversions import GROUPS, LEARNED, MH_MOE, MOE, QUERY_NORM, TWO_STAGE

from headwise import MoHAttention, MoHConfig, convert, record_routing, replay_routing
from headwise.hf.checkpointing import checkpoint_activations

SPARSE = MoHConfig(router="two_stage", scores="sparsemax", shared=2, active=5, router_std=1.0)
CONVERSIONS = {
    "two_stage": {"attention": TWO_STAGE},
    "paper": {"attention": replace(TWO_STAGE, mode="paper")},
    "one_stage": {"attention": replace(TWO_STAGE, router="one_stage")},
    "query_norm": {"attention": QUERY_NORM},
    "groups": {"attention": GROUPS},
    "sparsemax": {"attention": SPARSE},
    "experts": {"mlp": MOE},
    "sub-tokens": {"mlp": MH_MOE},
    "cosine": {"mlp": replace(MH_MOE, router="cosine")},
    "sigmoid": {"mlp": replace(MOE, scores="sigmoid", bias_rate=0.1)},
    "both": {"attention": LEARNED, "mlp": MH_MOE},
}


@pytest.fixture(params=CONVERSIONS.values(), ids=CONVERSIONS)
def model(request, tiny):
    return convert(tiny(), **request.param)


def recorded(model, *args, **kwargs):
    with record_routing(model) as routings:
        output = model(*args, **kwargs)
    return output, dict(routings)


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_a_choice_of_its_own_changes_nothing(model, ids):
    output, selection = recorded(model, ids, labels=ids)
    output.loss.backward()
    expected = gradients(model)
    with replay_routing(model, selection):
        again = model(ids, labels=ids)
        again.loss.backward()
    torch.testing.assert_close(again.logits, output.logits)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_replay_makes_two_engines_agree_on_what_was_chosen(model, ids):
    """The other engine's weights are a step behind, so that it would choose otherwise."""
    _, selection = recorded(model, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 * parameter.abs().mean().item())
    _, own = recorded(model, ids)
    assert any(not torch.equal(own[n].indices, r.indices) for n, r in selection.items())
    with replay_routing(model, selection):
        _, replayed = recorded(model, ids)
    for name, routing in selection.items():
        assert torch.equal(replayed[name].indices, routing.indices)
        first = name == next(iter(selection))
        # Of the first layer, which reads the same; scores are the engine's own.
        if first and "self_attn" in name:
            torch.testing.assert_close(replayed[name].probabilities, own[name].probabilities)
    model(ids)
    assert all(torch.equal(recorded(model, ids)[1][n].indices, own[n].indices) for n in own)


def test_a_choice_that_is_not_the_best_gets_the_gates_of_its_scores():
    """Against the equation: released gates are 2·a2·K·p·m / sum(p·m) of whatever m is."""
    torch.manual_seed(0)
    layer = MoHAttention(24, num_heads=6, shared_heads=2, active_heads=4)
    x = torch.randn(2, 7, 24)
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.normal_()
    _, routing = layer(x)
    worst = routing.probabilities.argsort(-1)[..., :2]
    selection = {"router": routing._replace(indices=worst)}
    with replay_routing(layer, selection):
        _, replayed = layer(x)
    p = routing.probabilities * torch.zeros_like(routing.probabilities).scatter(-1, worst, 1.0)
    stage = (x @ layer.router.stage.weight.T).softmax(-1)[..., 1:]
    torch.testing.assert_close(
        replayed.weights[..., 2:], 2 * stage * 2 * p / p.sum(-1, keepdim=True)
    )
    assert torch.equal(replayed.weights[..., :2], routing.weights[..., :2])


def test_layers_that_are_computed_again_choose_the_same(tiny, ids):
    model = convert(tiny(), attention=TWO_STAGE, mlp=MH_MOE).train()
    _, selection = recorded(model.eval(), ids)
    model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.normal_()
    with replay_routing(model, selection):
        model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    checkpoint_activations(model)
    with replay_routing(model, selection):
        model(ids, labels=ids).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_padding_of_the_selection_does_not_matter(tiny, ids, attention_mask):
    model = convert(tiny(), attention=TWO_STAGE, mlp=MH_MOE)
    output, selection = recorded(model, ids, attention_mask=attention_mask)
    with replay_routing(model, selection):
        again = model(ids, attention_mask=attention_mask)
    real = attention_mask.bool()
    torch.testing.assert_close(again.logits[real], output.logits[real])


def test_another_models_selection_is_refused(tiny, ids):
    model = convert(tiny(), attention=TWO_STAGE)
    _, selection = recorded(model, ids)
    name = next(iter(selection))
    rest = {key: routing for key, routing in selection.items() if key != name}
    for wrong, message in (
        (rest, f"the model has a router '{name}', and the selection has none of that name"),
        ({**selection, "other": selection[name]}, "the selection has a router 'other'"),
        ({}, "the model has a router"),
        ([1], r"selection is \[1\]; it must be"),
    ):
        with pytest.raises(ValueError, match=message), replay_routing(model, wrong):
            pass
    fewer = convert(tiny(), attention=replace(TWO_STAGE, active=3))
    with replay_routing(fewer, selection), pytest.raises(ValueError, match="indices has shape"):
        fewer(ids)
    with replay_routing(model, selection), pytest.raises(ValueError, match="indices has shape"):
        model(ids[:, 1:])
    other = {n: r._replace(probabilities=r.probabilities[..., :3]) for n, r in selection.items()}
    with (
        replay_routing(model, other),
        pytest.raises(ValueError, match="is of 3 candidates; the router has 4"),
    ):
        model(ids)
    beyond = {n: r._replace(indices=r.indices + 9) for n, r in selection.items()}
    with (
        replay_routing(model, beyond),
        pytest.raises(ValueError, match=r"indices holds 9 to \d+; they must lie in -1\.\.3"),
    ):
        model(ids)
