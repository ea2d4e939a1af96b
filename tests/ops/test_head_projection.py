"""Projections that skip heads: the C++ kernels, built here, against float64, and when they pay."""

import pytest
import torch
from cases import threads
from torch import nn
from torch.nn.functional import linear
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from headwise.nn import MoHAttention
from headwise.ops.head_projection import merge_heads, project_heads, skips_faster

pytestmark = pytest.mark.usefixtures("native_kernels")
SIZES = {
    "some heads everywhere": {"shared": 2},
    "none everywhere": {"shared": 0},
    "all everywhere": {"shared": 5, "on": 1},
    "none on": {"shared": 0, "on": 0},
    "one token": {"tokens": 1, "batch": 1},
    "one wide token": {"tokens": 1, "batch": 1, "dim": 514, "channels": 48, "heads": 7},
    "one token, none on": {"tokens": 1, "batch": 1, "shared": 0, "on": 0},
    "one token, all on": {"tokens": 1, "batch": 1, "shared": 5, "on": 1},
    "one token each": {"tokens": 1},
    "several blocks": {"tokens": 331, "batch": 1},
    "wide": {"dim": 514, "channels": 48},
    "narrow": {"dim": 2, "channels": 2},
}


def case(dtype, tokens=17, batch=3, dim=30, heads=5, channels=14, shared=1, on=0.5):
    """Tokens, weights of both projections, heads that are 0 where they are off, gates."""
    gate = torch.rand(batch, tokens, heads) + 0.1
    gate[..., shared:][torch.rand(batch, tokens, heads - shared) >= on] = 0
    sizes = (heads * channels, dim), (heads * channels,), (dim, heads * channels), (dim,)
    weights = [torch.randn(size).div(size[-1] ** 0.5).to(dtype) for size in sizes]
    x = torch.randn(batch, tokens, dim).to(dtype)
    values = (torch.randn(batch, tokens, heads, channels) * (gate != 0)[..., None]).to(dtype)
    return x, values, weights, gate


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_equals_float64(size, dtype, bias):
    x, values, (w_in, b_in, w_out, b_out), gate = case(dtype, **SIZES[size])
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    q = project_heads(x, w_in, b_in if bias else None, gate)
    want = linear(x.double(), w_in.double(), b_in.double() if bias else None)
    want = want.view(values.shape) * (gate != 0)[..., None]
    assert q.dtype == dtype
    assert_close(q.double(), want, rtol=tolerance, atol=tolerance)
    assert not q[gate == 0].any()
    y = merge_heads(values, w_out, b_out if bias else None)
    want = linear(values.flatten(2).double(), w_out.double(), b_out.double() if bias else None)
    assert y.dtype == dtype
    assert_close(y.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("number", [1, 3])
def test_any_number_of_threads(number):
    x, values, (w_in, b_in, w_out, b_out), gate = case(torch.float32, tokens=131)
    want = project_heads(x, w_in, b_in, gate), merge_heads(values, w_out, b_out)
    with threads(number):
        got = project_heads(x, w_in, b_in, gate), merge_heads(values, w_out, b_out)
    assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_registered_as_operators():
    x, values, (w_in, b_in, w_out, b_out), gate = case(torch.float32)
    given = x.flatten(0, 1), w_in, b_in, gate.flatten(0, 1)
    torch.library.opcheck(torch.ops.headwise.native_project.default, given)
    given = values.flatten(0, 1), w_out, b_out
    torch.library.opcheck(torch.ops.headwise.native_merge.default, given)


def layer(router="two_stage"):
    torch.manual_seed(0)
    sizes = {"num_heads": 5, "shared_heads": 1, "active_heads": 3, "head_dim": 48}
    return MoHAttention(64, **sizes, router=router).eval()


@pytest.mark.parametrize("router", ["two_stage", "one_stage", "query_norm"])
def test_a_layer_gives_what_it_gives_without_skipping(router):
    skipping, x = layer(router), torch.randn(2, 701, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as fewer:
        got, routing = skipping(x)
    with FlopCounterMode(display=False) as all_heads:
        want, _ = skipping(x)
    assert_close(got, want, rtol=1e-5, atol=1e-5)
    on = int((routing.weights != 0).sum())
    off = routing.weights.numel() - on
    projections = 1 if router == "query_norm" else 2
    assert all_heads.get_total_flops() - fewer.get_total_flops() == projections * 2 * off * 48 * 64


def test_what_stands_in_for_a_projection_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    routed, x = layer(), torch.randn(1, 1400, 64)
    with torch.no_grad():
        plain, _ = routed(x)
        seen = []
        hook = routed.o_proj.register_forward_hook(lambda *_: seen.append(True))
        assert_close(routed(x)[0], plain, rtol=1e-5, atol=1e-5)
        hook.remove()
        assert seen
        doubled = Doubled(240, 64)
        doubled.load_state_dict(routed.o_proj.state_dict())
        routed.o_proj = doubled
        assert_close(routed(x)[0], 2 * plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(1, 60, 64)},
        {"off": 0},
        {"head_dim": 24},
        {"x": torch.zeros(1, 1024, 64, dtype=torch.float64)},
        {"x": torch.zeros(1, 1024, 64, dtype=torch.bfloat16)},
        {"x": torch.zeros(1, 1024, 62)},
        {"weight": torch.zeros(240, 63)},
        {"x": torch.zeros(1, 1, 64)},
    ],
)
@torch.no_grad()
def test_skips_where_that_is_faster(change):
    options = {"head_dim": 48, "routed_heads": 4, "off": 2}
    given = {"x": torch.zeros(1, 1024, 64), "weight": torch.zeros(240, 64)} | options
    assert skips_faster(**given)
    assert not skips_faster(**given | change)


@torch.no_grad()
def test_skips_for_one_token_where_the_weights_are_many():
    given = {"x": torch.zeros(1, 1, 256), "head_dim": 48, "routed_heads": 4, "off": 1}
    assert skips_faster(**given, weight=torch.zeros(240, 256))
    assert not skips_faster(**given, weight=torch.zeros(96, 256))
    assert not skips_faster(**given | {"off": 0}, weight=torch.zeros(240, 256))


@pytest.mark.parametrize("frozen", [("q_proj",), ("q_proj.weight", "o_proj.weight")], ids=str)
def test_a_layer_of_which_a_part_learns_computes_all_heads(frozen):
    routed, x = layer(), torch.randn(1, 1400, 64)
    for name, parameter in routed.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    routed(x)[0].sum().backward()
    assert routed.o_proj.bias.grad.any()
    assert routed.q_proj.bias.requires_grad == (routed.q_proj.bias.grad is not None)
