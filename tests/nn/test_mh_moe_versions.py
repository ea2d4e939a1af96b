"""What the two versions of MH-MoE differ in: each option alone does what it says."""

import pytest
import torch
from torch.testing import assert_close

from headwise import MHMoE, MHMoEConfig

B, T, D = 2, 7, 15
SIZES = {"num_heads": 3, "num_experts": 7, "top_k": 2, "expert_dim": 11}
SECOND = MHMoEConfig(**SIZES)
FIRST = MHMoEConfig.first_version(**SIZES)


def pair(sizes=SIZES, common=None, **option):
    """The second version, and the same weights with one option of the first."""
    layers = [MHMoE(D, **sizes | (common or {}) | more).double() for more in ({}, option)]
    layers[1].load_state_dict(layers[0].state_dict(), strict=False)
    return layers


def tokens():
    return torch.randn(B, T, D, dtype=torch.float64)


def test_the_first_version_is_all_of_its_options_and_no_other():
    changed = {name for name in vars(SECOND) if getattr(SECOND, name) != getattr(FIRST, name)}
    assert changed == {
        "bias", "inner_residual", "normalize_top_k", "glu", "activation", "balance_form",
    }  # fmt: skip
    assert FIRST.balance_form == "first_choice"
    built = FIRST.build(D)
    want = MHMoE(
        D, **SIZES, bias=True, inner_residual=True, normalize_top_k=False, glu=False,
        activation="gelu",
    )  # fmt: skip
    want.load_state_dict(built.state_dict())
    x = torch.randn(B, T, D)
    assert torch.equal(built(x)[0], want(x)[0])


def test_the_first_version_as_its_released_code_trained_it():
    released = MHMoEConfig.first_version(
        **SIZES, inner_residual=False, router="cosine", normalize_top_k=True
    )
    assert (released.inner_residual, released.router, released.normalize_top_k) == (
        False, "cosine", True,
    )  # fmt: skip
    assert (released.bias, released.glu, released.balance_form) == (True, False, "first_choice")


def test_biases_shift_what_is_split_and_what_is_merged():
    second, first = pair(bias=True)
    names = set(first.state_dict()) - set(second.state_dict())
    assert names == {"head_proj.bias", "merge_proj.bias"}
    x = tokens()
    assert torch.equal(first(x)[0], second(x)[0]), "they start at 0"
    with torch.no_grad():
        second.head_proj.weight.copy_(torch.eye(D))
        first.head_proj.weight.copy_(torch.eye(D))
        first.head_proj.bias.normal_()
        first.merge_proj.bias.normal_()
    # With a head layer that only shifts, it is the second version on shifted tokens.
    assert_close(first(x)[0], second(x + first.head_proj.bias)[0] + first.merge_proj.bias)


def test_the_inner_residual_adds_what_was_split_before_it_is_merged():
    second, first = pair(inner_residual=True)
    x = tokens()
    (y, routing), (want, want_routing) = first(x), second(x)
    assert_close(y - want, second.merge_proj(second.head_proj(x)))
    assert torch.equal(routing.weights, want_routing.weights)


def test_raw_weights_are_the_probabilities_of_the_chosen():
    second, first = pair(SIZES | {"top_k": 1}, {"merge_layer": False}, normalize_top_k=False)
    x = tokens()
    (y, routing), (want, want_routing) = first(x), second(x)
    best = want_routing.probabilities.amax(-1)
    assert (want_routing.weights == 1).all()
    assert torch.equal(routing.weights[..., 0], best)
    assert_close(y.unflatten(-1, (3, 5)), best.unsqueeze(-1) * want.unflatten(-1, (3, 5)))


def test_two_matrices_are_three_whose_value_is_always_one():
    common = {"head_layer": False, "activation": "gelu"}
    sizes = SIZES | {"num_heads": 1}
    gated, first = (MHMoE(D, **sizes, **common, glu=glu).double() for glu in (True, False))
    x = tokens()
    x[..., 0] = 1
    with torch.no_grad():
        gated.experts.gate_up_proj[:, 11:] = 0
        gated.experts.gate_up_proj[:, 11:, 0] = 1
        state = gated.state_dict()
        state["experts.up_proj"] = state.pop("experts.gate_up_proj")[:, :11]
        first.load_state_dict(state)
    assert_close(first(x)[0], gated(x)[0])


@pytest.mark.parametrize(
    ("activation", "of"), [("gelu", torch.nn.functional.gelu), ("silu", torch.nn.functional.silu)]
)
def test_the_activation_of_an_expert_of_two_matrices(activation, of):
    sizes = SIZES | {"num_experts": 1, "top_k": 1}
    layer = MHMoE(D, **sizes, glu=False, activation=activation).double()
    x = tokens()
    u = layer.head_proj(x).unflatten(-1, (3, 5))
    up, down = layer.experts.first_proj[0], layer.experts.down_proj[0]
    assert_close(layer(x)[0], layer.merge_proj((of(u @ up.T) @ down.T).flatten(2)))


@pytest.mark.parametrize("option", [{"router": "cosine"}, {"scores": "sigmoid"}])
def test_the_router_decides_who_works_and_nothing_else(option):
    # Of one expert there is no choice.
    second, first = pair(SIZES | {"num_experts": 1, "top_k": 1}, **option)
    x = tokens()
    assert torch.equal(first(x)[0], second(x)[0])
    # Of several, what one router decides the other's layer carries out.
    second, first = pair(**option)
    y, routing = first(x)
    assert not torch.equal(routing.weights, second(x)[1].weights)
    second.router.forward = lambda *_: routing
    assert torch.equal(second(x)[0], y)


def test_a_fine_grained_mixture_costs_the_same():
    for config in (SECOND, FIRST):
        coarse = MHMoEConfig(**vars(config) | {"expert_dim": 12})
        fine = coarse.fine_grained(3)
        assert (fine.num_experts, fine.top_k, fine.expert_dim) == (21, 6, 4)
        assert vars(fine) | SIZES | {"expert_dim": 12} == vars(coarse)
        sizes = [sum(p.numel() for p in c.build(D).experts.parameters()) for c in (coarse, fine)]
        assert sizes[0] == sizes[1]
