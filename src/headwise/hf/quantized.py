"""How much of a model is quantised, and what a quantiser left out."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from headwise.ops.fields import check


@dataclass(frozen=True, kw_only=True)
class QuantizedBytes:
    """What `quantized_bytes` counted; as text a line for people.

    Attributes:
        quantized: Bytes of what is quantised, scales included.
        total: Bytes of all parameters and buffers.
        left_out: Bytes of the matrices in full precision, by name, largest first; layers of one
            kind are one entry, with * for their numbers.
    """

    quantized: int
    total: int
    left_out: dict[str, int]

    def __str__(self) -> str:
        left_out = ", ".join(f"{name} {size:,}" for name, size in self.left_out.items())
        return (
            f"{self.quantized:,} of {self.total:,} bytes are quantised; in full precision: "
            f"{left_out or 'no matrix'}"
        )


def quantized_bytes(model: nn.Module) -> QuantizedBytes:
    """Count what a quantiser did to a model: torchao, optimum-quanto, bitsandbytes, torch.ao, ours.

    Many quantise the weights of nn.Linear and pass over experts, whose matrices are stacked in
    parameters of their own, without a word.

    Args:
        model: Any module.

    Returns:
        Bytes, and the matrices that are not quantised. Quantised is a tensor of a type of its own,
        or of numbers of a byte with two dimensions or more, as packed weights are.

    Raises:
        ValueError: If the model is no module.
    """
    check("model", model, nn.Module)
    quantized = total = 0
    left_out: dict[str, int] = {}
    for name, tensor in _tensors(model):
        size = _nbytes(tensor)
        total += size
        if _is_quantized(tensor):
            quantized += size
        elif isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
            kind = re.sub(r"\.\d+\.", ".*.", name)
            left_out[kind] = left_out.get(kind, 0) + size
    largest_first = dict(sorted(left_out.items(), key=lambda entry: -entry[1]))
    return QuantizedBytes(quantized=quantized, total=total, left_out=largest_first)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, and the weights that torch.ao keeps behind a method."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if callable(weight) and not isinstance(weight, Tensor):
            yield f"{name}.weight", weight()


def _is_quantized(tensor: Tensor) -> bool:
    of_a_byte = tensor.ndim > 1 and tensor.itemsize == 1 and tensor.dtype != torch.bool
    return tensor.is_quantized or is_traceable_wrapper_subclass(tensor) or of_a_byte


def _nbytes(tensor: Any) -> int:
    """Of what is in memory: a quantised tensor itself claims the shape and dtype that it had."""
    if is_traceable_wrapper_subclass(tensor):
        parts, _ = tensor.__tensor_flatten__()
        return sum(_nbytes(getattr(tensor, part)) for part in parts)
    size: int = tensor.numel() * tensor.element_size()
    return size
