"""Logits of routers: as wide as promised, by torch and by the C++ kernel, which is built here."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from headwise.ops import native
from headwise.ops.logits import router_logits

SIZES = [(1, 2, 1), (5, 30, 7), (17, 64, 16), (131, 96, 33), (300, 514, 5)]


def case(tokens, dim, count, dtype=torch.bfloat16):
    return torch.randn(tokens, dim).to(dtype), torch.randn(count, dim).to(dtype)


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(native, "is_ready", lambda: False)


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_equals_float64(size):
    x, weight = case(*size)
    logits = router_logits(x, weight)
    assert logits.dtype == torch.float32
    assert_close(logits.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("native_kernels")
def test_any_layout_and_any_batch():
    x, weight = case(24, 40, 9)
    want = router_logits(x, weight)
    assert_close(router_logits(x.T.contiguous().T, weight.T.contiguous().T), want)
    assert_close(router_logits(x.view(2, 3, 4, 40), weight), want.view(2, 3, 4, 9))


@pytest.mark.usefixtures("native_kernels")
def test_registered_as_an_operator():
    torch.library.opcheck(torch.ops.headwise.native_logits.default, case(24, 40, 9))


@pytest.mark.usefixtures("native_kernels")
def test_flops_are_those_of_a_product():
    with FlopCounterMode(display=False) as counter:
        router_logits(*case(24, 40, 9))
    assert counter.get_total_flops() == 2 * 24 * 40 * 9


@pytest.mark.usefixtures("native_kernels")
def test_gradients_reach_tokens_and_weights_of_bfloat16():
    x, weight = (each.requires_grad_() for each in case(24, 40, 9))
    upstream = torch.randn(24, 9)
    router_logits(x, weight).backward(upstream)
    assert_close(x.grad, (upstream @ weight.float()).bfloat16(), rtol=1e-2, atol=1e-1)
    assert_close(weight.grad, (upstream.T @ x.float()).bfloat16(), rtol=1e-2, atol=1e-1)


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_float32_or_wider_without_the_kernel(dtype):
    x, weight = case(24, 40, 9, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router_logits(x, weight)
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(logits.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)
