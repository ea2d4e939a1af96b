"""Rotary positions: pairs of channels turned by angles that grow with a token's position."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.ops.tensors import check_tensor


def rotate(
    x: Float[Tensor, "B T H C"], cos: Float[Tensor, "*B T R"], sin: Float[Tensor, "*B T R"]
) -> Float[Tensor, "B T H C"]:
    """The first R channels turned: channel i < R/2 together with channel i + R/2.

        [a, b] → [a·cos - b·sin, b·cos + a·sin]

    **Source**: RoFormer, arXiv 2104.09864, Eq. 34, with the pairs of transformers' Llama, whose cos
    and sin have each angle twice. The other channels stay (partial rotary, as in GPT-NeoX).
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    a, b = turned.chunk(2, dim=-1)
    turned = (turned * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def check_rotary(
    rotary: Any, x: Float[Tensor, "B T D"], head_dim: int, name_of_width: str = "head_dim"
) -> None:
    """Refuse anything but cos and sin [T, R] or [B, T, R] of x's tokens, R even, up to head_dim."""
    if not isinstance(rotary, tuple | list) or len(rotary) != 2:
        raise ValueError(f"rotary is a {type(rotary).__name__}; it must be (cos, sin)")
    batch, tokens = x.shape[:2]
    for name, part in zip(("cos", "sin"), rotary, strict=True):
        check_tensor(f"rotary's {name}", part, ("...", tokens, "R"), like=x)
        width = part.shape[-1]
        fits = part.shape == rotary[0].shape and part.shape[:-2] in ((), (1,), (batch,))
        if not fits or width % 2 or not 0 < width <= head_dim:
            raise ValueError(
                f"rotary's {name} has shape {list(part.shape)}; cos and sin must both be "
                f"[{tokens}, R] or [{batch}, {tokens}, R], R even and at most {name_of_width} = "
                f"{head_dim}"
            )
