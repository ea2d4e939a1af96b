"""Every implementation of expert_mlp against the reference, and the custom ops under it."""

import pytest
import torch
from cases import assert_at_most_twice, value_and_gradients
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from headwise.ops import expert_mlp
from headwise.ops.experts.grouped import grouped_mlp

IMPLS = ("grouped", "dense")
D, HIDDEN = 5, 7


def leaves(N=13, E=11, K=3, gated=True):
    up_dim = 2 * HIDDEN if gated else HIDDEN
    shapes = {
        "x": (N, D),
        "weights": (N, K),
        "up_proj": (E, up_dim, D),
        "down_proj": (E, D, HIDDEN),
    }
    return {
        name: torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes.items()
    }


def some_padding():
    indices = torch.randint(11, (13, 3))
    indices[torch.rand(13, 3) > 0.6] = -1
    indices[4] = -1
    return indices


ROUTINGS = {
    "spread": lambda: torch.randint(11, (13, 3)),
    "empty experts": lambda: torch.randint(11, (13, 3)) // 4 * 4,
    "skewed": lambda: torch.tensor([[3, 0, 1]]).expand(13, 3),
    "same expert thrice": lambda: torch.full((13, 3), 10),
    "padding": some_padding,
    "one token": lambda: torch.tensor([[7, 2, 5]]),
    "one choice": lambda: torch.randint(11, (13, 1)),
}


def computed(tensors, indices, impl, activation="silu"):
    y = expert_mlp(**tensors, indices=indices, activation=activation, impl=impl)
    return value_and_gradients(y, tensors)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_the_reference_in_values_and_all_gradients(routing, gated, impl):
    indices = ROUTINGS[routing]()
    tensors = leaves(N=indices.shape[0], K=indices.shape[1], gated=gated)
    got, want = (computed(tensors, indices, name) for name in (impl, "reference"))
    assert_close(got, want, rtol=1e-10, atol=1e-10)
    unused = ~torch.isin(torch.arange(11), indices)
    assert all((got[name][unused] == 0).all() for name in ("up_proj", "down_proj"))
    assert (got["y"][(indices == -1).all(-1)] == 0).all()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("impl", IMPLS)
def test_equals_the_reference_in_every_activation(activation, impl):
    tensors, indices = leaves(), torch.randint(11, (13, 3))
    got, want = (computed(tensors, indices, name, activation) for name in (impl, "reference"))
    assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_but_padding_gives_zero_and_no_gradient(impl):
    found = computed(leaves(), torch.full((13, 3), -1), impl)
    assert all((x == 0).all() for x in found.values())


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_a_choice_of_weight_0_goes_nowhere_whatever_its_row_holds(impl):
    tensors, indices = leaves(), torch.randint(11, (13, 3))
    with torch.no_grad():
        tensors["weights"][4], tensors["weights"][7, 1], tensors["x"][4] = 0, 0, float("nan")
    got = computed(tensors, indices, impl)
    with torch.no_grad():
        indices[4], indices[7, 1], tensors["x"][4] = -1, -1, 0
    assert_close(got, computed(tensors, indices, impl), rtol=0, atol=0)
    assert not got["y"][4].any()
    assert not got["x"][4].any()


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck(impl, gated):
    tensors, indices = leaves(N=3, E=5, K=2, gated=gated), torch.tensor([[0, 3], [3, -1], [2, 0]])

    def call(x, weights, up, down):
        return expert_mlp(x, weights, indices, up, down, impl=impl)

    assert torch.autograd.gradcheck(call, tuple(tensors.values()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_ffns(impl, dtype):
    """Each token goes to one of three experts; the plain way is linear on its experts' rows."""
    E, N = 3, 31
    tensors = {k: x.detach().to(dtype) for k, x in leaves(N=N, E=E, K=1).items()}
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    indices = torch.randint(E, (N, 1))

    x, weights, up, down = tensors.values()
    y = torch.zeros_like(x)
    for e in range(E):
        rows = (indices[:, 0] == e).nonzero()[:, 0]
        gate, value = functional.linear(x[rows], up[e]).chunk(2, dim=-1)
        out = functional.linear(functional.silu(gate) * value, down[e]) * weights[rows]
        y = y.index_add(0, rows, out)
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    exact = computed(wide, indices, "reference")
    plain = value_and_gradients(y, tensors)
    assert_at_most_twice(computed(tensors, indices, impl), plain, exact)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("gated", [True, False])
def test_torch_s_grouped_product_equals_the_loop(routing, gated):
    """grouped_mm has no float64, and wants widths in multiples of 16 bytes."""
    indices, dim, hidden = ROUTINGS[routing](), 12, 20
    tokens, top_k = indices.shape
    shapes = {
        "x": (tokens, dim),
        "weights": (tokens, top_k),
        "up_proj": (11, 2 * hidden if gated else hidden, dim),
        "down_proj": (11, dim, hidden),
    }
    tensors = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    got, want = (computed(tensors, indices, impl) for impl in ("grouped_mm", "grouped"))
    assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dim", "dtype"), [(10, torch.float32), (12, torch.float64)])
def test_torch_s_grouped_product_names_what_it_does_not_take(dim, dtype):
    x, down = torch.randn(3, dim, dtype=dtype), torch.randn(2, dim, 8, dtype=dtype)
    up, choice = torch.randn(2, 16, dim, dtype=dtype), torch.zeros(3, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=f"widths {dim} and 8 in {dtype}.*multiples of 16 bytes"):
        expert_mlp(x, torch.ones(3, 1), choice, up, down, impl="grouped_mm")


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("gated", [True, False])
def test_custom_op_keeps_its_contract(gated, activation):
    tensors = leaves(gated=gated)
    x, weights, up, down = tensors.values()
    arguments = (x, weights, some_padding(), up, down, activation)
    torch.library.opcheck(grouped_mlp, arguments)


def test_flops_count_the_choices_that_go_somewhere():
    tensors, indices = leaves(), some_padding()
    rows = int((indices >= 0).sum())
    up, down = 2 * 2 * HIDDEN * D, 2 * HIDDEN * D
    with FlopCounterMode(display=False) as counter:
        y = expert_mlp(**tensors, indices=indices, impl="grouped")
    assert counter.get_total_flops() == rows * (up + down)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == rows * (3 * up + 2 * down)
