"""FLOPs of what really runs: torch's counter, with formulas for what it does not know."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def measure_flops(run: Callable[[], Any]) -> int:
    """FLOPs that torch's counter sees while `run()` runs, a backward in it included.

    Beyond what torch counts by itself: causal attention as the pairs that are seen, of which
    torch's counter takes all on GPUs and none on CPUs; grouped matrix products by the rows that
    they have; and all implementations of our ops but "reference", by the heads that are on and the
    choices that go somewhere.
    """
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        run()
    return counter.get_total_flops()


def _attention(op: Any, *, of_keys: int, of_values: int) -> Callable[..., int]:
    """FLOPs of one of torch's attentions from the shapes that it is given.

    For each pair of a query and a key that it sees, so many products as wide as a key and so many
    as wide as a value.
    """
    names = [argument.name for argument in op.default._schema.arguments]

    def flops(*args: Any, **options: Any) -> int:
        given = dict(zip(names, args, strict=False)) | options
        batch, heads, queries, channels = given["query"]
        keys, value_channels = given["key"][2], given["value"][3]
        pairs = queries * keys
        if given.get("is_causal", False):
            # Query t sees keys up to t, also where there are more or fewer keys than queries.
            hidden = max(queries - keys, 0)
            pairs = queries * (queries + 1) // 2 - hidden * (hidden + 1) // 2
        return 2 * batch * heads * pairs * (of_keys * channels + of_values * value_channels)

    return flops


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> int:
    """FLOPs of `grouped_mm`: groups end at `offs`, and what lies beyond the last is not computed.

    Rows [N, K] by matrices [E, K, M] are the forward; [M, N] by [N, K] is a gradient of matrices.
    """
    if offs is None:
        return 2 * a.numel() * b.shape[-1]
    matrix = b[0].numel() if b.ndim == 3 else a[0].numel() if a.ndim == 3 else 0
    return 2 * int(offs[-1]) * (matrix or a.shape[0] * b.shape[1])


# Tells torch's counter that it reads tensors, not shapes alone.
_grouped_product._get_raw = True  # type: ignore[attr-defined]

_aten = torch.ops.aten
_FORWARD = (
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
)
_BACKWARD = (
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward,
)
_FORMULAS = {
    **{op: _attention(op, of_keys=1, of_values=1) for op in _FORWARD},
    # The scores are computed again.
    **{op: _attention(op, of_keys=3, of_values=2) for op in _BACKWARD},
    _aten._grouped_mm: _grouped_product,
}
