"""expert_mlp: worked by hand, equal to a plain FFN, and what it refuses."""

import math

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from headwise.ops import expert_mlp

N, D, HIDDEN, E, K = 13, 5, 7, 11, 3


def weight(*values: float) -> torch.Tensor:
    """Experts of width 1: one up (or gate and up) row each, [E, U, 1]."""
    return torch.tensor(values).reshape(len(values), -1, 1)


@pytest.mark.parametrize("impl", ["auto", "reference", "grouped", "dense"])
class TestByHand:
    def test_one_expert(self, impl):
        x, index = torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 1, dtype=torch.long)
        half = torch.full((2, 1), 0.5)
        y = expert_mlp(x, half, index, weight(2.0), weight(3.0), activation="relu", impl=impl)
        assert y.tolist() == [[3.0], [0.0]]

    def test_gated(self, impl):
        # The gate's row comes first: 5 · relu(2x) · 3x, and silu(ln 3) = 3/4 ln 3.
        x, index, ones = (
            torch.tensor([[2.0]]),
            torch.zeros(1, 1, dtype=torch.long),
            torch.ones(1, 1),
        )
        up = weight([2.0, 3.0])
        y = expert_mlp(x, ones, index, up, weight(5.0), activation="relu", impl=impl)
        assert y.item() == 120
        up = weight([math.log(3) / 2, 1.0])
        y = expert_mlp(x, ones, index, up, weight(1.0), activation="silu", impl=impl)
        assert y.item() == pytest.approx(2 * 0.75 * math.log(3))

    def test_two_of_three_experts(self, impl):
        x, weights = torch.tensor([[2.0], [1.0], [1.0]]), torch.tensor([[0.25, 0.75]] * 3)
        index = torch.tensor([[0, 2], [2, -1], [-1, -1]])
        # Expert 0 gives 6x, expert 2 gives 4x; -1 goes nowhere.
        up, down = weight(2.0, 100.0, 1.0), weight(3.0, 100.0, 4.0)
        y = expert_mlp(x, weights, index, up, down, activation="relu", impl=impl)
        assert y.tolist() == [[9.0], [1.0], [0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("gated", [True, False])
def test_one_expert_is_a_plain_ffn(dtype, activation, gated):
    x = torch.randn(N, D, dtype=dtype)
    up = torch.randn(1, 2 * HIDDEN if gated else HIDDEN, D, dtype=dtype)
    down = torch.randn(1, D, HIDDEN, dtype=dtype)
    index = torch.zeros(N, 1, dtype=torch.long)
    hidden = functional.linear(x, up[0])
    act = getattr(functional, activation)
    hidden = act(hidden[:, :HIDDEN]) * hidden[:, HIDDEN:] if gated else act(hidden)
    y = expert_mlp(x, torch.ones(N, 1), index, up, down, activation=activation)
    # Products of other numbers of rows may be summed in another order.
    rounding = 4 * torch.finfo(dtype).eps
    assert_close(y, functional.linear(hidden, down[0]), rtol=rounding, atol=rounding * 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["reference", "grouped", "dense"])
def test_the_output_has_the_tokens_dtype_whatever_the_weights(dtype, impl):
    up, down = torch.randn(E, HIDDEN, D, dtype=dtype), torch.randn(E, D, HIDDEN, dtype=dtype)
    index = torch.randint(E, (N, K))
    y = expert_mlp(torch.randn(N, D, dtype=dtype), torch.rand(N, K), index, up, down, impl=impl)
    assert y.dtype == dtype


def test_a_row_depends_on_its_own_token_only():
    x, weights = torch.randn(N, D), torch.rand(N, K)
    index = torch.randint(E, (N, K))
    up, down = torch.randn(E, 2 * HIDDEN, D), torch.randn(E, D, HIDDEN)
    together = expert_mlp(x, weights, index, up, down)
    alone = [expert_mlp(x[[i]], weights[[i]], index[[i]], up, down) for i in range(N)]
    assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("impl", ["grouped", "reference", "dense"])
def test_no_tokens_give_no_rows(impl):
    up, down = torch.randn(E, HIDDEN, D), torch.randn(E, D, HIDDEN)
    none = torch.zeros(0, K, dtype=torch.long)
    y = expert_mlp(torch.zeros(0, D), torch.zeros(0, K), none, up, down, impl=impl)
    assert y.shape == (0, D)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl": "fast"}, "impl is 'fast'.*'auto'"),
        ({"activation": "tanh"}, "activation is 'tanh'.*'silu'"),
        ({"up_proj": torch.randn(E, 3 * HIDDEN, D)}, r"up_proj has shape \[11, 21, 5\].*7 or 14"),
        ({"up_proj": torch.randn(E, HIDDEN, 3)}, r"up_proj has shape \[11, 7, 3\]"),
        ({"weights": torch.rand(N, 2)}, r"indices has shape \[13, 3\]; it must be \[13, 2\]"),
        ({"x": torch.randn(3, D)}, r"weights has shape \[13, 3\].*\[N, K\] = \[3, K\]"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument(changes, message):
    arguments = {
        "x": torch.randn(N, D),
        "weights": torch.rand(N, K),
        "indices": torch.randint(E, (N, K)),
        "up_proj": torch.randn(E, 2 * HIDDEN, D),
        "down_proj": torch.randn(E, D, HIDDEN),
    }
    with pytest.raises(ValueError, match=message):
        expert_mlp(**arguments | changes)


@pytest.mark.usefixtures("unchecked")
def test_matrices_of_different_numbers_of_experts_are_refused():
    index = torch.full((N, K), E - 1)
    up, down = torch.randn(E, HIDDEN, D), torch.randn(2 * E, D, HIDDEN)
    with pytest.raises(ValueError, match="down_proj"):
        expert_mlp(torch.randn(N, D), torch.rand(N, K), index, up, down)
