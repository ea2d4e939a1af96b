"""Putting routers and experts into a transformers model: which modules change, and how."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.hf import attention as headwise_attention
from headwise.hf.conversion import Conversion
from headwise.hf.documents import keep_documents_apart
from headwise.hf.expert_configs import FittedExperts
from headwise.hf.experts_interface import go_through_interface
from headwise.hf.head_configs import FittedHeads, MoHConfig
from headwise.hf.output_gates import check_has_gates
from headwise.hf.parallelism import plan_experts
from headwise.hf.projections import skip_heads
from headwise.hf.training_loss import watch_training
from headwise.hf.upcycling import start_from_mlp
from headwise.nn import HeadRouter, MoE
from headwise.nn.ternarize import become, pack_inside, ternary_kinds


def install(
    model: PreTrainedModel,
    conversion: Conversion,
    *,
    heads: FittedHeads | None = None,
    experts: FittedExperts | None = None,
    keep_mlps: bool = False,
) -> None:
    """Put routers and experts where the conversion says. All are built before one is placed.

    Then what is in the layers becomes ternary, or packed, where the conversion says so.

    Routers of heads, and experts, start as they were fitted, if they were.

    Other experts start with the deviation of the MLPs that they replace
    (`config.initializer_range`), or with `keep_mlps` as slices of these where the conversion says
    so. When weights are loaded
    afterwards, there is nothing to keep.
    """
    attentions = attention_modules(model)
    of_attention, of_mlp = conversion.layers_of(len(attentions))
    routers = {}
    if conversion.attention is not None:
        routers = build_routers(model, conversion.attention, of_attention)
        if heads is not None:
            heads.fill(dict(zip(of_attention, routers.values(), strict=True)))
    if experts is not None:
        experts.check_fits(of_mlp)
    mixtures = {}
    for layer, name in enumerate(attentions):
        if conversion.mlp is not None and layer in of_mlp:
            config = _config_of(model, name)
            mlp = conversion.mlp.build(config.hidden_size)
            mlp.reset_experts(std=config.initializer_range)
            place = mlp_beside(model, name)
            mixtures[place] = placed(RoutedMLP(mlp), attentions[name])
            if keep_mlps and conversion.mlp.experts_from == "mlp":
                start_from_mlp(mlp, model.get_submodule(place), layer, experts)
    ternary = conversion.ternary != "no"
    kinds = ternary_kinds(modules_of_layers(model, without=mixtures)) if ternary else {}
    for name, router in routers.items():
        headwise_attention.install_router(attentions[name], router)
        if not ternary:
            skip_heads(attentions[name], router)
    for name, routed_mlp in mixtures.items():
        model.set_submodule(name, routed_mlp)
        if ternary:
            kinds |= ternary_kinds(routed_mlp.named_modules())
        else:
            go_through_interface(routed_mlp.layer.experts, model.config)
    if not ternary:
        plan_experts(model, mixtures)
    if routers:
        headwise_attention.refuse_attentions(model)
        if not headwise_attention.is_of_engine(model.config._attn_implementation):
            model.set_attn_implementation(headwise_attention.NAME)
            keep_documents_apart(model, attentions.values())
    if conversion.balances_load:
        watch_training(model)
    become(kinds)
    if conversion.ternary == "packed":
        pack_layers(model)


def build_routers(
    model: PreTrainedModel, attention: MoHConfig, layers: Collection[int]
) -> dict[str, HeadRouter]:
    """A router for the attention of each of the layers, by its name; the model is left alone."""
    routers = {}
    for layer, (name, module) in enumerate(attention_modules(model).items()):
        if layer not in layers:
            continue
        if attention.router != "query_norm":
            headwise_attention.check_passes_routing(model, name)
        if attention.router == "output_gate":
            check_has_gates(model, name)
        config = _config_of(model, name)
        function = config._attn_implementation
        known = (None, "eager", "sdpa", headwise_attention.NAME)
        if not (function in known or headwise_attention.is_of_engine(function)):
            raise ValueError(
                f"{type(model).__name__} cannot be converted: it was loaded with "
                f"attn_implementation = {function!r}, and routed heads take "
                f"{headwise_attention.NAME!r} only; load it without"
            )
        if getattr(config, "attn_logit_softcapping", None) or hasattr(module, "sinks"):
            raise ValueError(
                f"{type(model).__name__} cannot be converted: its attention has soft caps or "
                "sinks, which transformers' SDPA does not compute either"
            )
        router = attention.build_router(
            layer,
            dim=config.hidden_size,
            # Layers may differ.
            num_heads=getattr(module, "num_heads", config.num_attention_heads),
            num_kv_heads=getattr(config, "num_key_value_heads", None),
        )
        routers[name] = placed(router, module)
    return routers


def placed(new: Any, neighbour: nn.Module) -> Any:
    """The new module, on the device, in the dtype and in the mode of its neighbour."""
    reference = next(neighbour.parameters())
    offloaded = reference.is_meta and any(hasattr(m, "_hf_hook") for m in neighbour.modules())
    if offloaded and list(new.parameters()):
        raise ValueError(
            "the model's weights are offloaded, where new ones cannot go; convert it without "
            "device_map, save it, and load that with device_map"
        )
    return new.to(reference.device, reference.dtype).train(neighbour.training)


def _config_of(model: PreTrainedModel, attention: str) -> Any:
    """What the attention was made from: a part of the model's config where that has parts."""
    return getattr(model.get_submodule(attention), "config", model.config)


def attention_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that call transformers' AttentionInterface, by name, first layer first."""
    modules = model.named_modules()
    found = {name: m for name, m in modules if headwise_attention.forwards_down_to_interface(m)}
    kind = type(model).__name__
    if not found:
        raise ValueError(
            f"{kind} cannot be converted: its attention does not go through transformers' "
            "AttentionInterface, so heads cannot be routed in it"
        )
    cross = (getattr(model.config, name, False) for name in _CROSSING)
    if any(cross):
        raise ValueError(
            f"{kind} cannot be converted: it has cross attention (config: "
            f"{' or '.join(_CROSSING)}), and only self-attention is routed"
        )
    return found


def layers(model: PreTrainedModel) -> list[str]:
    """The names of the layers: what holds an attention module, and stands in a list of its like."""
    found = []
    for attention in attention_modules(model):
        parts = attention.split(".")
        above = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        listed = (isinstance(model.get_submodule(name), nn.ModuleList) for name in above)
        layer = next((n for n, in_list in zip(above[1:], listed, strict=False) if in_list), None)
        if layer is None:
            raise ValueError(
                f"{type(model).__name__} cannot be made ternary: {attention} is in no nn.ModuleList"
            )
        found.append(layer)
    return list(dict.fromkeys(found))


def modules_of_layers(
    model: PreTrainedModel, *, without: Collection[str] = ()
) -> list[tuple[str, nn.Module]]:
    """All modules inside the layers by their names, less those inside the named ones."""
    inside = tuple(f"{name}." for name in layers(model))
    left_out = tuple(f"{name}." for name in without)
    return [
        (name, module)
        for name, module in model.named_modules()
        if f"{name}.".startswith(inside) and not f"{name}.".startswith(left_out)
    ]


def pack_layers(model: PreTrainedModel) -> None:
    """Pack what is ternary in the layers; raises ValueError if in one nothing is."""
    for name in layers(model):
        pack_inside(model.get_submodule(name))


_CROSSING = ("is_encoder_decoder", "add_cross_attention")


def mlp_beside(model: PreTrainedModel, attention: str) -> str:
    """The name of the MLP in the layer of an attention."""
    layer = attention.rpartition(".")[0]
    if not isinstance(getattr(model.get_submodule(layer), "mlp", None), nn.Module):
        raise ValueError(
            f"{type(model).__name__} cannot be given experts: its layers have no module `mlp` "
            "beside the attention, as Llama's have"
        )
    return f"{layer}.mlp"


class RoutedMLP(nn.Module):
    """A mixture in the place of a transformers MLP: it returns y alone."""

    def __init__(self, experts: MoE):
        super().__init__()
        self.layer = experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        y, _ = self.layer(hidden_states)
        return y
