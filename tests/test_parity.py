"""Budgets against the paper's tables, and FLOPs by formula against torch's counter."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headwise import MHMoE, MHMoEConfig, MoE, MoEConfig, MoHAttention, MoHConfig, convert
from headwise.parity import count_flops, count_parameters, match_sparse_moe, measure_flops

B, T = 2, 48
EXPERTS = {"num_experts": 5, "top_k": 2, "expert_dim": 56}


def llama(**changes: object) -> LlamaForCausalLM:
    config = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 6,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config | changes)).eval()


def measured(model: LlamaForCausalLM) -> float:
    """FLOPs per token that torch's counter sees in a forward."""
    ids = torch.randint(0, 97, (B, T))
    with torch.no_grad():
        return measure_flops(lambda: model(ids)) / (B * T)


def by_formula(model: torch.nn.Module) -> float:
    return sum(count_flops(model, sequence_length=T).values())


@pytest.mark.parametrize(("h", "k", "f", "e"), [(2, 2, 768, 41), (3, 3, 512, 93)])
def test_match_equals_the_papers_table(h, k, f, e):
    match = match_sparse_moe(768, 8, 1, 2048, heads=h, top_k_mh=k)
    assert (match.expert_dim, match.num_experts) == (f, e)


def test_default_top_k_is_heads_times_the_sparse_moes():
    assert match_sparse_moe(768, 8, 1, 2048, heads=3) == match_sparse_moe(
        768, 8, 1, 2048, heads=3, top_k_mh=3
    )


def test_two_matrix_experts_follow_equation_8():
    d, f0, k0 = 768, 3072, 2
    match = match_sparse_moe(d, 8, k0, f0, heads=2, top_k_mh=2, glu=False, multiple_of=1)
    assert match.expert_dim == (k0 * f0 - d) / 2
    assert match.flops_ratio == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize(("d", "e0", "k0", "f0", "h"), [(768, 8, 1, 2048, 2), (96, 4, 2, 161, 3)])
def test_ratios_are_those_of_the_layers(glu, d, e0, k0, f0, h):
    match = match_sparse_moe(d, e0, k0, f0, heads=h, glu=glu)
    sparse = MoE(d, num_experts=e0, top_k=k0, expert_dim=f0, glu=glu)
    sizes = {"num_experts": match.num_experts, "expert_dim": match.expert_dim}
    split = MHMoE(d, num_heads=h, top_k=h * k0, glu=glu, **sizes)

    def cost(layer: MHMoE) -> tuple[float, int]:
        flops = count_flops(layer, sequence_length=1)
        weights = [p.numel() for name, p in layer.named_parameters() if "router" not in name]
        return sum(v for name, v in flops.items() if name != "router"), sum(weights)

    (flops, parameters), (sparse_flops, sparse_parameters) = cost(split), cost(sparse)
    assert match.flops_ratio == pytest.approx(flops / sparse_flops)
    assert match.parameter_ratio == pytest.approx(parameters / sparse_parameters)
    # f is a multiple of 8, E whole: both are off by half of that at most.
    matrices = 3 if glu else 2
    assert abs(flops - sparse_flops) <= 2 * matrices * d * h * k0 * 4
    assert abs(parameters - sparse_parameters) <= matrices * (d // h) * match.expert_dim / 2


@pytest.mark.parametrize(("glu", "least"), [(True, 512), (False, 768)])
def test_no_positive_width_is_refused(glu, least):
    with pytest.raises(ValueError, match=rf"expert_dim is {least}.* must exceed {least}$"):
        match_sparse_moe(768, 8, 1, least, heads=2, glu=glu)
    assert match_sparse_moe(768, 8, 1, least + 1, heads=2, glu=glu).expert_dim == 8


@pytest.mark.parametrize("heads", [0, 5, -2])
def test_heads_that_do_not_divide_are_refused(heads):
    with pytest.raises(ValueError, match=rf"heads is {heads}; it must divide dim = 768"):
        match_sparse_moe(768, 8, 1, 2048, heads=heads)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}, {"head_dim": 20}],
    ids=["plain", "grouped keys", "tied", "wide heads"],
)
def test_dense_model_equals_torchs_counter(changes):
    model = llama(**changes)
    assert by_formula(model) == pytest.approx(measured(model), rel=1e-6)


@pytest.mark.parametrize(
    "mlp",
    [
        MoEConfig(**EXPERTS),
        MoEConfig(**EXPERTS, glu=False, router="cosine"),
        MHMoEConfig(num_heads=3, **EXPERTS),
        MHMoEConfig(num_heads=3, **EXPERTS, shared_expert_dim=40),
        MHMoEConfig(num_heads=3, **EXPERTS, router="cosine", bias=True),
        MHMoEConfig(num_heads=2, **EXPERTS, head_layer=False, glu=False, merge_layer=False),
    ],
    ids=["moe", "moe cosine", "mh_moe", "mh_moe shared", "mh_moe cosine", "mh_moe bare"],
)
def test_mixture_of_experts_equals_torchs_counter(mlp):
    model = convert(llama(num_key_value_heads=3), mlp=mlp, every=2).eval()
    assert by_formula(model) == pytest.approx(measured(model), rel=0.01)


@pytest.mark.parametrize("router", ["two_stage", "query_norm"])
def test_moh_equals_torchs_counter_less_the_heads_that_are_off(router):
    attention = MoHConfig(router=router, shared=2, active=4)
    model = convert(llama(num_key_value_heads=2), attention=attention).eval()
    a_head = 4 * 8 * (T + 1) / 2  # scores and sum, 8 channels, (T + 1) / 2 keys on average
    off = 2 * 2 * a_head  # layers times heads that are off
    # The router multiplies by rows of zeros, up to 16: part of its speed, not of its work.
    zeros = 2 * 2 * model.config.hidden_size * 8 if router == "two_stage" else 0
    assert by_formula(model) == pytest.approx(measured(model) - off - zeros, rel=1e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_moh_layer_by_hand(causal):
    layer = MoHAttention(
        48, num_heads=6, num_kv_heads=2, head_dim=10, shared_heads=2, active_heads=4
    )
    flops = count_flops(layer, sequence_length=5, causal=causal)
    keys = 3 if causal else 5
    assert flops == {
        "": 4 * 4 * 10 * keys,  # four heads that are on
        "q_proj": 2 * 48 * 60, "k_proj": 2 * 48 * 20, "v_proj": 2 * 48 * 20, "o_proj": 2 * 48 * 60,
        "router.shared": 2 * 48 * 2, "router.routed": 2 * 48 * 4, "router.stage": 2 * 48 * 2,
    }  # fmt: skip


def test_moh_layer_with_routed_groups_by_hand():
    layer = MoHAttention(
        48, num_heads=6, num_kv_heads=3, shared_heads=2, active_heads=4, route_groups=True
    )
    flops = count_flops(layer, sequence_length=5)
    assert flops[""] == 4 * 4 * 8 * 3  # four heads that are on
    assert (flops["router.routed"], flops["router.stage"]) == (2 * 48 * 2, 2 * 48 * 2)
    assert "router.shared" not in flops  # one shared group: no choice


def test_mh_moe_layer_by_hand():
    layer = MHMoE(12, num_heads=3, num_experts=7, top_k=2, expert_dim=5, shared_expert_dim=11)
    assert count_flops(layer, sequence_length=1) == {
        "head_proj": 2 * 12 * 12,
        "merge_proj": 2 * 12 * 12,
        "router": 3 * 2 * 4 * 7,  # three sub-tokens of width 4, seven experts
        "experts": 3 * 2 * 2 * 3 * 4 * 5,  # three sub-tokens, two experts, three matrices
        "shared_expert": 2 * 3 * 12 * 11,
    }


def test_parameters_by_hand():
    expert = 3 * 4 * 5
    layer = MHMoE(12, num_heads=3, num_experts=7, top_k=2, expert_dim=5, shared_expert_dim=11)
    rest = 2 * 12 * 12 + 4 * 7 + 3 * 12 * 11  # head, merge, router, shared expert
    assert count_parameters(layer) == (rest + 7 * expert, rest + 6 * expert)
    layer = MHMoE(12, num_heads=3, num_experts=7, top_k=3, expert_dim=5)
    total = 2 * 12 * 12 + 4 * 7 + 7 * expert  # nine choices of seven experts: all may be active
    assert count_parameters(layer) == (total, total)


def test_parameters_of_a_model():
    dense = llama(tie_word_embeddings=True)
    total = sum(p.numel() for p in dense.parameters())
    assert count_parameters(dense) == (total, total)
    expert, router, mlp = 3 * 48 * 56, 5 * 48, 3 * 48 * 112
    sparse = convert(dense, mlp=MoEConfig(**EXPERTS), every=2)  # one layer of the two
    rest = total - mlp + router
    assert count_parameters(sparse) == (rest + 5 * expert, rest + 2 * expert)
