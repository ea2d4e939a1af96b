"""Keys and values of earlier tokens, in caches such as transformers'.

A cache holds tensors [B, G, T, C] of each layer, and knows how many tokens it was given. For T new
tokens after P earlier ones it gives back

    n = P + T keys              (DynamicCache)
    fewer, the newest ones      (sliding windows)
    more: slots, of which those from n on are empty (StaticCache)

A static cache counts its tokens in a tensor, so that nothing waits for the device and a compiled
graph has one size. Then all slots are keys, and a mask hides what a token may not see.
"""

from functools import reduce
from operator import and_
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from headwise.ops.tensors import check_broadcastable, check_tensor


@runtime_checkable
class KeyValueCache(Protocol):
    """What a layer asks of a cache. That of a context also has `layers`, with `keys` and `values`.

    transformers' caches have it.
    """

    def update(self, k: Any, v: Any, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, G, T, C] of a layer; gives back what the new tokens may see."""

    def get_seq_length(self, layer_idx: int, /) -> int | Tensor:
        """How many tokens were added to a layer."""


class Keys(NamedTuple):
    """What tokens attend to.

    Attributes:
        k, v: Of the S keys. Unless there is `seen`, the last one is the newest token's.
        real: False for padding; None where there is none.
        seen: What each token sees; None where `causal` and `window` say it.
        causal, window: As `ops.head_attention` has them.
        slots: Of a static cache whose empty slots were cut off: how many it has, with them.
    """

    k: Float[Tensor, "B S G C"]
    v: Float[Tensor, "B S G C"]
    real: Bool[Tensor, "B S"] | None
    seen: Bool[Tensor, "1 1 T S"] | None = None
    causal: bool = False
    window: int | None = None
    slots: int = 0

    def masks(
        self, attn_mask: Tensor | None, q: Float[Tensor, "B T H C"]
    ) -> tuple[Bool[Tensor, "..."] | None, Float[Tensor, "..."] | None]:
        """All that hides keys from queries as one mask, and what is added to their scores."""
        masks = [] if self.real is None else [self.real[:, None, None]]
        masks += [] if self.seen is None else [self.seen]
        bias = None
        if attn_mask is not None:
            batch, tokens, heads, _ = q.shape
            check_tensor("attn_mask", attn_mask, ("...",), kind="any")
            if attn_mask.shape[-1:] == (self.slots,):
                attn_mask = attn_mask[..., : self.k.shape[1]]
            boolean = attn_mask.dtype == torch.bool
            check_broadcastable(
                "attn_mask", attn_mask, "B H T S", (batch, heads, tokens, self.k.shape[1]),
                kind="torch.bool" if boolean else "floating", like=q,
            )  # fmt: skip
            masks, bias = ([*masks, attn_mask], None) if boolean else (masks, attn_mask)
        return reduce(and_, masks) if masks else None, bias


def cache_of(cache: Any, *, context: bool) -> Any:
    """Of an EncoderDecoderCache the part for a context or for the tokens; else the cache itself."""
    part = "cross_attention_cache" if context else "self_attention_cache"
    return getattr(cache, part, cache)


def extended(
    cache: KeyValueCache,
    layer_idx: int,
    k: Float[Tensor, "B T G C"],
    v: Float[Tensor, "B T G C"],
    mask: Bool[Tensor, "B N"] | None,
    *,
    causal: bool,
    window: int | None,
) -> tuple[Keys, Bool[Tensor, "B T"] | None]:
    """Add keys and values of new tokens to a cache.

    Args:
        cache: With the keys of P tokens.
        layer_idx: Of the layer, in the cache.
        k, v: Of the T new tokens.
        mask: False for padding, of all P + T tokens.
        causal, window: Of the layer.

    Returns:
        What the new tokens attend to, and their own part of the mask.

    Raises:
        ValueError: If the mask has another shape, or the cache keeps fewer keys than tokens see.
    """
    batch, tokens = k.shape[:2]
    before = cache.get_seq_length(layer_idx)
    if isinstance(before, Tensor):
        # The cache counts on in the same tensor.
        return _of_slots(cache, layer_idx, k, v, mask, before.clone(), causal, window)
    so_far = before + tokens
    if mask is not None:
        check_tensor("mask", mask, (batch, so_far), kind="torch.bool", like=k)
    k, v = _updated(cache, layer_idx, k, v)
    kept = k.shape[1]
    if kept < min(so_far, so_far if window is None else window - 1 + tokens):
        raise ValueError(
            f"past_key_values gives {kept} of {so_far} keys, and window is {window}; the layer's "
            "window must not be wider than the cache's"
        )
    real = None if mask is None else mask[:, max(0, so_far - kept) :]
    own = None if mask is None else mask[:, before:]
    return Keys(k[:, :so_far], v[:, :so_far], real, None, causal, window, kept), own


def _of_slots(
    cache: KeyValueCache,
    layer_idx: int,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    before: Tensor,
    causal: bool,
    window: int | None,
) -> tuple[Keys, Tensor | None]:
    """The same where the cache counts in a tensor.

    Example: 3 tokens come after 7, causal, window 4: of 64 slots token 1 is in slot 8 and sees
    slots 5 to 8.
    """
    batch, tokens = k.shape[:2]
    k, v = _updated(cache, layer_idx, k, v)
    slots = torch.arange(k.shape[1], device=k.device)
    own = before + torch.arange(tokens, device=k.device)
    at = own.unsqueeze(-1)
    seen = slots <= (at if causal else at[-1:])
    if window is not None:
        seen = seen & (slots > at - window) & (slots < at + window)
    real = own_mask = None
    if mask is not None:
        check_tensor("mask", mask, (batch, "P + T"), kind="torch.bool", like=k)
        if mask.shape[1] > len(slots):
            raise ValueError(
                f"mask has {mask.shape[1]} tokens; past_key_values has {len(slots)} slots"
            )
        real = pad(mask, (0, len(slots) - mask.shape[1]))
        own_mask = real.index_select(1, own)
    return Keys(k, v, real, seen.expand(1, 1, tokens, -1)), own_mask


def kept_keys(
    cache: Any, layer_idx: int, context: Float[Tensor, "B S D"]
) -> tuple[Float[Tensor, "B S G C"], Float[Tensor, "B S G C"]] | None:
    """Keys and values of a context, which a cache has from an earlier call; None where it has none.

    Raises:
        ValueError: If they are of a context of another size.
    """
    length = int(cache.get_seq_length(layer_idx))
    if length == 0:
        return None
    layer = cache.layers[layer_idx]
    k, v = (x[:, :, :length].transpose(1, 2) for x in (layer.keys, layer.values))
    if k.shape[:2] != context.shape[:2]:
        raise ValueError(
            f"context has shape {list(context.shape)}; past_key_values has the keys of one of "
            f"[B, S] = {list(k.shape[:2])}"
        )
    return k, v


def _updated(cache: KeyValueCache, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), layer_idx)
    return k.transpose(1, 2), v.transpose(1, 2)
