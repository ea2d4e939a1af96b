"""MoH in diffusers' models: an attention processor, and the classes of converted models."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import diffusers
from diffusers import ModelMixin
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.modeling_utils import LegacyModelMixin
from einops import rearrange
from torch import Tensor, nn

from headwise.hf.attention import attend
from headwise.hf.conversion import Conversion, Converted
from headwise.hf.head_configs import FittedHeads, MoHConfig
from headwise.hf.surgery import placed
from headwise.nn import HeadRouter, QueryNormRouter
from headwise.ops import Routing
from headwise.ops.balance import mean_balance_loss

_PREFIX = "Routed"


class RoutedAttnProcessor:
    """What diffusers' AttnProcessor2_0 computes, of the heads that the router switches on."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            raise ValueError(
                "encoder_hidden_states is given; routed heads attend to their own sequence only, "
                "so it must be None"
            )
        x, heads = hidden_states, attn.heads
        q, k, v = (
            rearrange(project(x), "b t (h c) -> b h t c", h=heads)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, x.shape[1], len(x))
            attention_mask = rearrange(attention_mask, "(b h) t s -> b h t s", h=heads)
        routing = None if isinstance(attn.router, QueryNormRouter) else attn.router(x)
        y, _ = attend(
            attn, q, k, v, attention_mask, scaling=attn.scale, is_causal=False, routing=routing
        )
        project, dropout = attn.to_out
        return dropout(project(rearrange(y, "b t h c -> b t (h c)")))


class Routed(Converted, ModelMixin):
    """Mixed into the class of a converted model of diffusers."""

    @classmethod
    def from_config(cls, config: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """diffusers' own, and the routers that the config tells of."""
        fields = dict(config)
        conversion = Conversion.from_dict(fields.pop("headwise", {}))
        model, unused = super().from_config(fields, return_unused_kwargs=True, **kwargs)
        _install(model, conversion)
        return (model, unused) if return_unused_kwargs else model

    def routing_loss(self, routings: Mapping[str, Routing]) -> Tensor:
        """The mean balance loss of the layers that route, times balance_coefficient.

        Args:
            routings: What `headwise.record_routing` saw in a forward. Where none of them routes,
                the loss is 0.
        """
        attention: Any = self.conversion.attention
        return attention.balance_coefficient * mean_balance_loss(routings.values())


def convert_model(model: Any, conversion: Conversion, fitted: FittedHeads | None) -> Any:
    """`headwise.convert` for a model of diffusers, whose self-attention gets routers.

    Cross attention stays as it is.
    """
    kind = type(model).__name__
    if not isinstance(model, ModelMixin):
        raise ValueError(f"model_or_path is a {kind}; give a model of it, such as its transformer")
    if conversion.attention is None or conversion.mlp is not None or conversion.ternary != "no":
        raise ValueError(
            f"{kind} is a model of diffusers, of which attention alone can be converted; mlp must "
            "be None and ternary False"
        )
    original: Any = type(model)
    routed = routed_class(original)
    _install(model, conversion, fitted)
    model.__class__ = routed
    return model


@functools.cache
def routed_class(original: Any) -> Any:
    """The class of a converted model, a subclass of diffusers' own: Routed and its name."""
    name = original.__name__
    if getattr(diffusers, name, None) != original:
        raise ValueError(
            f"{name} cannot be converted: diffusers has no class of this name, so it could not be "
            "loaded again"
        )
    if issubclass(original, LegacyModelMixin):
        raise ValueError(
            f"{name} cannot be converted: diffusers loads it as other classes, by its config; "
            "load the model with the class that suits it, such as DiTTransformer2DModel"
        )
    # `headwise.hf` finds it by name, for saved pipelines and for pickle.
    return type(_PREFIX + name, (Routed, original), {"__module__": "headwise.hf"})


def class_of(name: str) -> Any:
    """The class that goes by that name in `headwise.hf`; None if there is none."""
    if name == "ModelMixin":
        return ModelMixin
    original = getattr(diffusers, name.removeprefix(_PREFIX), None)
    is_model = isinstance(original, type) and issubclass(original, ModelMixin)
    return routed_class(original) if is_model and name.startswith(_PREFIX) else None


def build_routers(
    attentions: Sequence[Any], attention: MoHConfig, layers: Iterable[int]
) -> dict[int, HeadRouter]:
    """A router for each of these layers, by its number; the model is left alone."""
    routers = {}
    for layer in layers:
        attn = attentions[layer]
        router = attention.build_router(layer, dim=attn.query_dim, num_heads=attn.heads)
        routers[layer] = placed(router, attn)
    return routers


def _install(model: Any, conversion: Conversion, fitted: FittedHeads | None = None) -> None:
    """Put routers beside the projections and our processor in the place of diffusers'.

    The config then tells of them. All routers are built before one is placed.
    """
    attentions = self_attentions(model)
    layers, _ = conversion.layers_of(len(attentions))
    asked: Any = conversion.attention
    attention: MoHConfig = asked.resolve(len(attentions))
    routers = build_routers(attentions, attention, layers)
    if fitted is not None:
        fitted.fill(routers)
    for layer, router in routers.items():
        attentions[layer].router = router
        attentions[layer].set_processor(RoutedAttnProcessor())
        attentions[layer].register_forward_pre_hook(_check_processor)
    conversion = Conversion(attention=attention, layers=conversion.layers)
    model.register_to_config(headwise=conversion.to_dict())


def self_attentions(model: nn.Module) -> list[Any]:
    """The modules in which heads can be routed, in the model's order; none of cross attention."""
    kind, found = type(model).__name__, []
    for name, module in model.named_modules():
        if not hasattr(module, "get_processor") or getattr(module, "is_cross_attention", False):
            continue
        if not _is_plain(module):
            raise ValueError(
                f"{kind} cannot be converted: {name} is a {type(module).__name__} with "
                f"{type(module.get_processor()).__name__}, and heads are routed in plain "
                "self-attention only, which diffusers' AttnProcessor2_0 computes"
            )
        found.append(module)
    if not found:
        raise ValueError(f"{kind} cannot be converted: it has no self-attention of diffusers'")
    return found


def _is_plain(attn: Any) -> bool:
    """Whether it is softmax(q k) v between linear maps, and nothing beside it."""
    return (
        isinstance(attn, Attention)
        and type(attn.processor) in (AttnProcessor, AttnProcessor2_0)
        and not (attn.fused_projections or attn.residual_connection)
        and attn.inner_kv_dim == attn.inner_dim
        and attn.rescale_output_factor == 1
        and all(getattr(attn, part) is None for part in _BESIDE)
    )


_BESIDE = ("group_norm", "spatial_norm", "norm_q", "norm_k", "added_kv_proj_dim")


def _check_processor(attn: Any, _: tuple[Any, ...]) -> None:
    """Before the attention's forward: another processor would compute every head."""
    if not isinstance(attn.processor, RoutedAttnProcessor):
        raise ValueError(
            f"the attention's processor is a {type(attn.processor).__name__}; a model with routed "
            "heads takes RoutedAttnProcessor only"
        )
