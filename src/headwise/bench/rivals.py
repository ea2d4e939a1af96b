"""Rivals by torch: plain attention, on a GPU by its fastest backend, and FlexAttention."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from headwise.training.timing import interleaved

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Of longer inputs the exact result is computed for some of the queries only.
_EXACT_ROWS, EXACT_LENGTH = 128, 4096
# Queries and keys of a block of FlexAttention's mask.
_BLOCK = 128


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Attention of q, k, v [B, T, H, C]."""
    with torch.set_grad_enabled(q.requires_grad):
        heads = scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            attn_mask=mask, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip
    return heads.transpose(1, 2)


def attention_of_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, causal: bool = True) -> Tensor:
    """Attention of some queries [B, R, H, C], which stand in these rows of all."""
    mask = torch.arange(k.shape[1], device=q.device) <= rows.unsqueeze(1) if causal else None
    return plain_attention(q, k, v, mask=mask)


def rows_to_check(length: int, device: torch.device) -> Tensor:
    """All rows of a short input, some of a long one: exact results take long."""
    every = torch.arange(length, device=device)
    if length <= EXACT_LENGTH:
        return every
    return every[torch.randperm(length, device=device)[:_EXACT_ROWS]]


def fastest(run: Callable[[], Any], device: torch.device) -> tuple[str, Callable[[], Any]]:
    """torch's attention, and its name: on a GPU by the fastest backend that takes these inputs."""
    if device.type != "cuda":
        return "SDPA", run
    candidates = {f"SDPA ({name})": sdpa_kernel(x)(run) for name, x in _BACKENDS.items()}
    usable = {name: candidate for name, candidate in candidates.items() if _runs(candidate)}
    times = interleaved(usable, rounds=5, seconds=0, warmups=2, device=device, launches=False)
    name = min(times, key=times.__getitem__)
    return name, usable[name]


def _runs(candidate: Callable[[], Any]) -> bool:
    """Whether the backend takes the inputs; torch says no by a RuntimeError, and warns why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            candidate()
        except RuntimeError:
            return False
    return True


def compiled_flex_attention() -> Callable[..., Tensor]:
    """FlexAttention as it is meant to run; each shape takes it half a minute to compile.

    torch keeps a few shapes and falls back to the unfused form after them, so all are forgotten.
    """
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False)


def causal_flex_attention(
    flex: Callable[..., Tensor], length: int, device: torch.device
) -> Callable[..., Tensor]:
    """Every head of q, k, v [B, T, H, C]; blocks of keys after all of a block's queries are left.

    Args:
        flex: `flex_attention`, compiled or not.
        length: Tokens.
        device: Of q, k and v.
    """
    mask = create_block_mask(
        lambda b, h, query, key: query >= key, None, None, length, length, device=device
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _flex(flex, q.transpose(1, 2), k, v, mask).transpose(1, 2)

    return attend


def gathered_flex_attention(
    flex: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, gate: Tensor
) -> Tensor:
    """Causal heads that are on, times their gates [B, T, H]: queries gathered, in FlexAttention.

    A block of gathered queries sees whole blocks of keys without a mask up to its first position,
    and by the mask those up to its last. With blocks of 2, queries at positions 1, 4 | 5, 5 (the
    last again, to fill up) see the keys 0 to 1 whole and 2 to 5 masked | 0 to 5 whole.
    """
    on = (gate != 0).transpose(1, 2)
    counts = on.sum(-1, keepdim=True)
    longest = -(-int(counts.max()) // _BLOCK) * _BLOCK
    places = torch.arange(longest, device=q.device).minimum((counts - 1).clamp(min=0))
    positions = (~on).sort(dim=-1, stable=True).indices.gather(2, places)
    blocks = positions.unflatten(-1, (-1, _BLOCK))
    whole = (blocks.amin(-1) + 1) // _BLOCK
    masked = blocks.amax(-1) // _BLOCK + 1 - whole
    last = -(-k.shape[1] // _BLOCK) - 1
    every = torch.arange(last + 1, device=q.device).expand(*whole.shape, -1)
    after = (every + whole.unsqueeze(-1)).clamp(max=last)
    mask = BlockMask.from_kv_blocks(
        masked.int(), after.int().contiguous(), whole.int(), every.int().contiguous(),
        BLOCK_SIZE=_BLOCK, mask_mod=lambda b, h, query, key: positions[b, h, query] >= key,
        seq_lengths=(longest, k.shape[1]),
    )  # fmt: skip
    channels = positions.unsqueeze(-1).expand(-1, -1, -1, q.shape[-1])
    q = q.transpose(1, 2)
    heads = _flex(flex, q.gather(2, channels), k, v, mask)
    heads = torch.zeros_like(q).scatter(2, channels, heads).transpose(1, 2)
    return heads * gate.to(heads.dtype).unsqueeze(-1)


def _flex(flex: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Heads [B, H, T, C] of such q, and k, v [B, S, Hkv, C]."""
    grouped = q.shape[1] != k.shape[2]
    return flex(q, k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, enable_gqa=grouped)
