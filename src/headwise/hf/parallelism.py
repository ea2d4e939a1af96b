"""Tensor parallelism, under which a process has some of the heads: refused by name."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

_INSTEAD = "a router needs all heads of a layer; shard it with FSDP instead"


def refuse_tensor_parallel_loading(options: Mapping[str, Any]) -> None:
    """Raises ValueError if options of `from_pretrained` ask for tensor parallelism."""
    config = options.get("distributed_config")
    given = {name: options.get(name) for name in ("tp_plan", "tp_size", "device_mesh")}
    given |= {f"distributed_config.{name}": getattr(config, name, None) for name in _FIELDS}
    for name, value in given.items():
        # A size of 1 and an empty plan split nothing.
        if value is not None and value != 1 and value != {}:
            raise ValueError(
                f"{name} is {value!r}; a converted model cannot be tensor-parallel: {_INSTEAD}"
            )


_FIELDS = ("tp_plan", "tp_size")


def refuse_tensor_parallel(model: nn.Module) -> None:
    """Raises ValueError if the weights of a model are split over processes, but by FSDP."""
    split = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    if (getattr(model, "_tp_size", None) or 1) > 1 or (split and not by_fsdp):
        raise ValueError(
            f"{type(model).__name__} is tensor-parallel and cannot be converted: {_INSTEAD}"
        )


def check_num_heads(found: int, num_heads: int) -> None:
    """Raises ValueError if an attention with routed heads computes only some of them."""
    if found != num_heads:
        raise ValueError(
            f"the attention has {found} heads here, and its router routes {num_heads}; a converted "
            f"model cannot be tensor-parallel: {_INSTEAD}"
        )
