"""aggregated_attention: worked by hand, equal to the known, equal to its reference, its errors."""

import math

import pytest
import torch
from cases import leaves as leaves_of
from cases import map_of, value_and_gradients
from torch.nn.functional import unfold
from torch.testing import assert_close

from headwise.ops import aggregated_attention, head_attention

B, H, C = 2, 3, 5


def case(size=(3, 5), window=3, pooled=7, on=0.6, dtype=torch.float64, batch=B):
    """Leaf tensors (all gradients wanted) and the options of a call."""
    tensors, options = map_of(size, window, pooled, H, C, on, batch)
    return leaves_of(tensors, dtype), options


def computed(leaves, options, impl):
    return value_and_gradients(aggregated_attention(**leaves, **options, impl=impl), leaves)


def silent(size, values, pool_values=(), gates=None):
    """One head of one channel whose scores and learned weights are all 0, window 3."""
    tokens, pooled = size[0] * size[1], len(pool_values)
    zeros = torch.zeros(1, tokens, 1, 1)
    gate = torch.ones(tokens) if gates is None else torch.tensor(gates)
    return {
        "q": zeros, "k": zeros, "v": torch.tensor(values).reshape(1, tokens, 1, 1),
        "k_pool": torch.zeros(1, pooled, 1, 1),
        "v_pool": torch.tensor(pool_values).reshape(1, pooled, 1, 1),
        "gate": gate.reshape(1, tokens, 1), "local_bias": torch.zeros(1, 9),
        "pool_bias": torch.zeros(1, tokens, pooled), "unit_q": zeros,
        "learned_tokens": torch.zeros(1, 1, 9), "learned_bias": torch.zeros(1, 9),
        "size": size, "window": 3,
    }  # fmt: skip


@pytest.mark.parametrize("impl", ["auto", "reference", "dense"])
class TestByHand:
    def test_means_over_the_window_and_the_pooled_times_the_gate(self, impl):
        arguments = silent((1, 3), [3.0, 6.0, 12.0], [9.0], gates=[1.0, 2.0, 0.0])
        y = aggregated_attention(**arguments, impl=impl)
        # (3 + 6 + 9)/3, twice (3 + 6 + 12 + 9)/4, off.
        assert_close(y.flatten(), torch.tensor([6.0, 15.0, 0.0]))

    def test_scores_and_biases(self, impl):
        arguments = silent((1, 3), [3.0, 6.0, 12.0], [9.0])
        key = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
        twice = arguments | {"q": torch.full((1, 3, 1, 1), math.log(2)), "k": key}
        y = aggregated_attention(**twice, impl=impl)
        # The first key counts twice: (6 + 6 + 9)/4, (6 + 6 + 12 + 9)/5; the last does not see it.
        assert_close(y.flatten(), torch.tensor([5.25, 6.6, 9.0]))
        arguments["local_bias"][0, 5] = math.log(3)  # the right neighbour
        arguments["pool_bias"][0, 2, 0] = math.log(2)  # for the last token
        y = aggregated_attention(**arguments, impl=impl)
        # (3 + 18 + 9)/5, (3 + 6 + 36 + 9)/6, (6 + 12 + 18)/4
        assert_close(y.flatten(), torch.tensor([6.0, 9.0, 9.0]))

    def test_learned_weights_are_added_after_the_softmax(self, impl):
        arguments = silent((1, 3), [3.0, 6.0, 12.0], [9.0])
        arguments["unit_q"] = torch.full((1, 3, 1, 1), 2.0)
        arguments["learned_tokens"][0, 0, 4] = 1.0  # the token itself, weight 2
        arguments["learned_bias"][0, 5] = 0.5  # the right neighbour
        y = aggregated_attention(**arguments, impl=impl)
        assert_close(y.flatten(), torch.tensor([6.0 + 6 + 3, 7.5 + 12 + 6, 9.0 + 24]))

    @pytest.mark.parametrize(
        ("position", "neighbours"),
        [
            (1, [0.0, 0.0, 1.0, 2.0]),  # above
            (3, [0.0, 1.0, 0.0, 4.0]),  # left
            (6, [0.0, 4.0, 0.0, 0.0]),  # below left
            (8, [8.0, 0.0, 0.0, 0.0]),  # below right
        ],
    )
    def test_positions_are_counted_row_by_row(self, impl, position, neighbours):
        arguments = silent((2, 2), [1.0, 2.0, 4.0, 8.0])
        arguments["learned_bias"][0, position] = 1.0
        y = aggregated_attention(**arguments, impl=impl)
        assert_close(y.flatten(), torch.tensor(neighbours) + 15 / 4)


CASES = {
    "plain": {},
    "window of one": {"window": 1},
    "wide window": {"window": 5},
    "window larger than the map": {"size": (2, 3), "window": 7},
    "one row": {"size": (1, 7)},
    "one token": {"size": (1, 1), "pooled": 1},
    "nothing pooled": {"pooled": 0},
    "all on": {"on": 1},
    "few on": {"on": 0.1},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_in_values_and_all_gradients(name):
    leaves, options = case(**CASES[name])
    got, want = (computed(leaves, options, impl) for impl in ("dense", "reference"))
    assert_close(got, want, rtol=1e-10, atol=1e-10)
    off = leaves["gate"] == 0
    for found in (got, want):
        assert all((found[name][off] == 0).all() for name in ("y", "q", "gate", "unit_q"))


def test_heads_that_are_all_off_leave_everything_without_gradient():
    leaves, options = case()
    with torch.no_grad():
        leaves["gate"].zero_()
    assert all((x == 0).all() for x in computed(leaves, options, "dense").values())


def test_a_window_of_one_with_nothing_else_gives_the_values():
    leaves, options = case(window=1, pooled=0, on=1)
    for name in ("learned_tokens", "learned_bias"):
        leaves[name] = torch.zeros_like(leaves[name])
    y = aggregated_attention(**leaves, **options)
    assert_close(y, leaves["gate"].unsqueeze(-1) * leaves["v"])


def test_a_window_over_the_whole_map_is_attention_with_a_relative_bias():
    size, window = (3, 4), 7
    leaves, options = case(size=size, window=window)
    for name in ("learned_tokens", "learned_bias"):
        leaves[name] = torch.zeros_like(leaves[name])
    rows, columns = torch.arange(12) // 4, torch.arange(12) % 4
    step = [x[None, :] - x[:, None] + window // 2 for x in (rows, columns)]
    relative = leaves["local_bias"][:, step[0] * window + step[1]]
    want = head_attention(
        leaves["q"],
        torch.cat([leaves["k"], leaves["k_pool"]], dim=1),
        torch.cat([leaves["v"], leaves["v_pool"]], dim=1),
        leaves["gate"],
        bias=torch.cat([relative, leaves["pool_bias"]], dim=-1),
        scale=1.0,
    )
    assert_close(aggregated_attention(**leaves, **options), want)


def test_the_learned_weights_are_a_convolution_of_the_values_whose_kernel_the_query_makes():
    leaves, options = case(window=5)
    learned = leaves["unit_q"].transpose(1, 2) @ leaves["learned_tokens"]
    learned = learned + leaves["learned_bias"][:, None]
    images = leaves["v"].permute(0, 2, 3, 1).reshape(B * H, C, 3, 5)
    windows = unfold(images, 5, padding=2).reshape(B, H, C, 25, 15)
    added = torch.einsum("bhtw,bhcwt->bthc", learned, windows) * leaves["gate"].unsqueeze(-1)
    without = leaves | {n: torch.zeros_like(leaves[n]) for n in ("learned_tokens", "learned_bias")}
    with_them, alone = (aggregated_attention(**x, **options) for x in (leaves, without))
    assert_close(with_them - alone, added)


def test_images_of_a_batch_do_not_see_each_other():
    leaves, options = case(dtype=torch.float32)
    before = aggregated_attention(**leaves, **options)
    with torch.no_grad():
        for name in ("q", "k", "v", "k_pool", "v_pool", "unit_q"):
            leaves[name][1] = 1e4
    after = aggregated_attention(**leaves, **options)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_output_has_the_queries_dtype_whatever_the_parameters(dtype):
    leaves, options = case(size=(2, 3), dtype=torch.float32)
    for name in ("q", "k", "v", "k_pool", "v_pool", "unit_q"):
        leaves[name] = leaves[name].to(dtype)
    assert aggregated_attention(**leaves, **options).dtype == dtype


def test_no_images_give_none():
    leaves, options = case(batch=0)
    assert aggregated_attention(**leaves, **options).shape == (0, 15, H, C)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl": "flash"}, "impl is 'flash'.*'auto'"),
        ({"size": (7, 2)}, r"size is \(7, 2\).*T = 15"),
        ({"size": (-3, -5)}, r"size\[0\] is -3; it must be at least 1"),
        ({"window": 4}, "window is 4; it must be odd"),
        ({"window": -3}, "window is -3; it must be at least 1"),
        ({"window": 5}, r"local_bias has shape \[3, 9\]; it must be \[H, w²\] = \[3, 25\]"),
        ({"q": torch.randn(15, H, C)}, r"q has shape \[15, 3, 5\]"),
        ({"v": torch.randn(B, 14, H, C)}, r"v has shape.*\[B, T, H, C\] = \[2, 15, 3, 5\]"),
        ({"v_pool": torch.randn(B, 2, H, C)}, r"v_pool has shape.*\[2, 7, 3, 5\]"),
        ({"k_pool": torch.randn(B, 7, C)}, r"k_pool has shape \[2, 7, 5\]"),
        ({"gate": torch.ones(B, 15)}, r"gate has shape \[2, 15\].*\[2, 15, 3\]"),
        ({"pool_bias": torch.ones(H, 7)}, r"pool_bias has shape.*\[H, T, P\] = \[3, 15, 7\]"),
        ({"learned_tokens": torch.ones(H, 9, C)}, r"\[H, C, w²\] = \[3, 5, 9\]"),
        ({"unit_q": torch.randn(B, 15, H, C).double()}, "unit_q has dtype torch.float64"),
        ({"q": torch.ones(B, 15, H, C).long()}, "q is torch.int64; it must be floating"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument(changes, message):
    leaves, options = case(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        aggregated_attention(**{**leaves, **options, **changes})
