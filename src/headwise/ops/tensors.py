"""Checks of tensors, made before a kernel or torch fails on them with a poorer message.

Each raises a ValueError that names the argument, what it is and what it must be.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["any", "floating", "real", "whole", "torch.bool", "torch.uint8"]
_WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64)


def check_tensor(
    name: str, x: Any, sizes: Sequence[Any], *, kind: Kind = "floating", like: Tensor | None = None
) -> None:
    """Refuse anything but a tensor of that shape and kind, on the device of another one.

    Shapes, kinds and devices are known while a graph is captured, so this costs a graph nothing.

    Args:
        name: The argument's name.
        x: The argument.
        sizes: The axes' sizes: a number, or a name for any size; "..." in the first place stands
            for any axes.
        kind: "floating", "whole" (signed integers), "real" (both), "torch.bool", "torch.uint8" or
            "any".
        like: A tensor on whose device x must be. A device "meta" is not compared: such weights
            are elsewhere until they are needed.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; it must be a tensor {_wanted(sizes)}")
    if kind == "torch.bool" and (x.dtype != torch.bool or not _fits(x, sizes)):
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)}; it must be torch.bool {_wanted(sizes)}"
        )
    if not _fits(x, sizes):
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be {_wanted(sizes)}")
    if kind == "floating" and not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; it must be floating")
    if kind == "torch.uint8" and x.dtype != torch.uint8:
        raise ValueError(f"{name} is {x.dtype}; it must be torch.uint8")
    if kind == "real" and (x.is_complex() or x.dtype == torch.bool):
        raise ValueError(f"{name} is {x.dtype}; it must be of real numbers")
    if kind == "whole" and x.dtype not in _WHOLE:
        raise ValueError(f"{name} is {x.dtype}; it must be an integer, as torch.int64 is")
    if like is not None and not like.is_meta and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; it must be on {like.device} like the others")


# Only for a message: a size that torch.export keeps open has no name to print.
def _wanted(sizes: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _fits(x: Tensor, sizes: Sequence[Any]) -> bool:
    if sizes and sizes[0] == "...":
        sizes = sizes[1:]
        shape: Sequence[int] = x.shape[x.ndim - len(sizes) :] if x.ndim >= len(sizes) else ()
    else:
        shape = x.shape
    return len(shape) == len(sizes) and all(
        isinstance(size, str) or n == size for n, size in zip(shape, sizes, strict=True)
    )


def check_operands(
    operands: dict[str, tuple[Any, str]], *, sizes: dict[str, int] | None = None
) -> dict[str, int]:
    """Refuse tensors whose axes do not agree, that are not floating, or lie on several devices.

    Axes are named: check_operands({"q": (q, "B T H C"), "k": (k, "B S Hkv C")}) wants B and C of
    k to be those of q. The first tensor that has an axis decides its size. "..." stands for any
    number of axes in front, the same ones in all tensors.

    Args:
        operands: Each tensor, by name, with its axes.
        sizes: Axes whose size is known already.

    Returns:
        The size of each axis.
    """
    sizes = dict(sizes or {})
    batch: tuple[int, ...] | None = None
    first, device = "", None
    # Every call of an op runs this, so right tensors pass without a detour.
    for name, (x, axes) in operands.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            check_tensor(name, x, ("...",))
        if device is None:
            first, device = name, x.device
        elif x.device != device:
            check_same_device(**{first: operands[first][0], name: x})
        symbols, shape = axes.split(), x.shape
        if symbols[0] == "...":
            in_front = len(shape) - len(symbols) + 1
            batch = shape[: max(in_front, 0)] if batch is None else batch
            fits = in_front >= 0 and shape[:in_front] == batch
            symbols, shape = symbols[1:], shape[max(in_front, 0) :]
        else:
            fits = len(shape) == len(symbols)
        if not fits or any(sizes.get(n, m) != m for n, m in zip(symbols, shape, strict=True)):
            raise ValueError(_misfit(name, x, axes, sizes, batch))
        sizes.update(zip(symbols, shape, strict=True))
    return sizes


def _misfit(
    name: str, x: Tensor, axes: str, sizes: dict[str, int], batch: tuple[int, ...] | None
) -> str:
    """The message of `check_operands` for a tensor of another shape."""
    symbols = axes.split()
    known = [str(sizes.get(axis, axis)) for axis in symbols]
    if symbols[0] == "..." and batch is not None:
        known = [*map(str, batch), *known[1:]]
    sizes_known = "" if known == symbols else f" = [{', '.join(known)}]"
    return f"{name} has shape {list(x.shape)}; it must be [{', '.join(symbols)}]{sizes_known}"


def check_same_device(**operands: Tensor) -> None:
    """Refuse tensors on several devices; "meta" counts as a device, too."""
    first, device = next((name, x.device) for name, x in operands.items())
    for name, x in operands.items():
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}; it must be on {first}'s, {device}")


def check_same_dtype(**operands: Tensor) -> None:
    """Refuse tensors of several dtypes."""
    first, dtype = next((name, x.dtype) for name, x in operands.items())
    for name, x in operands.items():
        if x.dtype != dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; it must be {first}'s, {dtype}")


def adjacent(x: Tensor) -> Tensor:
    """x with its last axis side by side in memory: kernels follow the strides of all others."""
    return x if x.stride(-1) == 1 else x.contiguous()


def in_words(x: Tensor) -> Tensor:
    """x in words of 32 bits: kernels read bfloat16 in pairs, and each row starts with a pair."""
    even = x.element_size() == 4 or all(stride % 2 == 0 for stride in x.stride()[:-1])
    return adjacent(x) if even else x.contiguous()
