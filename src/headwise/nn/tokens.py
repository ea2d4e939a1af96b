"""What every layer asks of its input, before torch would fail on it with less to say."""

import torch
from torch import Tensor


def check_tokens(x: Tensor, mask: Tensor | None, *, dim: int, dtype: torch.dtype) -> None:
    """Refuse tokens or a padding mask that a layer of that width and dtype cannot take.

    Raises:
        ValueError: If x is not [B, T, dim] in `dtype` (under autocast any float will do), or the
            mask not boolean [B, T].
    """
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [B, T, {dim}]")
    mixed = torch.is_autocast_enabled(x.device.type) and x.is_floating_point()
    if x.dtype != dtype and dtype.is_floating_point and not mixed:
        raise ValueError(f"x is {x.dtype}, the layer's weights are {dtype}; they must agree")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        raise ValueError(
            f"mask is {mask.dtype} {list(mask.shape)}; it must be torch.bool {list(x.shape[:2])}"
        )
