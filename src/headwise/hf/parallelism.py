"""Heads and experts that are split over processes: tensor and expert parallelism of transformers.

Routing is over all heads. Every process has whole routers and decides for all heads; of the gates
it then takes those of the heads that it computes.
"""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from headwise.ops.dtypes import widened

# Where transformers resolves plans and applies them to tensors that know how they are split.
_HAS_PLANS = importlib.util.find_spec("transformers.distributed.mixin") is not None


@dataclass(frozen=True)
class HeadsHere:
    """Which heads of an attention this process computes: all, or a share that stands together.

    Attributes:
        mesh: The processes that share the heads; None where each computes all.
    """

    mesh: DeviceMesh | None

    def gates(self, of_all: Tensor) -> Tensor:
        """Of gates [B, T, H] of all heads, those of the heads here.

        Each process knows the gradient of its own; all together give it to a router.
        """
        return self._moved(of_all, Replicate(), Shard(2))

    def gathered(self, here: Tensor) -> Tensor:
        """What is known of the heads here, [B, T, heads, …], of all heads."""
        return self._moved(here, Shard(2), Replicate())

    def lengths(self, q: Tensor) -> Tensor:
        """Queries of all heads, of q [B, T, heads, C] of those here, as far as lengths tell.

        Where heads are elsewhere it is the lengths [B, T, H, 1] that travel: a router by lengths
        finds in them what it finds in the queries.
        """
        if self.mesh is None:
            return q
        return self.gathered(torch.linalg.vector_norm(widened(q), dim=-1, keepdim=True))

    def _moved(self, x: Tensor, placed: Any, wanted: Any) -> Tensor:
        if self.mesh is None:
            return x
        whole = DTensor.from_local(x, self.mesh, [placed], run_check=False)
        return whole.redistribute(placements=[wanted]).to_local()


def heads_here(attention: nn.Module, found: int, num_heads: int) -> HeadsHere:
    """Which heads an attention computes here, where `found` are of the `num_heads` that it routes.

    Raises:
        ValueError: If they are no equal share of them.
    """
    if found == num_heads:
        return HeadsHere(None)
    split = (p for p in attention.parameters() if isinstance(p, DTensor))
    mesh = next((p.device_mesh for p in split), None)
    if mesh is None or mesh.ndim > 1 or found * mesh.size() != num_heads:
        among = "" if mesh is None else f" in one of {mesh.size()} processes"
        raise ValueError(
            f"the attention has {found} heads here{among}, and its router routes {num_heads}; "
            "heads must be split evenly, by DTensors as transformers and torch make them"
        )
    return HeadsHere(mesh)


def check_split(model: Any, config: Any) -> None:
    """Raises ValueError if a converted model cannot be split as a DistributedConfig says.

    Called when transformers has merged its plans, before it reads weights.
    """
    size, conversion = config.tp_size, model.conversion
    if size == 1 or not model.tp_plan:
        return
    if conversion.ternary != "no":
        raise ValueError(
            f"tp_size is {size}; a ternary model cannot be tensor-parallel, because the scale of a "
            "matrix is that of all its weights; shard it with FSDP instead "
            "(DistributedConfig(fsdp_size=…), or `accelerate launch`)"
        )
    by_heads = {name for name, style in model.tp_plan.items() if style == "colwise"}
    for name, attention in model.named_modules():
        budget = getattr(getattr(attention, "router", None), "budget", None)
        children = {generic_name(f"{name}.{child}") for child, _ in attention.named_children()}
        if budget is None or not children & by_heads:
            continue
        kv_heads = getattr(attention.config, "num_key_value_heads", None) or budget.num_heads
        for what, count in (("query", budget.num_heads), ("key and value", kv_heads)):
            if count % size:
                raise ValueError(
                    f"tp_size is {size}; it must divide the {count} {what} heads of {name} "
                    f"({budget.num_heads} query heads, {kv_heads} key and value heads)"
                )


def plan_experts(model: Any, mixtures: Mapping[str, Any]) -> None:
    """Change a model's plans of tensor and expert parallelism: experts stand for some of its MLPs.

    Args:
        model: Of transformers.
        mixtures: What stands there now, by the names of the MLPs.
    """
    if not _HAS_PLANS:
        return
    known = {generic_name(name) for name, _ in model.named_modules()}
    replaced = tuple({f"{generic_name(name)}." for name in mixtures})
    plan = model._tp_plan.items()
    model._tp_plan = {k: x for k, x in plan if k in known or not k.startswith(replaced)}
    for name, mlp in mixtures.items():
        place, experts = generic_name(f"{name}.layer.experts"), mlp.layer.experts
        first, down = f"{place}.{experts.first_name}", f"{place}.down_proj"
        model._tp_plan |= {
            first: "packed_colwise" if experts.has_gate else "colwise",
            down: "rowwise",
            place: "moe_tp_experts",
        }
        model._ep_plan |= {first: _WHOLE, down: _WHOLE, place: "ep_dispatch_experts"}


# transformers' style for the matrices of experts, of which each process has some, whole.
_WHOLE = "grouped_gemm"


def generic_name(name: str) -> str:
    """A name with * for the numbers of layers, as plans have it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def refuse_split_loading(options: Mapping[str, Any]) -> None:
    """Raises ValueError if options of `from_pretrained` split a model, and transformers is too old.

    It split weights in another way then.
    """
    config = options.get("distributed_config")
    given = {name: options.get(name) for name in ("tp_plan", "tp_size", "device_mesh")}
    given |= {f"distributed_config.{name}": getattr(config, name, None) for name in _FIELDS}
    for name, value in given.items():
        # A size of 1 and an empty plan split nothing.
        if not _HAS_PLANS and value is not None and value != 1 and value != {}:
            raise ValueError(
                f"{name} is {value!r}; transformers is {transformers.__version__}, which cannot "
                "split a converted model; 5.23 can: `pip install -U transformers`"
            )


_FIELDS = ("tp_plan", "tp_size")


def refuse_split_model(model: Any, done: str) -> None:
    """Raises ValueError if the weights of a model are split over processes, but by FSDP.

    Args:
        model: Of transformers or diffusers.
        done: What was to be done with it, such as "converted".
    """
    split = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    if (getattr(model, "_tp_size", None) or 1) > 1 or (split and not by_fsdp):
        raise ValueError(
            f"{type(model).__name__} is tensor-parallel and cannot be {done}: do that in one "
            "process, save the model, and load it tensor-parallel then"
        )
