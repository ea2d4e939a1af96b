"""torch.func and forward gradients: right where torch's own operators compute, else refused.

torch takes the forward gradient of an operator without a formula for 0, without a word.
"""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from headwise import MHMoE, MoHAttention
from headwise.bitnet import ternarize
from headwise.ops import expert_mlp, head_attention, route_heads
from headwise.ops.logits import router_logits

# torch's own.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")

X = torch.randn(6, 8)
WEIGHTS, INDICES = torch.rand(6, 2), torch.randint(3, (6, 2))
UP, DOWN = torch.randn(3, 10, 8), torch.randn(3, 8, 5)
REFUSED = "torch.func and forward gradients cannot differentiate"


def experts(impl):
    return lambda x: expert_mlp(x, WEIGHTS, INDICES, UP, DOWN, impl=impl)


def attention(impl):
    keys = torch.randn(1, 6, 2, 4)
    gate = torch.tensor([1.0, 0.0]).expand(1, 6, 2)
    return lambda x: head_attention(x.view(1, 6, 2, 4), keys, keys, gate, impl=impl)


def slope(compute, x, dx):
    """The derivative of float64 along dx, by differences."""
    x, dx, step = x.double(), dx.double(), 1e-6
    return (compute(x + step * dx) - compute(x - step * dx)) / (2 * step)


def forward(compute, x, dx):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(compute(forward_ad.make_dual(x, dx))).tangent


@pytest.mark.parametrize(
    "take",
    [
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: forward(f, x, x),
        lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    ],
)
@pytest.mark.parametrize("impl", ["grouped", "native"])
def test_experts_of_a_named_kernel_are_refused(take, impl):
    with pytest.raises(ValueError, match=f"{REFUSED}; 'dense' and 'reference' can be"):
        take(experts(impl), X)


@pytest.mark.parametrize("impl", ["native", "gathered", "decode"])
def test_heads_of_a_named_kernel_are_refused(impl):
    with pytest.raises(ValueError, match=f"{REFUSED}; 'dense' and 'reference' can be"):
        torch.func.jvp(attention(impl), (X,), (X,))


@pytest.mark.parametrize("impl", ["auto", "dense", "reference"])
def test_forward_gradients_of_experts_are_right(impl):
    dx = torch.randn_like(X)
    wide = [tensor.double() for tensor in (WEIGHTS, UP, DOWN)]

    def exact(x):
        return expert_mlp(x, wide[0], INDICES, wide[1], wide[2], impl="reference")

    want = slope(exact, X, dx).float()
    assert_close(forward(experts(impl), X, dx), want, rtol=1e-4, atol=1e-4)
    assert_close(torch.func.jvp(experts(impl), (X,), (dx,))[1], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["auto", "dense", "reference"])
def test_forward_gradients_of_heads_are_right_by_torchs_plain_backend(impl):
    dx = torch.randn_like(X)
    keys = torch.randn(1, 6, 2, 4)
    gate = torch.tensor([1.0, 0.0]).expand(1, 6, 2)

    def compute(x, impl=impl):
        k, g = keys.to(x.dtype), gate.to(x.dtype)
        return head_attention(x.view(1, 6, 2, 4), k, k, g, impl=impl)

    want = slope(lambda x: compute(x, "reference"), X, dx).float()
    with sdpa_kernel(SDPBackend.MATH):
        assert_close(torch.func.jvp(compute, (X,), (dx,))[1], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", [attention, experts])
@pytest.mark.parametrize("impl", ["auto", "dense"])
def test_torch_func_differentiates_heads_and_experts(impl, op):
    compute = op(impl)
    x = X.clone().requires_grad_()
    (want,) = torch.autograd.grad(compute(x).square().sum(), x)
    got = torch.func.grad(lambda x: compute(x).square().sum())(X)
    assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_forward_gradients_of_a_routing_are_right():
    shared, stage = torch.randn(6, 2), torch.randn(6, 2)

    def gates(x):
        parts = (y.to(x.dtype) for y in (shared, stage))
        return route_heads(next(parts), x, next(parts), top_k=3).weights

    dx = torch.randn_like(X)
    got = torch.func.jvp(gates, (X,), (dx,))[1]
    assert_close(got, slope(gates, X, dx).float(), rtol=1e-4, atol=1e-4)


def test_forward_gradients_of_logits_in_bfloat16_are_right():
    x, weight = X.bfloat16(), UP[0].bfloat16()
    got = torch.func.jvp(lambda x: router_logits(x, weight), (x,), (x,))[1]
    assert_close(got, router_logits(x, weight))


@pytest.mark.parametrize("whole", [True, False])
def test_forward_gradients_of_ternary_layers_are_those_of_backward(whole):
    torch.manual_seed(0)
    layer = ternarize(MHMoE(16, num_heads=2, num_experts=4, top_k=2, expert_dim=8))
    compute = (lambda x: layer(x)[0]) if whole else layer.head_proj
    x = torch.randn(1, 5, 16, requires_grad=True)
    dx, dy = torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    (backward,) = torch.autograd.grad(compute(x), x, dy)
    want = (backward * dx).sum()
    with torch.no_grad():
        tangent = torch.func.jvp(compute, (x.detach(),), (dx,))[1]
    assert want.abs() > 0.1
    assert_close((tangent * dy).sum(), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_forward_gradients_of_a_mixture_are_right():
    layer = MHMoE(16, num_heads=2, num_experts=4, top_k=2, expert_dim=8).double()
    x, dx = torch.randn(2, 1, 5, 16).double()
    got = forward(lambda x: layer(x)[0], x, dx)
    assert_close(got, slope(lambda x: layer(x)[0], x, dx), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_gives_no_forward_gradient_of_0():
    layer = MoHAttention(16, num_heads=4, shared_heads=1, active_heads=3)
    x = torch.randn(1, 5, 16)
    with pytest.raises(NotImplementedError):
        forward(lambda x: layer(x)[0], x, x)
