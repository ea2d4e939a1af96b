"""Continuous batching of transformers, `generate_batch` and `transformers serve`, on our attention.

Requests of several lengths run as one row of tokens, their keys and values in a cache of pages.
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from headwise.ops import head_attention
from headwise.ops.attention.pages import paged_attention

# The fields by which a user asks for steps of fixed sizes.
_PADDING = (
    "use_cuda_graph", "q_padding_interval_size", "kv_padding_interval_size",
    "varlen_compile_config", "decode_compile_config", "default_compile_level",
)  # fmt: skip
# Before, pages had attention functions of their own.
IS_SUPPORTED = hasattr(ContinuousBatchingManager, "switch_to_cb_friendly_attn")


def check_supported() -> None:
    """Refuse a transformers that is too old."""
    if not IS_SUPPORTED:
        raise ValueError(
            f"transformers is {transformers.__version__}, whose continuous batching cannot use "
            "routed heads; 5.23 can: `pip install -U transformers`"
        )


class RoutedBatchingManager(ContinuousBatchingManager):
    """transformers' own, which takes attention functions by name only, and not ours."""

    def switch_to_cb_friendly_attn(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Stays with "headwise", which reads the cache of pages as FlashAttention does: no mask."""


def init_continuous_batching(
    model: Any,
    generation_config: Any = None,
    continuous_batching_config: Any = None,
    **options: Any,
) -> ContinuousBatchingManager:
    """What transformers' method of this name does, with our manager.

    Raises:
        ValueError: If transformers is too old, or a step is to be compiled or captured, for which
            transformers pads the row of tokens.
    """
    check_supported()
    kept: Any = getattr(model, "_cached_continuous_batching_manager", None)
    if kept is not None:
        return kept
    config = continuous_batching_config or ContinuousBatchingConfig()
    for name in _PADDING:
        value = getattr(config, name)
        if value and value != (False, False):
            raise ValueError(
                f"{name} is {value!r}; a compiled or captured step has padding in its row of "
                "tokens, which routed heads do not take; leave it out"
            )
    generation_config = generation_config or model.generation_config
    if generation_config.eos_token_id is None:
        generation_config.eos_token_id = -1
    return RoutedBatchingManager(
        model=model,
        generation_config=generation_config,
        continuous_batching_config=config,
        **options,
    )


# It writes to the cache in place, of which a compiled graph would make copies.
@torch.compiler.disable
def attend_to_pages(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    cache: Any,
    cu_seq_lens_q: Tensor,
    *,
    scale: float | None,
    share_on: float | None,
    window: int | None,
    **kwargs: Any,
) -> Tensor:
    """Keys and values go to the pages; each request attends to its own, old and new.

    On CPUs, requests that go on by a token read keys and values where they are kept, those of heads
    that are off not; otherwise they are copied out of the pages first.

    Args:
        query: [1, H, T, C], the tokens of all requests in a row; key and value [1, G, T, C].
        gate: [1, T, H]; None for all heads on.
        cu_seq_lens_q: Where each request begins, and T.

    Returns:
        The gated heads, [1, T, H, C].
    """
    pages = _kept_in_place(cache, module.layer_idx, kwargs)
    if pages is not None:
        # With nothing to read, it writes.
        asked = kwargs | {"read_index": [places[:0] for places in kwargs["read_index"]]}
        cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=asked)
        kwargs["cu_seq_lens_k"] = asked["cu_seq_lens_k"]
    else:
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    gate = q.new_ones(q.shape[:3]) if gate is None else gate
    options: dict[str, Any] = {
        "window": window,
        "cu_seqlens": cu_seq_lens_q,
        "cu_seqlens_k": kwargs["cu_seq_lens_k"],
        "scale": scale,
        "share_on": share_on,
    }
    if pages is None:
        return head_attention(q.to(v.dtype), k, v, gate, causal=True, **options)
    k_pages, v_pages, places = pages
    return paged_attention(q.to(v_pages.dtype), k_pages, v_pages, gate, places, **options)


def _kept_in_place(
    cache: Any, layer: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """A layer's keys and values of all requests [P, G, C], and where those of these requests are.

    None where keys do not stay in their place, as in sliding windows; where there is nothing to
    read but what is new; and on a GPU, where no kernel reads scattered keys.
    """
    allocator = cache.layer_to_allocator[layer]
    places = kwargs["read_index"][allocator.index]
    if allocator.layer_type != "full_attention" or len(places) == 0 or places.device.type != "cpu":
        return None
    k, v = allocator.get_cache_for_block_table(layer)
    return k.flatten(0, 1), v.flatten(0, 1), places
