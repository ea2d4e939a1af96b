"""Layers with drawn weights, and what they compute by torch's attention on all heads."""

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from headwise import MoHAttention
from headwise.nn import QueryNormRouter

B, T, S, D, E, H, C = 2, 7, 11, 15, 13, 5, 6
HEADS = {"num_heads": H, "shared_heads": 2, "active_heads": 3, "head_dim": C}


def layer_of(**options):
    """A layer in float64 whose weights are all drawn."""
    layer = MoHAttention(D, **HEADS | options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


def tokens(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def turned(x, rotary):
    """Rotary positions as complex numbers, x [B, H, T, C]."""
    cos, sin = (part[..., : part.shape[-1] // 2] for part in rotary)
    half = cos.shape[-1]
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half])
    pairs = pairs * torch.complex(cos, sin).unsqueeze(-3)
    return torch.cat([pairs.real, pairs.imag, x[..., 2 * half :]], dim=-1)


def normed(x, norm):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight


def dense(layer, x, *, context=None, mask=None, seen=None, bias=None, rotary=None):
    """Every head by torch's attention in its plain form, times its gate."""
    tokens = x if context is None else context
    q, k, v = (
        linear(of, p.weight, p.bias).unflatten(-1, (-1, C)).transpose(1, 2)
        for of, p in ((x, layer.q_proj), (tokens, layer.k_proj), (tokens, layer.v_proj))
    )
    by_queries = isinstance(layer.router, QueryNormRouter)
    routing = layer.router(q.transpose(1, 2) if by_queries else x, mask)
    if layer.q_norm is not None:
        q, k = normed(q, layer.q_norm), normed(k, layer.k_norm)
    if rotary is not None:
        q, k = turned(q, rotary), turned(k, rotary)
    added = torch.zeros(B, H, x.shape[1], k.shape[2], dtype=x.dtype)
    added = added if bias is None else added + bias
    added = added if seen is None else added.masked_fill(~seen, -torch.inf)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        heads = scaled_dot_product_attention(q, k, v, attn_mask=added, enable_gqa=True)
    gates = routing.weights.transpose(1, 2).unsqueeze(-1).to(x.dtype)
    heads = torch.where(gates == 0, 0, heads * gates)  # a gate of 0 passes no gradient
    return layer.o_proj(heads.transpose(1, 2).flatten(2)), routing


def angles(width, *, batch=()):
    """cos and sin [*batch, T, R]."""
    at = torch.rand(*batch, T, width // 2, dtype=torch.float64) * 9
    at = torch.cat([at, at], dim=-1)
    return at.cos(), at.sin()
