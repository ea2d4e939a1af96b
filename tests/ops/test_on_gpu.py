"""What only a GPU runs: "auto" there, kernels with their own tiles, grouped products of experts."""

import pytest
import torch
from torch.testing import assert_close

from headwise.ops import (
    expert_mlp,
    head_attention,
    route_heads,
    route_heads_by_query_norm,
    route_tokens,
)
from headwise.ops.experts import choose

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def attention_inputs(dtype, channels, tokens=517, keys=517, heads=4, kv_heads=2):
    q = torch.randn(2, tokens, heads, channels, device="cuda")
    k, v = (torch.randn(2, keys, kv_heads, channels, device="cuda") for _ in range(2))
    gate = torch.rand(2, tokens, heads, device="cuda") + 0.5
    gate[torch.rand_like(gate) < 0.5] = 0
    return [x.to(dtype).requires_grad_() for x in (q, k, v, gate)]


def value_and_gradients(compute, leaves, **options):
    y = compute(*leaves, **options)
    upstream = torch.linspace(-1, 1, y.numel(), device="cuda").reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize(
    ("dtype", "channels", "causal"),
    [
        *((torch.bfloat16, channels, True) for channels in (32, 64, 80, 128, 256)),
        (torch.bfloat16, 64, False),
        (torch.float16, 128, True),
        (torch.float32, 64, True),
    ],
)
def test_attention_is_as_exact_as_torchs(dtype, channels, causal):
    leaves = attention_inputs(dtype, channels)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    got = value_and_gradients(head_attention, leaves, causal=causal)
    plain = value_and_gradients(head_attention, leaves, causal=causal, impl="dense")
    exact = value_and_gradients(head_attention, wide, causal=causal, impl="dense")
    on = leaves[3] != 0
    for ours, usual, true in zip(got, plain, exact, strict=True):
        if true.shape == on.shape:
            ours, usual, true = ours[on], usual[on], true[on]
        floor = true.norm() * torch.finfo(dtype).eps / 16
        assert (ours.double() - true).norm() <= 2 * (usual.double() - true).norm() + floor


def test_attention_of_views_that_the_copy_engine_cannot_read():
    q, _, v, gate = attention_inputs(torch.bfloat16, 64)
    odd = torch.randn(2, 517, 2, 65, device="cuda").bfloat16()[..., 1:]
    want = head_attention(q, odd.contiguous(), v, gate, causal=True)
    assert_close(head_attention(q, odd, v, gate, causal=True), want, rtol=0, atol=0)


@pytest.mark.parametrize("queries", [1, 3])
def test_decoding_is_as_exact_as_torchs(queries):
    with torch.no_grad():
        leaves = attention_inputs(torch.bfloat16, 128, queries, 2053)
        got, plain, exact = (
            head_attention(*inputs, causal=True, impl=impl)
            for inputs, impl in (
                (leaves, "auto"), (leaves, "dense"), ([x.double() for x in leaves], "dense"),
            )
        )  # fmt: skip
    assert (got.double() - exact).norm() <= 2 * (plain.double() - exact).norm()


@pytest.mark.parametrize(("impl", "dim"), [("triton", 256), ("triton", 72), ("grouped_mm", 320)])
def test_experts_are_as_exact_as_plain_products(impl, dim):
    x = torch.randn(389, dim, device="cuda")
    weights, indices = torch.rand(389, 3, device="cuda").topk(2)
    up, down = (torch.randn(3, *size, device="cuda") / 8 for size in ((96, dim), (dim, 48)))
    leaves = [t.bfloat16().requires_grad_() for t in (x, weights, up, down)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    assert choose(leaves[0], leaves[3], "silu") == impl

    def compute(impl):
        return lambda x, weights, up, down: expert_mlp(x, weights, indices, up, down, impl=impl)

    got = value_and_gradients(compute("auto"), leaves)
    exact = value_and_gradients(compute("grouped"), wide)
    for ours, true in zip(got, exact, strict=True):
        assert (ours.double() - true).norm() <= 0.02 * true.norm()


ROUTINGS = {
    "queries": (
        lambda q: route_heads_by_query_norm(q, shared_heads=[1, 4], top_k=3),
        (2, 99, 9, 64),
    ),
    "heads": (lambda z: route_heads(*z.split([2, 7, 2], -1), top_k=4), (2, 99, 11)),
    "tokens": (lambda z: route_tokens(z, top_k=3), (2, 99, 96)),
}


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("name", ROUTINGS)
def test_routing_is_that_of_a_cpu(name, learning):
    route, shape = ROUTINGS[name]
    scores = torch.randn(shape, device="cuda", requires_grad=learning)
    got, want = route(scores), route(scores.detach().cpu())
    assert got.weights.requires_grad == learning
    for ours, usual in zip(got[:4], want[:4], strict=True):
        assert_close(ours.detach().cpu(), usual, rtol=1e-4, atol=1e-5)
