"""Rivals by torch: plain attention, on a GPU by its fastest backend, and FlexAttention there."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from headwise.training.timing import interleaved

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


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


def causal_flex_attention(length: int, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention of q, k, v [B, T, H, C], compiled for causal attention over `length` tokens."""
    mask = create_block_mask(
        lambda b, h, query, key: query >= key, None, None, length, length, device=device
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = compiled(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            block_mask=mask, enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip
        return heads.transpose(1, 2)

    return attend
