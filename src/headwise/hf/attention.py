"""MoH as a transformers attention function, registered under the name "headwise"."""

import dis
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headwise.hf.batching import attend_to_pages
from headwise.hf.documents import mask_of_documents
from headwise.hf.output_gates import decided_by_queries, gates_before, watch_queries
from headwise.hf.parallelism import HeadsHere, heads_here
from headwise.nn import HeadRouter, OutputGateRouter, QueryNormRouter
from headwise.nn.projections import with_gates
from headwise.ops import HeadRouting, head_attention

NAME = "headwise"


def install_router(attention: nn.Module, router: HeadRouter) -> None:
    """Give a transformers attention module a router; its class and parameter names stay."""
    attention.router = router
    attention.register_forward_pre_hook(_before_attention, with_kwargs=True)


def router_of(attention: Any) -> Any:
    """The router of an attention itself, where an adapter of PEFT may stand around it; or None."""
    router: Any = getattr(attention, "router", None)
    return router.get_base_layer() if hasattr(router, "get_base_layer") else router


def is_of_engine(name: Any) -> bool:
    """Whether an attention function is an engine's, which engines.py lets multiply by the gates."""
    return hasattr(ALL_ATTENTION_FUNCTIONS.get(name), "gates_heads")


def check_implementation(name: Any) -> None:
    """Raises ValueError unless the attention function heeds the gates, as ours and engines' do."""
    if name != NAME and not is_of_engine(name):
        raise ValueError(
            f"attn_implementation is {name!r}; a model with routed heads takes {NAME!r} only"
        )


def _before_attention(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Route by the attention's input; its forward hands the routing down to `attend`.

    The input takes the gates along, for a query projection that leaves out heads. A router by
    queries waits for `attend`, which has them, and so does one by gates that come with queries.
    The function is checked here because somebody may set that of a part of the model without the
    whole.
    """
    config: Any = attention.config
    router: Any = attention.router
    check_implementation(config._attn_implementation)
    if isinstance(router, QueryNormRouter):
        return None
    x = attention_input(args, kwargs)
    if isinstance(router, OutputGateRouter):
        gates = gates_before(attention, x)
        if gates is None:
            watch_queries(attention)
            return None
        routing = router(gates)
    else:
        routing = router(x)
    x = with_gates(x, routing.weights)
    args, given = ((x, *args[1:]), {}) if args else (args, {"hidden_states": x})
    return args, {**kwargs, **given, "routing": routing}


def attention_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What an attention module reads, of the arguments of its forward."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x


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
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Any = None,
    cache: Any = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls between the projections: q [B, H, T, C] → gated heads [B, T, H, C].

    The routing comes from the module's forward (routers that read its input, or gates), or from q
    and what is projected with it.
    Attention modules of the model that were not converted get transformers' own dense attention.

    Dropout on attention weights needs them all: in training with it, every head is computed and
    multiplied by its gate. With gradients, padding has all heads off. `cu_seq_lens_q` and `_k`,
    documents in a row, come from a collator that flattens a batch, or by `keep_documents_apart`;
    with a `cache` of pages, from continuous batching. Elsewhere the mask has the sliding window in
    it.
    """
    gates = gates_of(module, query, routing, kwargs)
    share_on = 1.0 if gates is None else router_of(module).budget.active_share
    if cache is not None:
        heads = attend_to_pages(
            module, query, key, value, gates, cache, cu_seq_lens_q, scale=scaling,
            share_on=share_on, window=sliding_window, cu_seq_lens_k=cu_seq_lens_k, **kwargs,
        )  # fmt: skip
        return heads, None
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    batch, _, tokens, _ = query.shape
    documents = cu_seq_lens_q if tokens > 1 else None
    if documents is not None:
        # They are all that there is: a static cache has empty keys behind them.
        key, value = key[:, :, :tokens], value[:, :, :tokens]
        attention_mask = None if attention_mask is None else attention_mask[..., :tokens]
        if batch > 1 or gates is None or dropout or torch.compiler.is_compiling():
            attention_mask = mask_of_documents(
                attention_mask, documents, batch, tokens, causal=is_causal
            )
            documents = None
    if gates is None or dropout:
        heads, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )  # fmt: skip
        return heads if gates is None else heads * gates.to(heads.dtype).unsqueeze(-1), None
    # [B, H, T, C] → [B, T, H, C]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if tokens == 1:
        # Decode. With 11 tokens in the cache, token 11 comes: q is [B, 1, H, C], k and v are
        # [B, 12, G, C] with its own. It may see every key. A static cache has 64 slots instead, and
        # the mask [B, 1, 1, 64] hides those from 12 on.
        causal = False
    elif is_causal and attention_mask is None:
        # Prompt. 7 tokens at once see themselves and those before: q, k and v are [B, 7, …], and
        # transformers leaves out the mask. A static cache gives all of its 64 slots as keys, of
        # which those from 7 on are empty.
        causal, k, v = True, k[:, :tokens], v[:, :tokens]
    else:
        # Chunk. 3 tokens after 7 in the cache: q is [B, 3, …], k and v are [B, 10, …], and by the
        # mask [B, 1, 3, 10] chunk token t sees keys 0 to 7 + t. A prompt with padding has a mask
        # [B, 1, 7, 7] likewise. Where there is none, as in encoders, every token sees all.
        causal = False
    boolean = attention_mask is not None and attention_mask.dtype == torch.bool
    heads = head_attention(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        _of_real_tokens(gates, attention_mask),
        causal=causal,
        mask=attention_mask if boolean else None,
        bias=None if boolean else attention_mask,
        cu_seqlens=documents,
        cu_seqlens_k=None if documents is None else cu_seq_lens_k,
        scale=scaling,
        share_on=share_on,
    )
    return heads, None


def gates_of(
    module: Any, query: Tensor, routing: HeadRouting | None, others: Mapping[str, Any]
) -> Tensor | None:
    """The gates [B, T, H] of the heads that are computed here; None where every gate is 1.

    Args:
        module: The attention.
        query: [B, H, T, C].
        routing: Of all heads, if the module's forward handed it down.
        others: What else the attention function was given.
    """
    router = router_of(module)
    if router is None:
        return None
    for name in ("softcap", "s_aux"):
        if others.get(name) is not None:
            raise ValueError(f"the model's attention has {name}; routed heads support none")
    here = heads_here(module, query.shape[1], router.budget.num_heads)
    if routing is None:
        routing = _by_queries(module, query, here)
    return None if router.is_dense else here.gates(routing.weights)


def _by_queries(module: Any, query: Tensor, here: HeadsHere) -> HeadRouting:
    """The routing where the attention's input did not decide it; q is [B, H, T, C]."""
    if isinstance(module.router, QueryNormRouter):
        routing: HeadRouting = module.router(here.lengths(query.transpose(1, 2)))
        return routing
    if isinstance(module.router, OutputGateRouter):
        return decided_by_queries(module)
    raise ValueError(f"{type(module).__name__} was given a routing and did not pass it on")


def _of_real_tokens(gate: Tensor, mask: Tensor | None) -> Tensor:
    """Gates [B, T, H], in training 0 for padding: a token that does not see itself.

    What padding gives is in no loss, and a batch padded on the right costs what its tokens cost.
    Generation starts from the last position, though, also where that is padding by mistake.
    """
    if mask is None or mask.dtype != torch.bool or not torch.is_grad_enabled():
        return gate
    tokens = gate.shape[1]
    if mask.shape[1:] != (1, tokens, tokens):
        return gate
    return gate * mask[:, 0].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)


def forwards_down_to_interface(module: nn.Module) -> list[Any]:
    """The forwards of a module's classes, down to the one that calls transformers' interface.

    A forward that only adds to that of the class above calls it by `super`. Empty where none of
    them calls the interface.
    """
    found = []
    for kind in type(module).__mro__:
        forward: Any = inspect.unwrap(vars(kind).get("forward"))  # type: ignore[arg-type]
        if forward is None or not hasattr(forward, "__code__"):
            continue
        found.append(forward)
        if "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names:
            return found
        if "super" not in forward.__code__.co_names:
            break
    return []


def check_passes_routing(model: nn.Module, name: str) -> None:
    """Refuse an attention module that does not hand its **kwargs to the attention function.

    The routing of a learned router goes with them, from `_before_attention` to `attend`. A forward
    that takes none, or never reads them, loses it.
    """
    attention = model.get_submodule(name)
    if not all(map(_reads_its_kwargs, forwards_down_to_interface(attention))):
        raise ValueError(
            f"{type(model).__name__} cannot be converted: the forward of {name}, a "
            f"{type(attention).__name__}, does not pass its **kwargs to the attention function, so "
            "the routing would not arrive; let it pass them, or take router 'query_norm'"
        )


def _reads_its_kwargs(forward: Any) -> bool:
    kinds = inspect.signature(forward).parameters.items()
    names = [name for name, parameter in kinds if parameter.kind is parameter.VAR_KEYWORD]
    # Newer Pythons load two names by one instruction, of which argval is then a tuple.
    loads = (step.argval for step in dis.get_instructions(forward) if "LOAD" in step.opname)
    return any(name == x or (type(x) is tuple and name in x) for x in loads for name in names)


def refuse_attentions(model: nn.Module) -> None:
    """Let the model, and each model in it, refuse to give attention weights."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.register_forward_pre_hook(_check_outputs, with_kwargs=True)


def _check_outputs(model: Any, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions", model.config.output_attentions):
        raise ValueError("output_attentions is True; routed heads do not keep attention weights")


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
