"""The experts in C++ against the reference in float64."""

import pytest
import torch
from cases import assert_at_most_twice, leaves, value_and_gradients
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from headwise.ops import expert_mlp
from headwise.ops.experts import choose
from headwise.ops.native.experts import native_mlp

pytestmark = pytest.mark.usefixtures("native_kernels")
SIZES = {
    "small": {},
    "odd number of rows": {"N": 77, "E": 2},
    "more than a block": {"N": 1300, "E": 2, "D": 10},
    "wide": {"D": 70, "hidden": 130},
    "no gate": {"gated": False, "hidden": 66},
    "relu": {"activation": "relu"},
    "one choice": {"K": 1},
    "large values": {"size": 30.0},
}


def arguments(N=13, D=22, E=11, K=3, hidden=14, gated=True, size=1.0):
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


def test_flops_count_the_choices_that_go_somewhere():
    tensors, indices = arguments()
    indices[:5], indices[5:] = -1, 3
    with FlopCounterMode(display=False) as counter:
        expert_mlp(**tensors, indices=indices, impl="native")
    assert counter.get_total_flops() == 2 * 8 * 3 * 3 * 14 * 22


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_auto_chooses_for_what_autocast_makes_of_the_tensors(dtype):
    """Float32 is native's; float16, which it computes under autocast, is not."""
    tensors, indices = arguments()
    want = expert_mlp(**tensors, indices=indices)
    with torch.autocast("cpu", dtype=dtype):
        y = expert_mlp(**tensors, indices=indices)
    assert y.dtype == dtype
    assert_close(y.float(), want, rtol=0, atol=0.05 * want.abs().max().item())
