"""MoH as a transformers attention function, registered under the name "headwise"."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headwise.hf.parallelism import check_num_heads
from headwise.nn import HeadRouter, QueryNormRouter
from headwise.ops import head_attention

NAME = "headwise"


def install_router(attention: nn.Module, router: HeadRouter) -> None:
    """Give a transformers attention module a router; its class and parameter names stay."""
    attention.router = router
    attention.register_forward_pre_hook(_check_function)
    if not isinstance(router, QueryNormRouter):
        attention.register_forward_pre_hook(_route_by_input, with_kwargs=True)


def check_implementation(name: Any) -> None:
    """Raises ValueError unless it is our attention function, for another would ignore routers."""
    if name != NAME:
        raise ValueError(
            f"attn_implementation is {name!r}; a model with routed heads takes {NAME!r} only"
        )


def _check_function(attention: nn.Module, _: tuple[Any, ...]) -> None:
    """Before the attention's forward: a part of a model sets its function without the whole."""
    config: Any = attention.config
    check_implementation(config._attn_implementation)


def _route_by_input(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the attention's forward: route by its input, and hand the routing down to `attend`."""
    router: Any = attention.router
    x = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, "routing": router(x)}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    routing: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls between the projections: q [B, H, T, C] → gated heads [B, T, H, C].

    The routing comes from the module's forward (learned routers) or from q (query-norm router).
    Attention modules of the model that were not converted get transformers' own dense attention.

    Dropout on attention weights needs them all: in training with it, every head is computed and
    multiplied by its gate.

    Raises:
        ValueError: For what SDPA does not compute: soft caps and sinks.
    """
    router: Any = getattr(module, "router", None)
    if router is not None:
        _check(kwargs)
        check_num_heads(query.shape[1], router.budget.num_heads)
    if router is not None and routing is None:
        routing = router(rearrange(query, "b h t c -> b t h c"))
    all_on = router is None or _always_all_on(router)
    if all_on or dropout:
        heads, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )  # fmt: skip
        return heads if all_on else heads * routing.weights.to(heads.dtype).unsqueeze(-1), None
    q, k, v = (rearrange(x, "b h t c -> b t h c") for x in (query, key, value))
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = is_causal and q.shape[1] > 1 and attention_mask is None
    if causal:
        # The first fill of a static cache: keys past the queries are empty slots.
        k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
    boolean = attention_mask is not None and attention_mask.dtype == torch.bool
    heads = head_attention(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        routing.weights,
        causal=causal,
        mask=attention_mask if boolean else None,
        bias=None if boolean else attention_mask,
        scale=scaling,
        share_on=router.budget.active_share,
    )
    return heads, None


def refuse_attentions(model: nn.Module) -> None:
    """Let the model, and each model in it, refuse to give attention weights."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.register_forward_pre_hook(_check_outputs, with_kwargs=True)


def _check_outputs(model: Any, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions", model.config.output_attentions):
        raise ValueError("output_attentions is True; routed heads do not keep attention weights")


def _check(kwargs: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"the model's attention has {name}; routed heads support none")


def _always_all_on(router: nn.Module) -> bool:
    return isinstance(router, QueryNormRouter) and router.budget.active_share == 1


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
