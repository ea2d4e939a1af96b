"""MoHMultiheadAttention in torch's Transformer layers: with all heads on they compute the same."""

import copy
import re
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import headwise
from headwise import MoHAttention, MoHMultiheadAttention, balance_loss

B, T, S, D, H, F = 3, 7, 5, 24, 6, 31


def as_moh(attention, **options):
    """An nn.MultiheadAttention as ours, with its weights."""
    budget = {"shared_heads": 2, "active_heads": 4} | options
    heads = MoHAttention(D, num_heads=H, dropout=attention.dropout, **budget)
    projections = (heads.q_proj, heads.k_proj, heads.v_proj)
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    with torch.no_grad():
        for proj, weight, bias in zip(projections, weights, biases, strict=True):
            proj.weight.copy_(weight)
            proj.bias.copy_(bias)
        heads.o_proj.load_state_dict(attention.out_proj.state_dict())
    return MoHMultiheadAttention(heads, batch_first=attention.batch_first)


ALL_ON = {"router": "query_norm", "shared_heads": 0, "active_heads": H}


def pair(kind=nn.TransformerEncoderLayer, **options):
    """A layer of torch's, and the same with our attention."""
    plain = kind(D, H, F, dropout=0.0, **{"batch_first": True, **options})
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(plain)
    for name in ("self_attn", "multihead_attn"):
        if hasattr(ours, name):
            setattr(ours, name, as_moh(getattr(ours, name), **ALL_ON))
    return plain, ours


def padding():
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 5:] = True
    return mask


CAUSAL = nn.Transformer.generate_square_subsequent_mask(T)
MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": padding()},
    "padding as floats": {
        "src_key_padding_mask": torch.zeros(B, T).masked_fill(padding(), -torch.inf)
    },
    "causal": {"src_mask": CAUSAL, "is_causal": True},
    "causal, not said": {"src_mask": CAUSAL},
    "causal and padding": {
        "src_mask": CAUSAL, "is_causal": True,
        "src_key_padding_mask": torch.zeros(B, T).masked_fill(padding(), -torch.inf),
    },
    "boolean": {"src_mask": torch.ones(T, T).triu(2).bool()},
    "of each head": {"src_mask": torch.randn(B * H, T, T)},
}  # fmt: skip


@contextmanager
def unfused():
    """torch's own fused layer gives NaN for masks of each head."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"norm_first": True}], ids=str)
@pytest.mark.parametrize("masks", MASKS)
def test_an_encoder_layer(masks, options, training):
    plain, ours = (layer.train(training) for layer in pair(**options))
    x = torch.randn(B, T, D)
    x = x if options.get("batch_first", True) else x.transpose(0, 1)
    real = ~MASKS[masks].get("src_key_padding_mask", torch.zeros(B, T)).bool()
    real = real if options.get("batch_first", True) else real.T
    with torch.set_grad_enabled(training):
        got = ours(x, **MASKS[masks])
        with unfused():
            want = plain(x, **MASKS[masks])
    assert_close(got[real], want[real], rtol=1e-4, atol=1e-4)
    assert not got.isnan().any()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_decoder_layer(training, batch_first):
    plain, ours = (
        layer.train(training) for layer in pair(nn.TransformerDecoderLayer, batch_first=batch_first)
    )
    x, memory = torch.randn(B, T, D), torch.randn(B, S, D)
    hidden = torch.zeros(B, S, dtype=torch.bool)
    hidden[1, 3:] = True
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    given = {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": hidden}
    want, got = (layer(x, memory, **given) for layer in (plain, ours))
    assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_without_a_batch():
    plain, ours = pair()
    x, hidden = torch.randn(T, D), padding()[0]
    real = ~hidden
    want, got = (layer(x, src_key_padding_mask=hidden) for layer in (plain, ours))
    assert_close(got[real], want[real], rtol=1e-4, atol=1e-4)


def encoder(built_before, **options):
    """An encoder of two layers with four of six heads on, whose attention came first or last."""
    layer = nn.TransformerEncoderLayer(D, H, F, dropout=0.0, batch_first=True)
    if not built_before:
        layer.self_attn = as_moh(layer.self_attn, **options)
    model = nn.TransformerEncoder(layer, 2)
    if built_before:
        for part in model.layers:
            part.self_attn = as_moh(part.self_attn, **options)
    return model


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("built_before", [True, False])
def test_an_encoder_in_eval_takes_no_fast_path_and_nests_nothing(built_before, gradients):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = encoder(built_before)
    assert model.use_nested_tensor
    x, hidden = torch.randn(B, T, D), padding()
    want = model(x, src_key_padding_mask=hidden)
    seen = []
    for part in model.layers:
        part.self_attn.attention.router.register_forward_hook(lambda *_: seen.append(1))
    with torch.set_grad_enabled(gradients):
        got = model.eval()(x, src_key_padding_mask=hidden)
    assert len(seen) == 2
    assert_close(got, want)
    changed = x.masked_fill(hidden.unsqueeze(-1), 100)
    assert_close(model(changed, src_key_padding_mask=hidden)[~hidden], got[~hidden])


def test_balance_loss_comes_from_the_recorder():
    model, x, hidden = encoder(True), torch.randn(B, T, D), padding()
    with headwise.record_routing(model) as routings:
        y = model(x, src_key_padding_mask=hidden)
    assert list(routings) == [f"layers.{i}.self_attn.attention.router" for i in (0, 1)]
    for routing in routings.values():
        on = (routing.weights != 0).sum(-1)
        assert (on[~hidden] == 4).all()
        assert (on[hidden] == 0).all()
    (y.square().mean() + sum(map(balance_loss, routings.values()))).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(
        p.grad.abs().sum() > 0 for p in model.layers[0].self_attn.attention.router.parameters()
    )


def test_a_whole_transformer_trains():
    model = nn.Transformer(D, H, 1, 1, F, dropout=0.1, batch_first=True)
    for part in [*model.encoder.layers, *model.decoder.layers]:
        for name in ("self_attn", "multihead_attn"):
            if hasattr(part, name):
                setattr(part, name, as_moh(getattr(part, name)))
    source, target = torch.randn(B, S, D), torch.randn(B, T, D)
    y = model(source, target, tgt_mask=CAUSAL, tgt_is_causal=True)
    y.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.usefixtures("unchecked")
def test_what_it_cannot_do_is_refused():
    heads = MoHMultiheadAttention(MoHAttention(D, num_heads=H, shared_heads=2, active_heads=4))
    x, other = torch.randn(T, B, D), torch.randn(T, B, D)
    for given, message in (
        ({"need_weights": True}, "need_weights is True; heads that are routed keep no"),
        ({"value": other}, "key and value are two tensors"),
        ({"is_causal": 1}, "is_causal is 1; it must be True or False"),
        (
            {"key_padding_mask": torch.full((B, T), 0.5)},
            "key_padding_mask holds numbers other than",
        ),
        ({"key_padding_mask": torch.zeros(B, S)}, f"mask is torch.bool [{B}, {S}]; it must be"),
        ({"attn_mask": torch.zeros(T)}, f"attn_mask has shape [{T}]; it must be [..., T, S]"),
        ({"attn_mask": torch.zeros(T, S)}, f"attn_mask has shape [{T}, {S}]; it must be broad"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            heads(**{"query": x, "key": x, "value": x} | given)
    with pytest.raises(ValueError, match=r"attention is .*; it must be a MoHAttention"):
        MoHMultiheadAttention(nn.Linear(2, 3))
