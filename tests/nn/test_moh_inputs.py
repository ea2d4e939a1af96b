"""What MoHAttention takes beside tokens: equal to torch's attention on all heads, times gates."""

import re

import pytest
import torch
from dense_moh import HEADS, B, C, D, E, H, S, T, angles, dense, layer_of, tokens
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from headwise import MoHAttention, balance_loss

IMPLS = pytest.mark.parametrize("impl", ["reference", "dense", "gathered", "auto"])
WIDE = {"rtol": 1e-9, "atol": 1e-9}


def check_equal(layer, given, wanted, inputs, real=None):
    """Values and all gradients of two results; only of real tokens."""
    gradients = []
    for y, routing in (given, wanted):
        y = y if real is None else y[real]
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
        loss = loss + balance_loss(routing)
        learned = [*layer.parameters(), *inputs]
        gradients.append([y, *torch.autograd.grad(loss, learned, materialize_grads=True)])
    assert_close(*gradients, **WIDE)
    assert gradients[0][-1].abs().sum() > 0


@IMPLS
@pytest.mark.parametrize("router", ["two_stage", "query_norm"])
@pytest.mark.parametrize("kv_heads", [5, 1])
@pytest.mark.parametrize("width", [D, E])
def test_cross_attention(width, kv_heads, router, impl):
    layer = layer_of(num_kv_heads=kv_heads, router=router, impl=impl, context_dim=width)
    x, context = tokens(B, T, D), tokens(B, S, width)
    real = torch.ones(B, S, dtype=torch.bool)
    real[0, :4] = False
    seen = real[:, None, None].expand(B, H, T, S)
    given = layer(x, context=context, context_mask=real)
    check_equal(layer, given, dense(layer, x, context=context, seen=seen), [x, context])
    changed = context.masked_fill(~real.unsqueeze(-1), 100)
    assert torch.equal(layer(x, context=changed, context_mask=real)[0], given[0])


@IMPLS
@pytest.mark.parametrize("shape", [(T, T), (H, 1, T), (B, 1, T, T), (B, H, T, T), (1, T)])
def test_boolean_masks(shape, impl):
    layer, x = layer_of(impl=impl), tokens(B, T, D)
    seen = torch.rand(shape) < 0.6
    seen[..., 2] = True
    padding = torch.ones(B, T, dtype=torch.bool)
    padding[1, 5:] = False
    both = (seen & padding[:, None, None]).expand(B, H, T, T)
    given = layer(x, padding, attn_mask=seen)
    check_equal(layer, given, dense(layer, x, mask=padding, seen=both), [x], padding)


@IMPLS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(T, T), (B, H, T, T), (H, 1, T)])
def test_additive_masks_and_their_gradients(shape, causal, impl):
    layer, x, bias = layer_of(impl=impl, causal=causal), tokens(B, T, D), tokens(*shape)
    seen = torch.ones(T, T, dtype=torch.bool).tril() if causal else None
    wanted = dense(layer, x, seen=seen, bias=bias)
    check_equal(layer, layer(x, attn_mask=bias), wanted, [x, bias])
    hidden = torch.zeros(T, T, dtype=torch.float64)
    hidden[:, 3] = -torch.inf
    wanted = dense(layer, x, seen=seen, bias=hidden)
    # Token 3 sees others.
    check_equal(layer, layer(x, attn_mask=hidden), wanted, [x])


@IMPLS
def test_a_query_that_sees_nothing_says_nothing(impl):
    layer, x = layer_of(impl=impl), tokens(B, T, D)
    hidden = torch.zeros(T, T, dtype=torch.float64)
    hidden[3] = -torch.inf
    for mask in (hidden, hidden == 0):
        y, _ = layer(x, attn_mask=mask)
        assert_close(y[:, 3], layer.o_proj.bias.expand(B, D))
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.isfinite().all()


@IMPLS
@pytest.mark.parametrize("router", ["two_stage", "query_norm"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("width", "batch"), [(6, ()), (4, (1,)), (6, (B,))])
def test_rotary_positions_and_norms(width, batch, qk_norm, router, impl):
    layer = layer_of(qk_norm=qk_norm, router=router, impl=impl, causal=True, num_kv_heads=1)
    x, rotary = tokens(B, T, D), angles(width, batch=batch)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    wanted = dense(layer, x, seen=seen, rotary=rotary)
    check_equal(layer, layer(x, rotary=rotary), wanted, [x])


@IMPLS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_sliding_windows(window, causal, impl):
    layer, x = layer_of(window=window, causal=causal, impl=impl), tokens(B, T, D)
    apart = torch.arange(T).unsqueeze(-1) - torch.arange(T)
    seen = (apart < window) & (apart >= 0 if causal else apart > -window)
    check_equal(layer, layer(x), dense(layer, x, seen=seen), [x])


@pytest.mark.usefixtures("native_kernels")
def test_kernels_in_cpp_equal_float64():
    """With all that a decoder may bring, and with a context."""
    sizes = {"router": "query_norm", "qk_norm": True, "num_kv_heads": 1}
    exact = layer_of(**sizes, causal=True)
    layer = MoHAttention(D, **HEADS, **sizes, causal=True, impl="native")
    layer.load_state_dict(exact.state_dict())
    x, rotary = tokens(B, T, D), angles(6)
    bias = torch.randn(H, T, T, dtype=torch.float64)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    want, _ = dense(exact, x, seen=seen, bias=bias, rotary=rotary)
    narrow = x.detach().float().requires_grad_()
    y, _ = layer(narrow, attn_mask=bias.float(), rotary=tuple(part.float() for part in rotary))
    assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    of_want, of_y = torch.autograd.grad(want.sum(), x), torch.autograd.grad(y.sum(), narrow)
    assert_close(of_y[0].double(), of_want[0], rtol=1e-3, atol=1e-3)
    context = tokens(B, S, D)
    want, _ = dense(exact, x, context=context)
    y, _ = layer(narrow, context=context.float(), causal=False)
    assert_close(y.double(), want, rtol=1e-4, atol=1e-4)


def test_dropout_drops_weights_of_heads_that_are_on():
    layer, x = layer_of(dropout=0.4, causal=True), tokens(B, T, D)
    torch.manual_seed(3)
    y, routing = layer(x)
    torch.manual_seed(3)
    q, k, v = (
        p(x).unflatten(-1, (-1, C)).transpose(1, 2)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    heads = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.4).transpose(1, 2)
    want = layer.o_proj((heads * routing.weights.unsqueeze(-1)).flatten(2))
    assert_close(y, want)
    assert not torch.equal(layer(x)[0], y)
    layer.eval()
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    check_equal(layer, layer(x), dense(layer, x, seen=seen), [x])


def test_dropout_is_refused_by_what_has_none():
    for impl in ("reference", "gathered", "native", "decode"):
        with pytest.raises(ValueError, match=rf"dropout is 0\.1; impl '{impl}' has none"):
            MoHAttention(D, **HEADS, dropout=0.1, impl=impl)


@pytest.mark.parametrize("crossing", [False, True])
def test_tokens_without_a_batch(crossing):
    layer = layer_of(causal=not crossing)
    x, context = tokens(T, D), tokens(S, D) if crossing else None
    mask = torch.arange(T) != 5
    given = {"rotary": angles(6)} if not crossing else {}
    batched = {} if not crossing else {"context": context[None]}
    y, routing = layer(x, mask, **given, **({"context": context} if crossing else {}))
    want, of_batch = layer(x[None], mask[None], **given, **batched)
    assert y.shape == (T, D)
    assert torch.equal(y, want[0])
    assert all(map(torch.equal, routing, (part[0] for part in of_batch)))
    assert_close(balance_loss(routing), balance_loss(of_batch))


def test_half_precision_with_norms_and_angles_in_float32():
    layer = MoHAttention(D, **HEADS, qk_norm=True, causal=True)
    rotary = tuple(part.float() for part in angles(6))
    x = torch.randn(B, T, D)
    want, _ = layer(x, rotary=rotary)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(x, rotary=rotary)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), want, rtol=0.1, atol=0.05)
    y, _ = layer.bfloat16()(x.bfloat16(), rotary=rotary)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), want, rtol=0.1, atol=0.05)


X, CONTEXT = torch.zeros(B, T, D), torch.zeros(B, S, D)
COS = torch.zeros(T, 6)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, {"context": torch.zeros(B, S, E)}, f"context has shape [{B}, {S}, {E}]; it must be"),
        ({}, {"context": torch.zeros(3, S, D)}, f"it must be [{B}, S, {D}]"),
        ({}, {"context": CONTEXT.double()}, "context is torch.float64, the layer's weights are"),
        ({}, {"context_mask": torch.ones(B, S).bool()}, "context_mask is given, and"),
        ({}, {"context": CONTEXT, "context_mask": torch.ones(B, T).bool()}, "context_mask is"),
        ({"context_dim": E}, {}, f"context is None; a layer with context_dim = {E}"),
        ({"causal": True}, {"context": CONTEXT}, "context is given, and so is causal"),
        ({"window": 3}, {"context": CONTEXT}, "context is given, and so is window"),
        ({}, {"context": CONTEXT, "rotary": (COS, COS)}, "context is given, and so is rotary"),
        ({}, {"attn_mask": torch.ones(T, S).bool()}, f"attn_mask has shape [{T}, {S}]; it must be"),
        ({}, {"attn_mask": torch.ones(T, T).long()}, "attn_mask is torch.int64; it must be"),
        ({}, {"attn_mask": "x"}, "attn_mask is a str; it must be a tensor"),
        ({}, {"rotary": COS}, "rotary is a Tensor; it must be (cos, sin)"),
        ({}, {"rotary": (COS, COS[:, :4])}, "rotary's sin has shape [7, 4]; cos and sin must both"),
        ({}, {"rotary": (COS[:, :3],) * 2}, "R even and at most head_dim = 6"),
        ({}, {"rotary": (torch.zeros(T, 8),) * 2}, "R even and at most head_dim = 6"),
        ({}, {"rotary": (COS[1:],) * 2}, "rotary's cos has shape [6, 6]"),
        ({}, {"causal": 1}, "causal is 1; it must be True or False"),
        ({}, {"past_key_values": {}}, "past_key_values is {}; it must be a KeyValueCache or None"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(options, given, message):
    layer = MoHAttention(D, **HEADS, **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(X, **given)
