"""The experts in C++ against the reference in float64."""

import pytest
import torch
from cases import assert_at_most_twice, leaves, threads, value_and_gradients
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from headwise.ops import expert_mlp
from headwise.ops.experts import choose
from headwise.ops.native.experts import native_mlp, native_mlp_backward

pytestmark = pytest.mark.usefixtures("native_kernels")
SIZES = {
    "few rows": {"N": 13},
    "odd number of rows": {"N": 77, "E": 2},
    "more than a block": {"N": 1300, "E": 2, "D": 10},
    "more than a block in parts": {"N": 1031, "E": 2, "K": 2, "D": 6, "hidden": 194},
    "wide": {"D": 70, "hidden": 130},
    "no gate": {"gated": False, "hidden": 66},
    "relu": {"activation": "relu"},
    "relu without gate": {"activation": "relu", "gated": False},
    "one choice": {"K": 1},
    "large values": {"size": 30.0},
}


def arguments(N=101, D=22, E=11, K=3, hidden=14, gated=True, size=1.0):
    return {
        "x": torch.randn(N, D) * size,
        "weights": torch.rand(N, K),
        "up_proj": torch.randn(E, 2 * hidden if gated else hidden, D) / D**0.5,
        "down_proj": torch.randn(E, D, hidden) / hidden**0.5,
    }, torch.randint(-1, E, (N, K))


def computed(tensors, indices, impl, dtype, activation="silu"):
    wide = leaves(tensors, dtype)
    y = expert_mlp(**wide, indices=indices, activation=activation, impl=impl)
    return value_and_gradients(y, wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SIZES)
def test_error_is_at_most_twice_that_of_plain_experts(name, dtype):
    given = dict(SIZES[name])
    activation = given.pop("activation", "silu")
    tensors, indices = arguments(**given)
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    ours = computed(tensors, indices, "native", dtype, activation)
    plain = computed(tensors, indices, "reference", dtype, activation)
    exact = computed(tensors, indices, "reference", torch.float64, activation)
    for name, true in exact.items():
        floor = torch.finfo(dtype).eps / 8 * true.norm()
        assert_at_most_twice({name: ours[name]}, {name: plain[name]}, {name: true}, floor)
    assert (ours["y"][(indices == -1).all(-1)] == 0).all()


def test_one_token():
    tensors, indices = arguments(N=1)
    got = computed(tensors, indices, "native", torch.float32)
    want = computed(tensors, indices, "reference", torch.float64)
    assert_close(got, {name: x.float() for name, x in want.items()})


def test_rows_do_not_depend_on_each_other():
    tensors, indices = arguments(N=150, E=1)
    before = expert_mlp(**tensors, indices=indices, impl="native")
    tensors["x"][7] = 1e4
    after = expert_mlp(**tensors, indices=indices, impl="native")
    assert torch.equal(before[8:], after[8:])


def test_auto_takes_it_where_it_can():
    x, down = torch.randn(5, 22), torch.randn(3, 22, 14)
    assert choose(x, down, "silu") == "native"
    assert choose(x, down, "gelu") == "grouped"
    assert choose(x.double(), down.double(), "silu") == "grouped"


def test_what_it_does_not_take_is_named():
    tensors, indices = arguments(D=21)
    with pytest.raises(ValueError, match=r"impl .native. takes float32 and bfloat16.*grouped"):
        expert_mlp(**tensors, indices=indices, impl="native")


def test_custom_op_contract():
    tensors, indices = arguments()
    x, weights, up, down = (t.requires_grad_() for t in tensors.values())
    torch.library.opcheck(native_mlp, (x, weights, indices, up, down, "silu"))
    given = (torch.randn_like(x), x, weights, indices, up, down)
    torch.library.opcheck(native_mlp_backward, (*(t.detach() for t in given), "relu"))


@pytest.mark.parametrize("wrong", [11, -2])
def test_the_backward_refuses_an_expert_that_there_is_not(wrong):
    tensors, indices = arguments()
    x, weights, up, down = tensors.values()
    indices[5, 1] = wrong
    with pytest.raises(ValueError, match=f"indices holds {wrong}; it must hold experts, 0..10"):
        native_mlp_backward(x, x, weights, indices, up, down, "silu")


def test_flops_count_the_choices_that_go_somewhere():
    tensors, indices = arguments()
    indices[:5], indices[5:] = -1, 3
    up, down = 2 * 2 * 14 * 22, 2 * 14 * 22
    own = leaves(tensors)
    with FlopCounterMode(display=False) as counter:
        y = expert_mlp(**own, indices=indices, impl="native")
    assert counter.get_total_flops() == 96 * 3 * (up + down)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 96 * 3 * (3 * up + 2 * down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_choice_of_weight_0_is_none_whatever_its_row_holds(dtype):
    tensors, indices = arguments()
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    tensors["weights"][7], tensors["weights"][11, 1] = 0, 0
    tensors["x"][7] = float("inf")
    indices[11] = torch.tensor([4, 5, -1])
    got = computed(tensors, indices, "native", dtype)
    indices[7], indices[11, 1], tensors["x"][7] = -1, -1, 1
    want = computed(tensors, indices, "native", dtype)
    assert_close(got, want, rtol=0, atol=0)
    assert not got["y"][7].any()
    assert not got["x"][7].any()
    assert not got["weights"][11, 1:].any()


def test_experts_without_rows_get_gradients_of_0():
    tensors, indices = arguments()
    found = computed(tensors, indices.clamp(max=2), "native", torch.float32)
    assert not found["up_proj"][3:].any()
    assert not found["down_proj"][3:].any()
    assert found["up_proj"][:3].any(-1).all()
    assert found["down_proj"][:3].any(-1).all()


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skewed_choices_are_shared_out_and_give_the_same_bits_each_time(number, dtype):
    """Most choose one expert, whose hidden units are then divided."""
    tensors, indices = arguments(N=307, hidden=350)
    indices[:, :2] = torch.where(torch.rand(307, 2) < 0.9, 6, indices[:, :2])
    plain = computed(tensors, indices, "grouped", dtype)
    exact = computed(tensors, indices, "grouped", torch.float64)
    with threads(number):
        found = [computed(tensors, indices, "native", dtype) for _ in range(3)]
    for again in found[1:]:
        assert_close(again, found[0], rtol=0, atol=0)
    assert_at_most_twice(found[0], plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_have_the_weights_dtype(dtype):
    tensors, indices = arguments()
    weights = tensors["weights"].to(dtype).requires_grad_()
    y = expert_mlp(**tensors | {"weights": weights}, indices=indices, impl="native")
    (gradient,) = torch.autograd.grad(y.sum(), weights)
    assert gradient.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_auto_chooses_for_what_autocast_makes_of_the_tensors(dtype):
    """Float32 is native's; float16, which it computes under autocast, is not."""
    tensors, indices = arguments()
    want = expert_mlp(**tensors, indices=indices)
    with torch.autocast("cpu", dtype=dtype):
        y = expert_mlp(**tensors, indices=indices)
    assert y.dtype == dtype
    assert_close(y.float(), want, rtol=0, atol=0.05 * want.abs().max().item())
