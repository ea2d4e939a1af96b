"""What a tensor must be, asked before a kernel or torch would fail on it with less to say."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["any", "floating", "real", "whole", "torch.bool", "torch.uint8"]


def check_tensor(
    name: str,
    x: Any,
    sizes: Sequence[Any],
    *,
    kind: Kind = "floating",
    like: Tensor | None = None,
) -> None:
    """Refuse what is no tensor of that shape and kind, or lies elsewhere than another tensor.

    Shapes, kinds and devices are known while a graph is captured, so that it costs a graph nothing.

    Args:
        name: Of the argument.
        x: What came.
        sizes: Of the axes: a number, or a name for any; "..." in the first place for any axes.
        kind: "floating", "real" (those and whole numbers), "whole" (int32 or int64), "torch.bool",
            "torch.uint8" or "any".
        like: A tensor whose device it must share; weights on the meta device are somewhere else
            until they are needed, and not asked.

    Raises:
        ValueError: Naming the argument, what came and what would be right.
    """
    wanted = f"[{', '.join(map(str, sizes))}]"
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; it must be a tensor {wanted}")
    if kind == "torch.bool" and (x.dtype != torch.bool or not _fits(x, sizes)):
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; it must be torch.bool {wanted}")
    if not _fits(x, sizes):
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be {wanted}")
    if kind == "floating" and not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; it must be floating")
    if kind == "torch.uint8" and x.dtype != torch.uint8:
        raise ValueError(f"{name} is {x.dtype}; it must be torch.uint8")
    if kind == "real" and (x.is_complex() or x.dtype == torch.bool):
        raise ValueError(f"{name} is {x.dtype}; it must be of real numbers")
    if kind == "whole" and x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {x.dtype}; it must be torch.int64 or torch.int32")
    if like is not None and not like.is_meta and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; it must be on {like.device} like the others")


def _fits(x: Tensor, sizes: Sequence[Any]) -> bool:
    if sizes and sizes[0] == "...":
        sizes = sizes[1:]
        shape: Sequence[int] = x.shape[x.ndim - len(sizes) :] if x.ndim >= len(sizes) else ()
    else:
        shape = x.shape
    return len(shape) == len(sizes) and all(
        isinstance(size, str) or n == size for n, size in zip(shape, sizes, strict=True)
    )
