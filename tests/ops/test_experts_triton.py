"""The Triton kernel of experts against the reference: on a GPU, or else in Triton's interpreter."""

import hypothesis.strategies as st
import pytest
import torch
from cases import SEEDS, assert_at_most_twice, value_and_gradients
from hypothesis import given
from test_experts_impls import ROUTINGS
from torch.testing import assert_close
from triton_device import DEVICE, RUNNABLE

from headwise.ops import expert_mlp
from headwise.ops.experts import triton as kernel

pytestmark = RUNNABLE
# Several tiles an expert, and steps that HIDDEN is no multiple of.
E, D, HIDDEN = 11, 24, 40


@pytest.fixture(autouse=True, scope="module")
def _small_tiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "tiling", lambda _: kernel.Tiling(16, 16, 4, 1))
        yield


def leaves(N=13, K=3, gated=True, sizes=(E, D, HIDDEN)):
    experts, dim, hidden = sizes
    shapes = {
        "x": (N, dim),
        "weights": (N, K),
        "up_proj": (experts, 2 * hidden if gated else hidden, dim),
        "down_proj": (experts, dim, hidden),
    }
    tensors = {name: torch.randn(shape, device=DEVICE) for name, shape in shapes.items()}
    tensors["up_proj"] /= dim**0.5
    return {name: x.half().requires_grad_() for name, x in tensors.items()}


def by_kernel(x, weights, up_proj, down_proj, *, indices, activation="silu"):
    return kernel.expert_mlp(x, weights, indices, up_proj, down_proj, activation)


def assert_as_exact(tensors, indices, activation="silu"):
    options = {"indices": indices, "activation": activation}
    wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    got = value_and_gradients(by_kernel(**tensors, **options), tensors)
    plain = value_and_gradients(expert_mlp(**tensors, **options, impl="grouped"), tensors)
    exact = value_and_gradients(expert_mlp(**wide, **options, impl="grouped"), wide)
    for name, true in exact.items():
        floor = 1e-3 * float(true.norm())
        assert_at_most_twice({name: got[name]}, {name: plain[name]}, {name: true}, floor)
    return got


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_is_as_exact_as_plain_products(routing, gated):
    indices = ROUTINGS[routing]().to(DEVICE)
    tensors = leaves(*indices.shape, gated=gated)
    got = assert_as_exact(tensors, indices)
    assert (got["y"][(indices == -1).all(-1)] == 0).all()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_every_activation(activation):
    assert_as_exact(leaves(), torch.randint(E, (13, 3), device=DEVICE), activation)


def test_more_rows_of_an_expert_than_a_tile_has():
    assert_as_exact(leaves(N=101, K=2), torch.randint(3, (101, 2), device=DEVICE) * 5)


@given(data=st.data(), seed=SEEDS)
def test_any_sizes(data, seed):
    torch.manual_seed(seed)
    N, K, experts = (data.draw(st.integers(1, most)) for most in (40, 4, 20))
    sizes = (experts, *(8 * data.draw(st.integers(1, 9)) for _ in range(2)))
    tensors = leaves(N, K, data.draw(st.booleans()), sizes)
    indices = torch.randint(-1, experts, (N, K), device=DEVICE)
    assert_as_exact(tensors, indices, data.draw(st.sampled_from(["silu", "relu", "gelu"])))


def test_nothing_but_padding_gives_zero_and_no_gradient():
    tensors, nowhere = leaves(), torch.full((13, 3), -1, device=DEVICE)
    found = value_and_gradients(by_kernel(**tensors, indices=nowhere), tensors)
    assert all((x == 0).all() for x in found.values())


def test_rows_and_matrices_anywhere_in_memory():
    tensors, indices = leaves(), torch.randint(E, (13, 3), device=DEVICE)
    tensors = {name: x.detach() for name, x in tensors.items()}
    want = by_kernel(**tensors, indices=indices)
    tensors["x"] = torch.cat([tensors["x"], tensors["x"] + 1], dim=1)[:, :D]
    for name in ("up_proj", "down_proj"):
        matrices = tensors[name]
        odd = torch.cat([matrices.new_zeros(1), matrices.flatten()])
        tensors[name] = odd[1:].view(matrices.shape)
    assert_close(by_kernel(**tensors, indices=indices), want, rtol=0, atol=0)


def test_custom_op_keeps_its_contract():
    x, weights, up, down = leaves().values()
    torch.library.opcheck(
        kernel.expert_mlp,
        (x, weights, torch.randint(E, (13, 3), device=DEVICE), up, down, "silu"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_names_what_it_does_not_take():
    tensors = {name: x.detach().double() for name, x in leaves().items()}
    with pytest.raises(ValueError, match='impl "triton" takes float16 and bfloat16 on CUDA'):
        expert_mlp(**tensors, indices=torch.zeros(13, 3, device=DEVICE).long(), impl="triton")
