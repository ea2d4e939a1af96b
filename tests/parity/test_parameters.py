"""Total and active parameters of layers and models, by hand."""

import pytest

from headwise import MHMoE, MHMoEConfig, MoEConfig, convert
from headwise.parity import count_parameters
from tiny import llama


def test_of_a_layer():
    expert = 3 * 4 * 5
    layer = MHMoE(12, num_heads=3, num_experts=7, top_k=2, expert_dim=5, shared_expert_dim=11)
    rest = 2 * 12 * 12 + 4 * 7 + 3 * 12 * 11  # head, merge, router, shared expert
    assert count_parameters(layer) == (rest + 7 * expert, rest + 6 * expert)
    layer = MHMoE(12, num_heads=3, num_experts=7, top_k=3, expert_dim=5)
    total = 2 * 12 * 12 + 4 * 7 + 7 * expert  # nine choices of seven experts: all may be active
    assert count_parameters(layer) == (total, total)


@pytest.mark.parametrize(
    ("mlp", "of_layer", "of_expert", "used"),
    [
        # Router and experts; two experts a token.
        (MoEConfig(num_experts=5, top_k=2, expert_dim=56), 5 * 48, 3 * 48 * 56, 2),
        # Head and merge layer, router; each of two sub-tokens goes to two experts.
        (
            MHMoEConfig(num_heads=2, num_experts=5, top_k=2, expert_dim=56),
            2 * 48 * 48 + 5 * 24, 3 * 24 * 56, 4,
        ),
    ],
    ids=["moe", "mh_moe"],
)  # fmt: skip
def test_of_a_model(mlp, of_layer, of_expert, used):
    dense = llama(hidden_size=48, intermediate_size=112, tie_word_embeddings=True)
    total = sum(p.numel() for p in dense.parameters())
    assert count_parameters(dense) == (total, total)
    rest = total - 3 * 48 * 112 + of_layer
    sparse = convert(dense, mlp=mlp, every=2)  # one layer of the two
    assert count_parameters(sparse) == (rest + 5 * of_expert, rest + used * of_expert)
