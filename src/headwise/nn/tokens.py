"""What every layer asks of its input, before torch would fail on it with less to say."""

from typing import Any

from torch import Tensor

from headwise.ops.dtypes import autocasts
from headwise.ops.tensors import check_tensor


def check_tokens(x: Any, mask: Any, *, dim: int, weight: Tensor) -> None:
    """Refuse x unless it is [B, T, dim] on the weights' device, and a mask that is no bool [B, T].

    x must have the weights' dtype; under autocast any float will do.
    """
    check_rows("x", x, ("B", "T", dim), mask, weight=weight)
    check_dtype("x", x, weight)


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """Refuse tokens of another dtype than the weights', unless autocast brings them together."""
    # Packed weights are whole numbers, and take any float.
    if x.dtype != weight.dtype and weight.is_floating_point() and not autocasts(x):
        raise ValueError(
            f"{name} is {x.dtype}, the layer's weights are {weight.dtype}; they must agree"
        )


def check_rows(
    name: str, x: Any, sizes: tuple[int | str, ...], mask: Any, *, weight: Tensor | None = None
) -> None:
    """Refuse what a router cannot take: floating rows of a width, and a mask of these rows.

    Args:
        name: Of the argument that has the rows.
        x: Of these sizes.
        sizes: As `check_tensor` has them.
        mask: True for tokens, [*sizes but the width], or None. Of x [B, T, H, C] it is [B, T].
        weight: On whose device x must be.
    """
    check_tensor(name, x, sizes, like=weight)
    if mask is not None:
        rows = x.shape[:2] if len(sizes) == 4 else x.shape[:-1]
        check_tensor("mask", mask, rows, kind="torch.bool", like=x)
