"""Static controls: the same heads or experts on for every token; what they cost, and their rows."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from headwise import balance_loss, record_routing
from headwise.loading import load_causal_lm
from headwise.parity import count_flops, count_parameters, measure_flops
from headwise.recipes import train
from headwise.recipes.decoders import build_model
from headwise.recipes.layered import mh_moe
from headwise.recipes.scales import small, tiny
from headwise.recipes.studies import static_heads
from headwise.results.rows import read_csv
from headwise.training.comparison import Variant
from tiny import ONE_STEP, RUN

V, T = 211, 23


def build(study: str, name: str) -> torch.nn.Module:
    run = tiny(study)
    (variant,) = (v for v in run.variants() if v.name == name)
    return build_model(run, variant, vocab_size=V, seed=0)


def static(heads: int) -> torch.nn.Module:
    """As many of the heads of a tiny study, always the same."""
    run = tiny("moh-budget")
    return build_model(run, static_heads(run, heads), vocab_size=V, seed=0)


def flops(model: torch.nn.Module) -> float:
    return sum(count_flops(model, sequence_length=T).values())


def test_every_budget_below_all_has_a_static_control():
    variants = tiny("moh-budget").variants()
    routed, same = (
        {v.position: v for v in variants if v.series == series}
        for series in ("routed", "always the same")
    )
    assert [*same] == [75, 50, 25] == [p for p in routed if p != 100]
    assert [v.num_heads for v in same.values()] == [6, 4, 2]
    assert same[75].name == "static_75"
    assert same[75].label == "6 of 8 heads, always the same"
    on = {p: v.attention.active for p, v in routed.items()}
    assert {p: v.num_heads for p, v in same.items()} == {p: on[p] for p in same}


def test_components_have_the_control_of_as_many_heads_as_are_on():
    eight, twelve = (run("moh-components").variants()[-1] for run in (tiny, small))
    assert (eight.name, eight.num_heads) == ("static_75", 6)
    assert (twelve.name, twelve.num_heads) == ("static_75", 9)


@pytest.mark.parametrize("heads", [6, 5])
def test_a_static_control_costs_what_its_heads_cost(heads):
    dense, fewer = build("moh-budget", "dense"), static(heads)
    off = 8 - heads
    # In 4 layers, of each head that is off: 12 channels of four matrices of width 96, and two
    # products of 12 channels with (T + 1) / 2 keys.
    assert flops(dense) - flops(fewer) == 4 * off * (2 * 4 * 12 * 96 + 4 * 12 * (T + 1) / 2)
    parameters = [count_parameters(model) for model in (dense, fewer)]
    assert parameters[0][0] - parameters[1][0] == 4 * off * 4 * 12 * 96
    assert parameters[1][0] == parameters[1][1], "all are active"
    with torch.no_grad():
        ids = torch.zeros(1, T, dtype=torch.long)
        assert measure_flops(lambda: fewer(input_ids=ids)) / T == pytest.approx(flops(fewer))


def test_heads_that_do_not_divide_the_width_are_computed_as_llamas_are():
    """Five heads of eight; the same numbers as eight of which three write nothing."""
    fewer, all_heads = static(5), build("moh-budget", "dense")
    assert isinstance(all_heads, LlamaForCausalLM)
    state = fewer.state_dict()
    for name, weight in all_heads.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            state[name] = torch.cat([state[name], weight[60:]])
        elif name.endswith("o_proj.weight"):
            state[name] = torch.cat([state[name], torch.zeros(96, 36)], dim=1)
    all_heads.load_state_dict(state)
    ids = torch.randint(0, V, (2, T))
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).logits for model in (fewer, all_heads)]
    assert_close(*logits)


def test_as_many_heads_as_the_run_has_are_the_dense_model():
    run = tiny("moh-budget")
    same = Variant(name="same", label="same", num_heads=8)
    models = [
        build_model(run, variant, vocab_size=V, seed=0) for variant in (run.variants()[0], same)
    ]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    plain = LlamaConfig(hidden_size=96, num_attention_heads=8)
    assert models[1].config.head_dim == plain.head_dim


def test_the_control_of_mh_moe_sends_every_sub_token_to_the_same_experts():
    static, routed = (build("mhmoe-main", name) for name in ("mh_moe_2_static", "mh_moe_2"))
    assert flops(static) == pytest.approx(flops(routed), rel=0.005)
    config = mh_moe(tiny("mhmoe-main"), heads=2, top_k=2)
    of_static, of_routed = (dict(model.named_modules()) for model in (static, routed))
    experts = "model.layers.1.mlp.layer.experts"
    assert of_static[experts].down_proj.shape[0] == 2
    assert of_routed[experts].down_proj.shape[0] == config.num_experts > 2
    assert of_static[experts].down_proj.shape[1:] == of_routed[experts].down_proj.shape[1:]
    assert count_parameters(static)[0] == count_parameters(static)[1], "all are active"


def test_balancing_a_router_without_a_choice_moves_nothing():
    model = build("mhmoe-main", "mh_moe_2_static").double()
    with record_routing(model) as routings:
        model(input_ids=torch.randint(0, V, (2, T)))
    losses = [balance_loss(routing) for routing in routings.values()]
    # Each of two experts has every sub-token, so the loss is 2 · (1 · p + 1 · (1 - p)).
    assert [loss.item() for loss in losses] == pytest.approx([2.0, 2.0])
    sum(losses).backward()
    gradients = [p.grad.abs().max().item() for p in model.parameters() if p.grad is not None]
    assert max(gradients) < 1e-15


def test_rows_say_how_many_heads_are_on_and_which_line_a_model_is_of(numbers, tmp_path):
    models = ("dense", "moh_75", "moh_50", "static_75", "static_50")
    fields = RUN | ONE_STEP | {"num_heads": 8, "data": numbers, "protocol": "plain", "workers": 1}
    study = dataclasses.replace(tiny("moh-budget"), models=models, seeds=(0,), **fields)
    run = dataclasses.replace(study, output=tmp_path / "run")
    train(run)
    rows = {row["model"]: row for row in read_csv(run.output / "results.csv")}
    shares = {name: float(row["active_heads"]) for name, row in rows.items()}
    assert shares == {
        "dense": 1.0, "moh_75": 0.75, "moh_50": 0.5, "static_75": 0.75, "static_50": 0.5,
    }  # fmt: skip
    lines = {name: row["series"] for name, row in rows.items()}
    static = "always the same"
    assert lines == {
        "dense": "", "moh_75": "routed", "moh_50": "routed", "static_75": static,
        "static_50": static,
    }  # fmt: skip
    model = load_causal_lm(run.output / "models" / "static_75-seed0")
    assert model.config.num_attention_heads == 6
