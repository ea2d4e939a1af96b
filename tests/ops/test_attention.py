"""head_attention: worked by hand, equal to plain attention, and what it refuses."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from headwise.ops import head_attention

B, T, S, H, C = 2, 5, 7, 3, 11


def column(*values: float) -> torch.Tensor:
    """One batch, one head, one channel: [1, n, 1, 1]."""
    return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)


@pytest.mark.parametrize("impl", ["auto", "reference", "dense"])
class TestByHand:
    def test_the_mean_of_the_values_times_the_gate(self, impl):
        y = head_attention(
            column(0), column(1, -1), column(2, 4), torch.tensor([[[0.5]]]), impl=impl
        )
        assert_close(y, column(1.5))

    def test_scores_scale_and_bias(self, impl):
        q, k, v, gate = column(math.log(3)), column(1, 0), column(4, 8), torch.tensor([[[2.0]]])
        # Weights 3/4 and 1/4; with scale 2 they are 9/10 and 1/10; a bias of ln 3 undoes the first.
        assert_close(head_attention(q, k, v, gate, scale=1.0, impl=impl), column(10.0))
        assert_close(head_attention(q, k, v, gate, scale=2.0, impl=impl), column(8.8))
        bias = torch.tensor([[0.0, math.log(3)]])
        assert_close(head_attention(q, k, v, gate, bias=bias, impl=impl), column(12.0))

    def test_causal_aligns_the_last_query_with_the_last_key(self, impl):
        v = column(3, 6, 12)
        y = head_attention(column(0, 0), v, v, torch.ones(1, 2, 1), causal=True, impl=impl)
        assert_close(y, column(4.5, 7.0))

    def test_mask_and_gates_of_zero(self, impl):
        v, gate = column(3, 6, 12), torch.tensor([[[1.0], [0.0], [2.0]]])
        mask = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])
        y = head_attention(column(0, 0, 0), v, v, gate, mask=mask, impl=impl)
        assert_close(y, column(3.0, 0.0, 0.0))

    def test_query_heads_share_key_heads_in_groups(self, impl):
        v = torch.tensor([5.0, 7.0]).reshape(1, 1, 2, 1)
        gate = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
        y = head_attention(torch.zeros(1, 1, 4, 1), v, v, gate, impl=impl)
        assert y.flatten().tolist() == [5.0, 10.0, 21.0, 28.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": True}, {"scale": 0.3}])
def test_unit_gates_equal_plain_attention_bit_for_bit(dtype, kv_heads, options):
    q = torch.randn(B, T, H, C, dtype=dtype)
    k, v = (torch.randn(B, T, kv_heads, C, dtype=dtype) for _ in range(2))
    options = dict(options)
    if "attn_mask" in options:
        options["attn_mask"] = torch.rand(B, H, T, T) > 0.3
    plain = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=kv_heads != H, **options
    )
    gated = head_attention(
        q,
        k,
        v,
        torch.ones(B, T, H),
        causal=options.get("is_causal", False),
        mask=options.get("attn_mask"),
        scale=options.get("scale"),
    )
    assert torch.equal(gated, plain.transpose(1, 2))


def test_one_query_with_a_cache_sees_every_key():
    q, k, v = torch.randn(B, 1, H, C), torch.randn(B, S, H, C), torch.randn(B, S, H, C)
    gate = torch.ones(B, 1, H)
    assert torch.equal(
        head_attention(q, k, v, gate, causal=True), head_attention(q, k, v, gate, causal=False)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_output_has_the_queries_dtype_whatever_the_gates(dtype):
    x = torch.randn(B, T, H, C, dtype=dtype)
    for impl in ("reference", "dense"):
        assert head_attention(x, x, x, torch.rand(B, T, H), impl=impl).dtype == dtype


@pytest.mark.parametrize(
    "over_keys",
    [{"mask": torch.arange(S) < 5}, {"bias": torch.linspace(0, 1, S)}],
    ids=["mask", "bias"],
)
def test_mask_and_bias_over_keys_alone_broadcast(over_keys):
    q, k, v = torch.randn(B, T, H, C), torch.randn(B, S, H, C), torch.randn(B, S, H, C)
    whole = {name: x.expand(B, H, T, S) for name, x in over_keys.items()}
    gate = torch.ones(B, T, H)
    assert_close(head_attention(q, k, v, gate, **over_keys), head_attention(q, k, v, gate, **whole))


def arguments(**changes):
    x = torch.randn(B, T, H, C)
    return {"q": x, "k": x, "v": x, "gate": torch.ones(B, T, H)} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl": "flash"}, "impl is 'flash'.*'auto'"),
        (
            {"v": torch.randn(B, S, H, C)},
            r"v has shape \[2, 7, 3, 11\].*\[B, S, Hkv, C\] = \[2, 5, 3, 11\]",
        ),
        ({"q": torch.randn(T, H, C)}, r"\[5, 3, 11\]"),
        ({"k": torch.randn(B, T, 2, C), "v": torch.randn(B, T, 2, C)}, "Hkv = 2 heads must divide"),
        ({"q": torch.randn(B, T, H, 13)}, r"k has shape.*= \[2, S, Hkv, 13\]"),
        ({"q": torch.randn(1, T, H, C)}, r"k has shape.*= \[1, S, Hkv, 11\]"),
        ({"gate": torch.ones(B, T)}, r"gate has shape \[2, 5\].*\[2, 5, 3\]"),
        (
            {"q": torch.randn(B, T, H, C).double()},
            "k has dtype torch.float32; it must be q's, torch.float64",
        ),
        ({"mask": torch.zeros(T, T)}, "mask has dtype torch.float32"),
        ({"mask": torch.ones(T, S, dtype=torch.bool)}, r"mask has shape \[5, 7\].*\[2, 3, 5, 5\]"),
        ({"bias": torch.zeros(B, T, T)}, r"bias has shape \[2, 5, 5\]"),
        ({"bias": torch.zeros(1, 1, 1, T, T)}, "bias has shape"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        head_attention(**arguments(**changes))
