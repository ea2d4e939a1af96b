"""MoHAttention with heads of different widths: the paper's equation head by head, and by hand."""

import math
import re

import pytest
import torch
from dense_moh import B, D, E, S, T, angles, tokens, turned
from torch.nn.functional import linear
from torch.testing import assert_close

from headwise import MoHAttention, balance_loss
from headwise.nn.head_widths import attend_by_width

WIDTHS = (5, 3, 7, 3, 5)
H = len(WIDTHS)
HEADS = {"num_heads": H, "shared_heads": 2, "active_heads": 3, "head_dims": WIDTHS}
IMPLS = pytest.mark.parametrize("impl", ["reference", "dense", "gathered", "auto"])
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def layer_of(**options):
    """A layer in float64 whose weights are all drawn."""
    layer = MoHAttention(D, **HEADS | options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


def head_by_head(layer, x, context=None, *, mask=None, seen=None, bias=None, rotary=None):
    """Eq. 4 with loops: of each token and head the softmax over its keys, then the gate, the sum.

    seen and bias are [B, H, T, S].
    """
    of = x if context is None else context
    routing = layer.router(x, mask)
    projected = (linear(y, p.weight, p.bias) for y, p in (
        (x, layer.q_proj), (of, layer.k_proj), (of, layer.v_proj),
    ))  # fmt: skip
    q, k, v = (y.split(WIDTHS, dim=-1) for y in projected)
    if rotary is not None:
        q, k = ([turned(head, rotary) for head in heads] for heads in (q, k))
    columns = layer.o_proj.weight.split(WIDTHS, dim=1)
    rows = []
    for b, t in torch.cartesian_prod(torch.arange(B), torch.arange(x.shape[1])).tolist():
        y = layer.o_proj.bias
        for h in range(H):
            if routing.weights[b, t, h] == 0:
                continue
            scores = k[h][b] @ q[h][b, t] / math.sqrt(WIDTHS[h])
            scores = scores if bias is None else scores + bias[b, h, t]
            scores = scores if seen is None else scores.masked_fill(~seen[b, h, t], -torch.inf)
            y = y + routing.weights[b, t, h] * columns[h] @ (scores.softmax(0) @ v[h][b])
        rows.append(y)
    return torch.stack(rows).unflatten(0, (B, -1)), routing


def check_equal(layer, given, wanted, inputs, real=None):
    """Values and all gradients of two results; only of real tokens."""
    results = []
    for y, routing in (given, wanted):
        y = y if real is None else y[real]
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
        learned = [*layer.parameters(), *inputs]
        loss = loss + balance_loss(routing)
        results.append([y, *torch.autograd.grad(loss, learned, materialize_grads=True)])
    assert_close(*results, **CLOSE)
    assert all(gradient.abs().sum() > 0 for gradient in results[0][-len(inputs) :])


def causally():
    return torch.ones(T, T, dtype=torch.bool).tril().expand(B, H, T, T)


def test_worked_by_hand():
    """Two heads of 1 and 4 channels, both always on with a gate of 1, of two tokens.

    The second token's scores are 0 and, before the scale, 2·ln 3: head 0 (scale 1) weighs the
    tokens 1 to 9, head 1 (scale 1/2) 1 to 3.
    """
    layer = MoHAttention(
        1, num_heads=2, shared_heads=2, active_heads=2, router="one_stage", head_dims=(1, 4),
        causal=True, bias=False,
    ).double()  # fmt: skip
    with torch.no_grad():
        for weight, channels in (
            (layer.q_proj.weight, [1, 1, 0, 0, 0]),
            (layer.k_proj.weight, [1, 1, 5, 5, 5]),
            (layer.v_proj.weight, [1, 0, 0, 0, 1]),
        ):
            weight[:, 0] = torch.tensor(channels)
        layer.o_proj.weight[0] = torch.tensor([1, 7, 7, 7, 1000])
        a = math.sqrt(2 * math.log(3))
        y, routing = layer(torch.tensor([[[0], [a]]], dtype=torch.float64))
    assert (routing.weights == 1).all()
    assert_close(y[0, :, 0], torch.tensor([0, a * (9 / 10 + 1000 * 3 / 4)], dtype=torch.float64))


@IMPLS
@pytest.mark.parametrize("router", ["two_stage", "one_stage"])
@pytest.mark.parametrize("shape", [(T, T), (H, 1, T), (B, 1, T, T), (B, H, T, T)])
def test_equals_the_equation_with_masks_positions_and_padding(shape, router, impl):
    layer, x, rotary = layer_of(causal=True, router=router, impl=impl), tokens(B, T, D), angles(2)
    drawn = torch.rand(shape) < 0.6
    drawn[..., 0] = True
    padding = torch.ones(B, T, dtype=torch.bool)
    padding[1, 5:] = False
    seen = causally() & drawn & padding[:, None, None]
    given = layer(x, padding, attn_mask=drawn, rotary=rotary)
    wanted = head_by_head(layer, x, mask=padding, seen=seen, rotary=rotary)
    check_equal(layer, given, wanted, [x], padding)
    assert (given[1].weights[~padding] == 0).all()


@IMPLS
@pytest.mark.parametrize("shape", [(T, T), (H, 1, T), (B, H, T, T)])
def test_equals_the_equation_with_biases_and_windows(shape, impl):
    layer, x, bias = layer_of(causal=True, window=3, impl=impl), tokens(B, T, D), tokens(*shape)
    apart = torch.arange(T).unsqueeze(-1) - torch.arange(T)
    seen = ((apart >= 0) & (apart < 3)).expand(B, H, T, T)
    wanted = head_by_head(layer, x, seen=seen, bias=bias.expand(B, H, T, T))
    check_equal(layer, layer(x, attn_mask=bias), wanted, [x, bias])


@IMPLS
def test_equals_the_equation_across_a_context(impl):
    layer = layer_of(context_dim=E, impl=impl)
    x, context, real = tokens(B, T, D), tokens(B, S, E), torch.ones(B, S, dtype=torch.bool)
    real[0, :4] = False
    given = layer(x, context=context, context_mask=real)
    seen = real[:, None, None].expand(B, H, T, S)
    check_equal(layer, given, head_by_head(layer, x, context, seen=seen), [x, context])


@pytest.mark.usefixtures("native_kernels")
def test_kernels_in_cpp_equal_float64():
    widths = (6, 4, 6, 4, 4)
    exact = layer_of(head_dims=widths, causal=True)
    layer = MoHAttention(D, **HEADS | {"head_dims": widths}, causal=True, impl="native")
    layer.load_state_dict(exact.state_dict())
    x, rotary = tokens(B, T, D), angles(4)
    y, _ = layer(x.float(), rotary=tuple(part.float() for part in rotary))
    assert_close(y.double(), exact(x, rotary=rotary)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", ["two_stage", "one_stage", "query_norm"])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1, "qk_norm": True, "layer_idx": 0}])
def test_equal_widths_are_one_width_bit_for_bit(router, options):
    results, x = [], torch.randn(B, T, D)
    for widths in ({"head_dim": 6}, {"head_dims": [6] * H, "head_dim": None}):
        torch.manual_seed(1)
        layer = MoHAttention(
            D, num_heads=H, shared_heads=2, active_heads=3, router=router, causal=True,
            **widths, **options,
        )  # fmt: skip
        y, routing = layer(x, rotary=tuple(part.float() for part in angles(6)))
        loss = y.square().sum() + balance_loss(routing)
        results.append([y, *torch.autograd.grad(loss, list(layer.parameters()))])
    assert all(map(torch.equal, *results))


def test_attention_of_one_width_is_the_ops():
    from headwise.ops import head_attention

    q, k, v = (torch.randn(B, n, H * 3) for n in (T, S, S))
    gate = torch.rand(B, T, H)
    y = attend_by_width(q, k, v, gate, (3,) * H, causal=True)
    heads = head_attention(*(z.unflatten(-1, (H, 3)) for z in (q, k, v)), gate, causal=True)
    assert torch.equal(y, heads.flatten(2))


class TestHeadsOfDifferentWidths:
    def test_do_not_depend_on_batch_mates(self):
        layer, x = layer_of(causal=True), tokens(B, T, D)
        assert_close(layer(x)[0][:1], layer(x[:1])[0])

    def test_do_not_depend_on_later_tokens(self):
        layer, x = layer_of(causal=True), tokens(B, T, D)
        changed = x.detach().clone()
        changed[:, 4:] = 100 * torch.randn(B, 3, D)
        assert torch.equal(layer(x)[0][:, :4], layer(changed)[0][:, :4])
        assert_close(layer(x)[0][:, :4], layer(x[:, :4])[0])

    def test_do_not_depend_on_padding(self):
        layer, x = layer_of(), tokens(B, T, D)
        mask = torch.ones(B, T, dtype=torch.bool)
        mask[0, :3] = False
        y, _ = layer(x, mask)
        changed = x.masked_fill(~mask.unsqueeze(-1), 100)
        assert torch.equal(y[mask], layer(changed, mask)[0][mask])
        assert_close(y[0, 3:], layer(x[:1, 3:])[0][0])

    def test_that_are_off_say_nothing(self):
        layer, x = layer_of(), tokens(1, 1, D)
        y, routing = layer(x)
        off = (routing.weights[0, 0] == 0).repeat_interleave(torch.tensor(WIDTHS))
        with torch.no_grad():
            layer.v_proj.bias[off] += 100
        assert torch.equal(layer(x)[0], y)

    def test_drop_weights_in_training_alone(self):
        layer, x = layer_of(dropout=0.4), tokens(B, T, D)
        assert not torch.equal(layer(x)[0], layer(x)[0])
        layer.eval()
        check_equal(layer, layer(x), head_by_head(layer, x), [x])

    def test_work_without_a_batch(self):
        layer, x = layer_of(causal=True), tokens(T, D)
        assert torch.equal(layer(x)[0], layer(x[None])[0][0])

    def test_work_in_half_precision(self):
        layer, x = MoHAttention(D, **HEADS, causal=True), torch.randn(B, T, D)
        rotary = tuple(part.float() for part in angles(2))
        want, _ = layer(x, rotary=rotary)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = layer(x, rotary=rotary)
        assert y.dtype == torch.bfloat16
        assert_close(y.float(), want, rtol=0.1, atol=0.05)

    def test_are_named_by_the_layer(self):
        assert "head_dims=(5, 3, 7, 3, 5)" in repr(layer_of())
        assert layer_of().q_proj.weight.shape == (23, D)
        assert layer_of().o_proj.weight.shape == (D, 23)


class Cache:
    """Enough of a cache to be taken for one."""

    def update(self, k, v, layer_idx):
        raise NotImplementedError

    def get_seq_length(self, layer_idx):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 3}, "head_dims is [5, 3, 7, 3, 5] and head_dim is 3; give one of them"),
        ({"head_dims": (5, 3)}, "head_dims has 2 entries; it must have one for each of num_heads"),
        ({"head_dims": []}, "head_dims has 0 entries; it must have one for each of num_heads = 5"),
        ({"head_dims": (5, 3, 0, 3, 5)}, "head_dims[2] is 0; it must be at least 1"),
        ({"num_kv_heads": 1}, "num_kv_heads is 1; with heads of different widths (head_dims) it "
            "must be num_heads = 5"),
        ({"qk_norm": True}, "qk_norm is True; with heads of different widths (head_dims) it must"),
        ({"layer_idx": 0}, "layer_idx is 0; with heads of different widths (head_dims) it must be "
            "None, without a cache"),
        ({"router": "query_norm"}, "router is 'query_norm'; with heads of different widths "
            "(head_dims) it must be 'two_stage' or 'one_stage'"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_what_they_have_not_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MoHAttention(D, **HEADS | changes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"past_key_values": Cache()}, "past_key_values is given; with heads of different widths"),
        ({"rotary": (torch.zeros(T, 4),) * 2}, "R even and at most min(head_dims) = 3"),
        ({"attn_mask": torch.zeros(3, T, T)}, "it must be broadcastable to [B, H, T, S] = [2, 5, "),
        ({"attn_mask": "x"}, "attn_mask is a str; it must be a tensor"),
    ],
)
def test_what_does_not_fit_them_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MoHAttention(D, **HEADS)(torch.zeros(B, T, D), **given)
