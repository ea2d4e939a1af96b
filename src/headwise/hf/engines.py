"""Converted models in vLLM and SGLang, through their backends for models of transformers.

An engine makes the model, puts its own layers in the place of linear maps, and computes attention
over its pages by a function that it registers under its name. That function knows of no heads that
are off; so it computes them all, and here each is multiplied by its gate.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from headwise.hf.attention import NAME, check_implementation, gates_of, is_of_engine
from headwise.hf.conversion import Conversion

ENGINES = ("vllm", "sglang")


def register_in_vllm() -> None:
    """Converted language models are known to vLLM: an entry point of its general plugins.

    vLLM calls it in each of its processes. Importing this module has let transformers know their
    configs, so that vLLM needs no `trust_remote_code`.
    """
    from vllm import ModelRegistry

    for architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        ModelRegistry.register_model(
            f"Routed{architecture}",
            "vllm.model_executor.models.transformers:TransformersForCausalLM",
        )


def attention_for(parts: Sequence[PreTrainedConfig], conversion: Conversion) -> str:
    """The attn_implementation of a model with routed heads that is being made: ours or an engine's.

    Args:
        parts: The model's config, and those in it.
        conversion: What is routed.

    Raises:
        ValueError: If another one is asked for, or an engine would compute something else.
    """
    asked = {part._attn_implementation for part in parts} - {None}
    engine = next((name for name in ENGINES if name in asked), None)
    if engine is not None:
        _check_engine_computes(engine, conversion)
        _let_it_gate(engine)
    for name in asked:
        check_implementation(name)
    return engine or NAME


def _check_engine_computes(engine: str, conversion: Conversion) -> None:
    if conversion.ternary != "no":
        raise ValueError(
            f"ternary is {conversion.ternary!r}; {engine} puts its own linear maps in the place of "
            "ternary ones, so it takes models without them only"
        )
    if conversion.attention is not None and conversion.attention.router == "output_gate":
        raise ValueError(
            f"router is 'output_gate'; {engine} computes the projections that it reads in another "
            "way; other routers run there"
        )


def _let_it_gate(engine: str) -> None:
    attend = ALL_ATTENTION_FUNCTIONS.get(engine)
    if attend is None:
        raise ValueError(
            f"attn_implementation is {engine!r}, which {engine} registers where it runs a model; "
            f"outside of it take {NAME!r}"
        )
    if not is_of_engine(engine):
        ALL_ATTENTION_FUNCTIONS[engine] = _gating(attend)


def _gating(attend: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function of an engine, whose heads are multiplied by the gates of the module.

    Tokens of all requests are one row, and the engine gives [T, H · C] back.
    """

    @functools.wraps(attend)
    def attend_and_gate(
        module: Any, query: Tensor, *args: Any, routing: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        heads, weights = attend(module, query, *args, **kwargs)
        gates = gates_of(module, query, routing, kwargs)
        if gates is None:
            return heads, weights
        gate = gates.unsqueeze(-1)
        by_head = heads.view(*gate.shape[:-1], -1)
        # Nothing is left of a head that is off, whatever its values are.
        gated = torch.where(gate == 0, 0, by_head * gate.to(heads.dtype))
        return gated.view_as(heads), weights

    attend_and_gate.gates_heads = True  # type: ignore[attr-defined]
    return attend_and_gate
