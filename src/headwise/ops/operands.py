"""What every public op checks of its tensors before an implementation sees them."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def check_operands(
    operands: dict[str, tuple[Any, str]], *, sizes: dict[str, int] | None = None
) -> dict[str, int]:
    """Refuse tensors whose axes do not agree, that are not floating, or lie on several devices.

    Axes are named: check_operands({"q": (q, "B T H C"), "k": (k, "B S Hkv C")}) wants B and C of
    k to be those of q. The first tensor that has an axis decides its size. "..." stands for any
    number of axes in front, the same ones in all tensors.

    Args:
        operands: Each tensor, by name, with its axes.
        sizes: Of axes that are known already.

    Returns:
        The size of each axis.

    Raises:
        ValueError: Naming the tensor, what it is and what it must be.
    """
    sizes = dict(sizes or {})
    batch: tuple[int, ...] | None = None
    first = next(iter(operands))
    check_tensor(first, operands[first][0])
    for name, (x, axes) in operands.items():
        check_tensor(name, x, device=operands[first][0].device)
        symbols = axes.removeprefix("...").split()
        in_front = x.ndim - len(symbols)
        shape = x.shape[max(in_front, 0) :]
        if in_front >= 0 and axes.startswith("..."):
            batch = x.shape[:in_front] if batch is None else batch
            fits = x.shape[:in_front] == batch
        else:
            fits = in_front == 0
        own = list(zip(symbols, shape, strict=False))
        if fits and all(sizes.get(axis, size) == size for axis, size in own):
            sizes.update(own)
        else:
            known = [str(sizes.get(axis, axis)) for axis in symbols]
            if axes.startswith("..."):
                symbols, known = ["...", *symbols], [*map(str, batch or ["..."]), *known]
            raise ValueError(
                f"{name} has shape {list(x.shape)}; it must be [{', '.join(symbols)}] = "
                f"[{', '.join(known)}]"
            )
    return sizes


def check_tensor(
    name: str,
    x: Any,
    *,
    device: torch.device | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Refuse what is no tensor, of another dtype, or on another device.

    Raises:
        ValueError: Naming the tensor, what it is and what it must be.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; it must be a tensor")
    if x.dtype not in dtypes:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} has dtype {x.dtype}; it must be {known}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on {x.device}; it must be on {device}, as the others are")


def check_same_dtype(**operands: Tensor) -> None:
    """Refuse tensors of several dtypes.

    Raises:
        ValueError: Naming the first that differs, and the dtype that it must have.
    """
    first, dtype = next((name, x.dtype) for name, x in operands.items())
    for name, x in operands.items():
        if x.dtype != dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; it must be {first}'s, {dtype}")


def adjacent(x: Tensor) -> Tensor:
    """The same with the last axis side by side in memory: kernels follow every stride but that."""
    return x if x.stride(-1) == 1 else x.contiguous()
