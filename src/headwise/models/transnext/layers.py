"""Layers of TransNeXt: attentions, whose heads a MoH-ViT routes, and the convolutional GLU."""

import math
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    gelu,
    normalize,
    softplus,
)

from headwise.models.transnext.config import TransNeXtConfig
from headwise.nn import TwoStageRouter
from headwise.ops import aggregated_attention, head_attention
from headwise.ops.dtypes import wide_dtype

# Width of the MLP of positions, in all published models.
_POSITION_HIDDEN = 512


class Geometry(NamedTuple):
    """What the attentions of a stage know of a map of H × W tokens and its P pooled keys.

    In global attention the pooled keys are the tokens themselves.

    Attributes:
        size: H and W.
        pooled: Height and width of the pooled keys.
        coordinates: Relative positions of queries and pooled keys, each once: [U, 2].
        places: Which of them is that of query t and pooled key p, t by t: [T · P].
        log_keys: Logarithm of the number of keys that each query sees, [T].
    """

    size: tuple[int, int]
    pooled: tuple[int, int]
    coordinates: Tensor
    places: Tensor
    log_keys: Tensor

    @classmethod
    def of(
        cls, x: Tensor, config: TransNeXtConfig, stage: int, size: tuple[int, int]
    ) -> "Geometry":
        """That of maps of this size in that stage, on x's device."""
        ratio = config.sr_ratios[stage]
        pooled = (size[0] // ratio, size[1] // ratio)
        pretrained = config.pretrained_side(stage)
        rows, row = _relative_positions(size[0], pooled[0], pretrained)
        columns, column = _relative_positions(size[1], pooled[1], pretrained)
        places = row[:, None, :, None] * len(columns) + column[None, :, None, :]
        window = config.window_size if ratio > 1 else 0
        near = _seen(size[0], window)[:, None] * _seen(size[1], window)
        return cls(
            size,
            pooled,
            torch.cartesian_prod(rows, columns).to(x),
            places.flatten().to(x.device),
            (near.flatten() + math.prod(pooled)).double().log().to(wide_dtype(x)).to(x.device),
        )


def _relative_positions(queries: int, keys: int, pretrained: int) -> tuple[Tensor, Tensor]:
    """Of one axis: the relative positions, each once, and which is whose, [queries, keys].

    A pooled key stands at the average position of what it pools. Distances are counted in eighths
    of the map that was trained on, and grow with their logarithm.
    """
    positions = torch.arange(queries, dtype=torch.float64, device="cpu")
    centres = adaptive_avg_pool1d(positions[None], keys)[0]
    # A map of one token has no distances to scale.
    distances = (positions[:, None] - centres) * 8 / max(pretrained - 1, 1)
    unique, index = distances.unique(return_inverse=True)
    return unique.sign() * torch.log2(unique.abs() + 1) / math.log2(8), index


def _seen(length: int, window: int) -> Tensor:
    """Of one axis: positions of the window around each token that lie on the map."""
    positions = torch.arange(length, device="cpu")
    first, last = positions - window // 2, positions + (window - 1) // 2
    return last.clamp(max=length - 1) - first.clamp(min=0) + 1


class PositionBias(nn.Module):
    """An MLP from relative positions to what each head adds to the scores, [H, T, P].

    It is evaluated once for each relative position, whatever the size of the map.

    **Source**: continuous position bias of Swin V2, arXiv 2111.09883, as TransNeXt has it.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.up = nn.Linear(2, _POSITION_HIDDEN)
        self.down = nn.Linear(_POSITION_HIDDEN, num_heads)

    def forward(self, geometry: Geometry) -> Tensor:
        """The bias of all queries and pooled keys."""
        table = self.down(self.up(geometry.coordinates).relu()).T
        tokens = math.prod(geometry.size)
        return table.index_select(1, geometry.places).unflatten(1, (tokens, -1))


class GlobalAttention(nn.Module):
    """Length-scaled cosine attention over all tokens, with routed heads in a MoH-ViT.

        q̂_h = (l2(q_h) + e_h) · softplus(τ_h) · log(keys)
        y   = W_O concat_h(g_h · softmax(q̂_h l2(k_h)ᵀ + bias_h) v_h)

    **Source**: TransNeXt, arXiv 2311.17132, section 3; the gates g are those of
    `nn.TwoStageRouter` in mode "released", and 1 in a dense TransNeXt.
    """

    is_causal = False

    def __init__(self, config: TransNeXtConfig, stage: int):
        super().__init__()
        dim, self.num_heads = config.hidden_sizes[stage], config.num_heads[stage]
        self.head_dim = dim // self.num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)
        self.o_proj = nn.Linear(dim, dim)
        self.query_embedding = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
        self.temperature = nn.Parameter(torch.empty(self.num_heads))
        self.position_bias = PositionBias(self.num_heads)
        self.dropout = nn.Dropout(config.hidden_dropout)
        budget = config.budget(stage)
        std = config.initializer_range
        self.router = None if budget is None else TwoStageRouter(dim, budget, std=std)
        # Of `ops.head_attention` or `ops.aggregated_attention`.
        self.impl: Any = "auto"

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        """Attend: [B, T, D] to [B, T, D]."""
        unit_q = normalize(self._heads(self.q_proj(x)), dim=-1)
        sharpness = softplus(self.temperature) * geometry.log_keys[:, None]
        q = (unit_q + self.query_embedding) * sharpness[..., None]
        gate = x.new_ones(unit_q.shape[:-1]) if self.router is None else self.router(x).weights
        y = self._attend(x, q, unit_q, gate, geometry)
        return self.dropout(self.o_proj(rearrange(y, "b t h c -> b t (h c)")))

    def _attend(
        self, x: Tensor, q: Tensor, unit_q: Tensor, gate: Tensor, geometry: Geometry
    ) -> Tensor:
        k, v = self._keys_and_values(x)
        bias = self.position_bias(geometry)
        return head_attention(q.to(v.dtype), k, v, gate, bias=bias, scale=1.0, impl=self.impl)

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (self._heads(part) for part in self.kv_proj(x).chunk(2, dim=-1))
        # Autocast normalises in float32.
        return normalize(k, dim=-1).to(v.dtype), v

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t (h c) -> b t h c", h=self.num_heads)


class AggregatedAttention(GlobalAttention):
    """Each token looks at the window around it closely, and at all of the map pooled.

    The softmax runs over both together, and learned weights join those of the window:

        y = W_O concat_h(g_h · ((a_near,h + l2(q_h) T_h + b_h) v_near,h + a_pool,h v_pool,h))

    with pooled keys and values of norm(pool(gelu(W_pool x))).

    **Source**: TransNeXt, arXiv 2311.17132, section 3, as `ops.aggregated_attention` has it.
    """

    def __init__(self, config: TransNeXtConfig, stage: int):
        super().__init__(config, stage)
        dim, self.window = config.hidden_sizes[stage], config.window_size
        self.pool_proj = nn.Conv2d(dim, dim, kernel_size=1)
        self.pool_norm = nn.LayerNorm(dim)
        self.local_bias = nn.Parameter(torch.empty(self.num_heads, self.window**2))
        self.learned_tokens = nn.Parameter(
            torch.empty(self.num_heads, self.head_dim, self.window**2)
        )
        self.learned_bias = nn.Parameter(torch.empty(self.num_heads, self.window**2))

    def _attend(
        self, x: Tensor, q: Tensor, unit_q: Tensor, gate: Tensor, geometry: Geometry
    ) -> Tensor:
        k, v = self._keys_and_values(x)
        x_pool = gelu(self.pool_proj(to_map(x, geometry.size)))
        x_pool = adaptive_avg_pool2d(x_pool, geometry.pooled)
        k_pool, v_pool = self._keys_and_values(self.pool_norm(to_tokens(x_pool)))
        return aggregated_attention(
            q.to(v.dtype),
            k,
            v,
            k_pool,
            v_pool,
            gate,
            size=geometry.size,
            window=self.window,
            local_bias=self.local_bias,
            pool_bias=self.position_bias(geometry),
            unit_q=unit_q.to(v.dtype),
            learned_tokens=self.learned_tokens,
            learned_bias=self.learned_bias,
            impl=self.impl,
        )


class ConvolutionalGLU(nn.Module):
    """y = W_down(gelu(conv(u)) · v) with [u, v] = W_up x and a 3 × 3 convolution by channels.

    **Source**: TransNeXt, arXiv 2311.17132, section 3 (convolutional GLU). The gate takes a third
    of the hidden width.
    """

    def __init__(self, config: TransNeXtConfig, stage: int):
        super().__init__()
        dim = config.hidden_sizes[stage]
        hidden = 2 * int(dim * config.mlp_ratios[stage]) // 3
        self.up_proj = nn.Linear(dim, 2 * hidden)
        self.conv = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.down_proj = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        u, v = self.up_proj(x).chunk(2, dim=-1)
        u = to_tokens(self.conv(to_map(u, size)))
        return self.dropout(self.down_proj(self.dropout(gelu(u) * v)))


def to_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens, row by row, as a map: [B, T, D] to [B, D, H, W]."""
    return rearrange(x, "b (h w) d -> b d h w", h=size[0], w=size[1])


def to_tokens(x: Tensor) -> Tensor:
    """A map as tokens, row by row: [B, D, H, W] to [B, T, D]."""
    return rearrange(x, "b d h w -> b (h w) d")
