"""The linear map by oneDNN equals torch's, with gradients, and leaves to torch what is torch's."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from headwise.ops import linear as module
from headwise.ops.linear import linear

ENOUGH = (2, 150, 200)
pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """Tried on Intel's processors too."""
    monkeypatch.setattr(module, "_mkl_is_slow", lambda: True)


def operands(shape=ENOUGH, outputs=170, *, bias=True, learn=False, dtype=torch.float32):
    torch.manual_seed(0)
    given = [torch.randn(*shape), torch.randn(outputs, shape[-1]), torch.randn(outputs)]
    given = [tensor.to(dtype).requires_grad_(learn) for tensor in given]
    return given if bias else given[:2]


def names(run):
    """Operators of torch that ran, backward included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profiler:
        run()
    return {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_values_equal_torch_s(bias, strided):
    x, *rest = operands(bias=bias)
    x = x.transpose(0, 1) if strided else x
    assert "mkldnn::_linear_pointwise" in names(lambda: linear(x, *rest))
    assert_close(linear(x, *rest), functional.linear(x, *rest), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_gradients_equal_torch_s(bias, frozen):
    given = operands(bias=bias, learn=True)
    if frozen is not None:
        given[frozen].requires_grad_(False)
    want_by = [tensor for tensor in given if tensor.requires_grad]
    dy = torch.randn(*ENOUGH[:-1], 170)
    ran = names(lambda: torch.autograd.grad(linear(*given), want_by, dy))
    assert "mkldnn::_linear_pointwise" in ran
    assert "aten::mm" not in ran
    got = torch.autograd.grad(linear(*given), want_by, dy)
    want = torch.autograd.grad(functional.linear(*given), want_by, dy)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_gradients_of_gradients_equal_torch_s():
    def both(compute):
        given = operands(learn=True)
        first = torch.autograd.grad(compute(*given).square().sum(), given[:2], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    for one, other in zip(both(linear), both(functional.linear), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-2 * other.abs().max().item())


def test_backward_under_autocast_stays_in_float32():
    given = operands(learn=True)
    y = linear(*given)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y.sum(), given)
    want = torch.autograd.grad(functional.linear(*given).sum(), given)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 200), (1, 200), (7, 3, 200), (200,)])
def test_few_rows_are_torch_s(shape):
    x, weight, bias = operands(shape)
    assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_torch_s(dtype):
    given = operands(dtype=dtype)
    assert torch.equal(linear(*given), functional.linear(*given))


def test_autocast_goes_by_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*operands()).dtype == torch.bfloat16


# torch's own, about GPUs of Intel.
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_a_user_may_switch_onednn_off():
    given = operands()
    with torch.backends.mkldnn.flags(enabled=False):
        assert "mkldnn::_linear_pointwise" not in names(lambda: linear(*given))


# torch's own.
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_watches_steps_sees_torch_s():
    x, weight, bias = operands()
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * x.numel() * len(weight)
    jacobian = torch.func.jvp(lambda x: linear(x, weight, bias), (x,), (torch.ones_like(x),))[1]
    assert_close(jacobian, functional.linear(torch.ones_like(x), weight), rtol=1e-5, atol=1e-4)
    each = torch.func.vmap(linear, in_dims=(0, None, None))(x, weight, bias)
    assert_close(each, functional.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
    gradient = torch.func.grad(lambda w: linear(x, w, bias).sum())(weight)
    assert_close(gradient, x.sum((0, 1)).expand_as(weight), rtol=1e-5, atol=1e-4)
