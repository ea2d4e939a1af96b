"""What torch's counter sees, by hand: attention in part, grouped products, our own ops."""

import pytest
import torch
from torch.nn.functional import grouped_mm, scaled_dot_product_attention

from headwise.ops import expert_mlp
from headwise.parity import measure_flops

B, H, C = 2, 3, 5
# Queries, keys, and the pairs that are seen where query t sees keys up to t.
CAUSAL = [(4, 4, 1 + 2 + 3 + 4), (4, 7, 1 + 2 + 3 + 4), (7, 4, 1 + 2 + 3 + 4 + 4 + 4 + 4)]


@pytest.mark.parametrize(("queries", "keys", "pairs"), CAUSAL)
def test_causal_attention_counts_the_pairs_that_are_seen(queries, keys, pairs):
    q = torch.randn(B, H, queries, C, requires_grad=True)
    k, v = (torch.randn(B, H, keys, C, requires_grad=True) for _ in range(2))
    products = 2 * B * H * C * pairs
    y = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert measure_flops(lambda: scaled_dot_product_attention(q, k, v, is_causal=True)) == (
        2 * products
    )
    assert measure_flops(lambda: y.sum().backward()) == 5 * products


@pytest.mark.parametrize(("queries", "keys", "pairs"), CAUSAL)
@pytest.mark.parametrize("causal", [True, False])
def test_kernels_of_gpus_count_as_those_of_cpus(causal, queries, keys, pairs):
    # The meta device has no numbers, but all shapes, and the operators that a GPU would run.
    q, k, v = (torch.randn(B, H, n, C, device="meta") for n in (queries, keys, keys))
    aten = torch.ops.aten
    calls = (
        lambda: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal),
        lambda: aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal),
        lambda: aten._scaled_dot_product_efficient_attention(q, k, v, None, False, 0.0, causal),
        lambda: aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, causal),
    )
    seen = pairs if causal else queries * keys
    assert [measure_flops(call) for call in calls] == [4 * B * H * C * seen] * len(calls)


def test_values_may_be_wider_than_keys():
    q, k, v = (torch.randn(B, H, n, c, device="meta") for n, c in ((4, 5), (7, 5), (7, 11)))
    flash = torch.ops.aten._scaled_dot_product_efficient_attention
    counted = measure_flops(lambda: flash(q, k, v, None, False))
    assert counted == 2 * B * H * 4 * 7 * (5 + 11)


@pytest.mark.parametrize("gated", [True, False])
def test_grouped_mm_counts_what_grouped_counts(gated):
    tokens, num_experts, dim, hidden = 13, 5, 16, 12
    indices = torch.randint(-1, num_experts, (tokens, 2))
    indices[3] = -1
    tensors = {
        "x": torch.randn(tokens, dim, requires_grad=True),
        "weights": torch.rand(tokens, 2, requires_grad=True),
        "up_proj": torch.randn(num_experts, hidden * (1 + gated), dim, requires_grad=True),
        "down_proj": torch.randn(num_experts, dim, hidden, requires_grad=True),
    }
    rows, matrices = int((indices >= 0).sum()), 2 + gated
    forward = 2 * rows * matrices * dim * hidden
    counted = {
        impl: measure_flops(lambda impl=impl: expert_mlp(**tensors, indices=indices, impl=impl))
        for impl in ("grouped", "grouped_mm")
    }
    assert counted == {"grouped": forward, "grouped_mm": forward}
    y = expert_mlp(**tensors, indices=indices, impl="grouped_mm")
    assert measure_flops(lambda: y.sum().backward()) == 2 * forward


def test_grouped_mm_of_every_kind():
    ends = torch.tensor([3, 3, 8], dtype=torch.int32)
    rows, matrices = torch.randn(8, 4), torch.randn(3, 4, 12)
    assert measure_flops(lambda: grouped_mm(rows, matrices, offs=ends)) == 2 * 8 * 4 * 12
    across = torch.randn(4, 8)
    assert measure_flops(lambda: grouped_mm(across, rows, offs=ends)) == 2 * 4 * 8 * 4
    assert measure_flops(lambda: grouped_mm(matrices.mT, across, offs=ends)) == 2 * 12 * 4 * 8
    assert measure_flops(lambda: grouped_mm(matrices.mT, matrices)) == 2 * 3 * 12 * 4 * 12
