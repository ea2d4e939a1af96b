"""Attention heads of different widths, whose channels lie side by side in one projection."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.nn.kv_cache import Keys
from headwise.ops import head_attention
from headwise.ops.attention import Impl
from headwise.ops.rotary import rotate


def attend_by_width(
    q: Float[Tensor, "B T W"],
    k: Float[Tensor, "B S W"],
    v: Float[Tensor, "B S W"],
    gate: Float[Tensor, "B T H"],
    head_dims: tuple[int, ...],
    *,
    real: Bool[Tensor, "B S"] | None = None,
    attn_mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
    rotary: tuple[Float[Tensor, "..."], Float[Tensor, "..."]] | None = None,
    causal: bool = False,
    window: int | None = None,
    dropout: float = 0.0,
    share_on: float | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "B T W"]:
    """Gated attention heads of several widths, each with the scale 1/√C of its own C channels.

    `ops.head_attention` is called once for each width.

    Args:
        q, k, v: Channels of all heads side by side, head by head, W = sum(head_dims).
        gate: Weight of each head for each query token.
        head_dims: Channels of each head.
        real: False for keys that are padding.
        attn_mask: True where a key is seen, or what is added to scores; broadcastable to
            [B, H, T, S].
        rotary: cos and sin, [T, R] or [B, T, R], by which the first R channels of each head's
            queries and keys are turned.
        causal, window, dropout, share_on, impl: As `ops.head_attention` has them.

    Returns:
        The gated heads, side by side as they were.

    Raises:
        ValueError: If attn_mask has another shape or dtype, or for what `ops.head_attention`
            refuses.
    """
    keys = Keys(k.unsqueeze(2), v.unsqueeze(2), real, causal=causal, window=window)
    seen, bias = keys.masks(attn_mask, gate.unsqueeze(-1))
    heads: dict[int, Tensor] = {}
    for which in _of_each_width(head_dims):
        q_some, k_some, v_some = (_stacked(x, head_dims, which) for x in (q, k, v))
        if rotary is not None:
            q_some, k_some = rotate(q_some, *rotary), rotate(k_some, *rotary)
        y = head_attention(
            q_some,
            k_some,
            v_some,
            gate[..., which],
            causal=causal,
            mask=_of_heads(seen, which),
            bias=_of_heads(bias, which),
            window=window,
            dropout=dropout,
            share_on=share_on,
            impl=impl,
        )
        heads |= zip(which, y.unbind(dim=2), strict=True)
    return torch.cat([heads[head] for head in range(len(head_dims))], dim=-1)


def _of_each_width(head_dims: tuple[int, ...]) -> list[list[int]]:
    """Which heads have a width, for each of the widths."""
    return [
        [head for head, dim in enumerate(head_dims) if dim == width]
        for width in dict.fromkeys(head_dims)
    ]


def _stacked(x: Tensor, head_dims: tuple[int, ...], which: list[int]) -> Tensor:
    """Those heads, which are of one width: [B, T, W] to [B, T, H, C]."""
    heads = x.split(head_dims, dim=-1)
    return torch.stack([heads[head] for head in which], dim=2)


def _of_heads(scores: Tensor | None, which: list[int]) -> Tensor | None:
    """What a mask or bias that is broadcastable to [B, H, T, S] says of those heads."""
    if scores is None or scores.ndim < 3 or scores.shape[-3] == 1:
        return scores
    return scores[..., which, :, :]


def different_widths(
    head_dims: Sequence[int] | None,
    *,
    num_heads: int,
    head_dim: int | None,
    num_kv_heads: int,
    router: str,
    qk_norm: bool,
    layer_idx: int | None,
) -> tuple[int, ...] | None:
    """The channels of each head of a layer with these arguments; None where all have as many.

    Raises:
        ValueError: If there are not as many entries as heads, or an argument is for heads of one
            width.
    """
    if head_dims is None:
        return None
    if head_dim is not None:
        raise ValueError(
            f"head_dims is {[*head_dims]} and head_dim is {head_dim}; give one of them"
        )
    if len(head_dims) != num_heads:
        raise ValueError(
            f"head_dims has {len(head_dims)} entries; it must have one for each of num_heads = "
            f"{num_heads}"
        )
    if len(set(head_dims)) == 1:
        return None
    of_one_width: dict[str, tuple[Any, bool, str]] = {
        "num_kv_heads": (num_kv_heads, num_kv_heads != num_heads, f"num_heads = {num_heads}"),
        # Longer queries have larger norms, whatever is in them.
        "router": (router, router == "query_norm", "'two_stage' or 'one_stage'"),
        "qk_norm": (qk_norm, qk_norm, "False"),
        "layer_idx": (layer_idx, layer_idx is not None, "None, without a cache"),
    }
    for name, (value, misfits, right) in of_one_width.items():
        if misfits:
            raise ValueError(
                f"{name} is {value!r}; with heads of different widths (head_dims) it must be "
                f"{right}"
            )
    return tuple(head_dims)
