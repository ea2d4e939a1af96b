"""Buffers that stay as precise as they are, whatever the module is cast to."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class KeepsBuffers(nn.Module):
    """A module of which `.to(dtype)`, `.half()` and the like leave the dtype of its own buffers.

    In bfloat16 the steps of a balancing bias would round away, counts above 256 would be wrong, and
    the scale of a packed matrix would be off.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self
