"""MoHAttention with transformers' caches: prefill, chunks and decoding equal one whole forward."""

import re

import pytest
import torch
from dense_moh import HEADS, B, D, S, T, angles, layer_of, tokens
from torch.testing import assert_close
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, StaticCache

from headwise import MoHAttention

WINDOW = 3
CONFIG = LlamaConfig(
    num_hidden_layers=3, hidden_size=30, num_attention_heads=5, num_key_value_heads=5, head_dim=6
)
SLIDING = LlamaConfig(**CONFIG.to_diff_dict() | {"layer_types": ["sliding_attention"] * 3})
SLIDING.sliding_window = WINDOW
CACHES = {
    "dynamic": lambda: DynamicCache(),
    "static": lambda: StaticCache(config=CONFIG, max_cache_len=11),
}
WINDOWED = CACHES | {
    "dynamic, sliding": lambda: DynamicCache(config=SLIDING),
    "static, sliding": lambda: StaticCache(config=SLIDING, max_cache_len=11),
}
CUTS = [(7,), (1,) * 7, (3, 4), (2, 1, 3, 1), (4, 1, 1, 1)]


def in_chunks(layer, x, sizes, cache, *, mask=None, rotary=None, **given):
    """What the layer says of x, chunk by chunk: y and gates."""
    ys, gates, end = [], [], 0
    for size in sizes:
        start, end = end, end + size
        turn = None if rotary is None else tuple(part[start:end] for part in rotary)
        y, routing = layer(
            x[:, start:end], None if mask is None else mask[:, :end], rotary=turn,
            past_key_values=cache, **given,
        )  # fmt: skip
        assert routing.weights.shape[:2] == (B, size)
        ys.append(y)
        gates.append(routing.weights)
    return torch.cat(ys, 1), torch.cat(gates, 1)


def padding():
    """On the left in row 0."""
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :2] = False
    return mask


@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("router", ["two_stage", "query_norm"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_chunks_equal_the_whole(masked, router, cache, sizes):
    layer = layer_of(router=router, causal=True, qk_norm=True, layer_idx=1)
    x, rotary, mask = tokens(B, T, D), angles(6), padding() if masked else None
    want, routing = layer(x, mask, rotary=rotary)
    y, gates = in_chunks(layer, x, sizes, CACHES[cache](), mask=mask, rotary=rotary)
    assert_close(y, want)
    assert_close(gates, routing.weights)


@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("cache", WINDOWED)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_windows(masked, cache, sizes):
    layer = layer_of(causal=True, window=WINDOW, layer_idx=0)
    x, mask = tokens(B, T, D), padding() if masked else None
    want, _ = layer(x, mask)
    assert_close(in_chunks(layer, x, sizes, WINDOWED[cache](), mask=mask)[0], want)


@pytest.mark.parametrize("impl", ["reference", "dense", "gathered", "decode"])
@pytest.mark.parametrize("cache", CACHES)
@torch.no_grad()
def test_every_implementation(cache, impl):
    layer = layer_of(causal=True, impl=impl, num_kv_heads=5, layer_idx=0)
    x = tokens(B, T, D)
    assert_close(in_chunks(layer, x, (4, 1, 2), CACHES[cache]())[0], layer(x)[0])


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("cache", WINDOWED)
@torch.no_grad()
def test_kernels_in_cpp(cache):
    window = WINDOW if "sliding" in cache else None
    exact = layer_of(causal=True, window=window, layer_idx=0)
    layer = MoHAttention(D, **HEADS, causal=True, window=window, layer_idx=0, impl="native")
    layer.load_state_dict(exact.state_dict())
    x = tokens(B, T, D)
    y, _ = in_chunks(layer, x.float(), (4, 1, 2), WINDOWED[cache]())
    assert_close(y.double(), exact(x)[0], rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_a_growing_cache():
    layer, x = layer_of(causal=True, layer_idx=0), tokens(B, T, D)
    weights = [*layer.parameters(), x]
    of_chunks = torch.autograd.grad(in_chunks(layer, x, (4, 3), DynamicCache())[0].sum(), weights)
    assert_close(of_chunks, torch.autograd.grad(layer(x)[0].sum(), weights))


@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("cache", CACHES)
@torch.no_grad()
def test_other_masks_are_of_all_keys(cache, boolean):
    """Of a static cache, of all slots."""
    layer, x = layer_of(causal=True, layer_idx=0), tokens(B, T, D)
    whole = torch.randn(T, 11, dtype=torch.float64)
    whole = whole > -0.5 if boolean else whole
    want, _ = layer(x, attn_mask=whole[:, :T])
    kept, end, ys = CACHES[cache](), 0, []
    for size in (4, 1, 2):
        start, end = end, end + size
        mask = whole[start:end, : 11 if cache == "static" else end]
        ys.append(layer(x[:, start:end], attn_mask=mask, past_key_values=kept)[0])
    assert_close(torch.cat(ys, 1), want)


@torch.no_grad()
def test_tokens_that_see_all_see_what_is_cached():
    layer, x = layer_of(layer_idx=0), tokens(B, T, D)
    causal = torch.arange(T).unsqueeze(-1) // 4 >= torch.arange(T) // 4
    want, _ = layer(x, attn_mask=causal)
    for build in CACHES.values():
        assert_close(in_chunks(layer, x, (4, 3), build())[0], want)


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_keys_of_a_context_are_made_once(static):
    own, crossing = layer_of(causal=True, layer_idx=2), layer_of(layer_idx=2, qk_norm=True)
    x, context = tokens(B, T, D), tokens(B, S, D)
    real = torch.ones(B, S, dtype=torch.bool)
    real[1, 8:] = False
    given = {"context": context, "context_mask": real}
    want, _ = crossing(own(x)[0], **given)
    build = CACHES["static" if static else "dynamic"]
    cache, calls, ys = EncoderDecoderCache(build(), build()), [], []
    crossing.k_proj.register_forward_hook(lambda *_: calls.append(1))
    for chunk in x.split((4, 1, 2), dim=1):
        y, _ = own(chunk, past_key_values=cache)
        ys.append(crossing(y, past_key_values=cache, **given)[0])
    assert_close(torch.cat(ys, 1), want)
    assert len(calls) == 1
    other = tokens(B, S - 1, D)
    with pytest.raises(ValueError, match=re.escape(f"context has shape [{B}, {S - 1}, {D}]; past")):
        crossing(x, context=other, past_key_values=cache)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_a_cache_is_refused():
    x, cache = tokens(B, T, D), DynamicCache()
    with pytest.raises(ValueError, match="layer_idx is None, and past_key_values is given"):
        layer_of(causal=True)(x, past_key_values=cache)
    layer = layer_of(causal=True, layer_idx=0)
    layer(x, past_key_values=cache)
    with pytest.raises(ValueError, match=re.escape(f"it must be torch.bool [{B}, {2 * T}]")):
        layer(x, torch.ones(B, T, dtype=torch.bool), past_key_values=cache)
    sliding = DynamicCache(config=SLIDING)
    layer(x, past_key_values=sliding)
    with pytest.raises(ValueError, match="past_key_values gives 3 of 8 keys, and window is None"):
        layer(x[:, :1], past_key_values=sliding)
    static = StaticCache(config=CONFIG, max_cache_len=11)
    layer(x, past_key_values=static)
    with pytest.raises(ValueError, match=r"mask has 12 tokens.* 11 slots"):
        layer(x[:, :1], torch.ones(B, 12, dtype=torch.bool), past_key_values=static)
