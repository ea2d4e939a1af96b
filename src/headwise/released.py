"""Reading weights under the names of the released code. Nowhere else do those names occur."""

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from headwise.hf import MoHConfig, convert
from headwise.hf.auto import load_strictly
from headwise.nn import MHMoE, MoHAttention

Source = Mapping[str, Tensor] | str | os.PathLike[str]


def load_released(kind: str, source: Source, config: Mapping[str, Any] | None = None) -> nn.Module:
    """A layer or a model with released weights, in eval mode.

    Args:
        kind: "moh_attention" (the attention of MoH-DiT), "mh_moe" or "moh_llama".
        source: Tensors by name, or the path of a safetensors file; for "moh_llama" also that of a
            directory as transformers saves it, such as a copy of the released MoH-LLaMA3-8B.
        config: For "moh_attention": dim, num_heads, shared_heads, active_heads, head_dim. For
            "mh_moe": dim, num_heads, num_experts, top_k, expert_dim, normalize_top_k,
            shared_expert_dim. For "moh_llama": what LlamaConfig takes; None for a directory.

    Returns:
        MoHAttention (mode "released"), MHMoE, or a LlamaForCausalLM with the first half of its
        heads shared, where a token chooses half of the others by the norms of its queries. In the
        dtype of the tensors.

    Raises:
        ValueError: If the kind is unknown, the config lacks or does not know a field, or a tensor
            is missing, left over or misshapen.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {list(_KINDS)}")
    if kind == "moh_llama" and not isinstance(source, Mapping) and Path(source).is_dir():
        if config is not None:
            raise ValueError(f"config is {config!r}; it must be None, {source} has its own")
        return _route_llama(_llama_of_directory(source))
    if not isinstance(config, Mapping):
        raise ValueError(f"config is {config!r}; {kind!r} needs a dict of its sizes (num_heads, …)")
    build, rename = _KINDS[kind]
    try:
        module = build(**config)
    except TypeError as error:
        raise ValueError(f"config does not fit {kind}: {error}") from None
    tensors = dict(source) if isinstance(source, Mapping) else load_file(source)
    try:
        renamed = rename(tensors)
    except KeyError as error:
        raise ValueError(f"{kind}: tensor {error} is missing") from None
    try:
        module.load_state_dict(renamed)
    except RuntimeError as error:
        raise ValueError(f"{kind}: the tensors do not fit the config: {error}") from None
    return module.to(next(iter(renamed.values())).dtype).eval()


def _llama(**config: Any) -> nn.Module:
    known = inspect.signature(LlamaConfig).parameters
    unknown = sorted(set(config) - set(known) - {"rope_theta"})
    if unknown:
        raise TypeError(f"LlamaConfig has no {', '.join(unknown)}")
    return _route_llama(LlamaForCausalLM(LlamaConfig(**config)))


def _llama_of_directory(path: Any) -> nn.Module:
    try:
        model, _ = load_strictly(LlamaForCausalLM.from_pretrained, path)
    except ValueError as error:
        raise ValueError(f"moh_llama: {error}") from None
    return model


def _route_llama(model: Any) -> Any:
    released = MoHConfig(shared=0.5, active=0.75, router="query_norm")
    return convert(model, attention=released).eval()


def _moh_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "wg.weight": "router.routed.weight",
        "wg_0.weight": "router.stage.weight",
        "wg_1.weight": "router.shared.weight",
        "proj.weight": "o_proj.weight",
        "proj.bias": "o_proj.bias",
    }
    renamed = {names.get(name, name): tensor for name, tensor in tensors.items()}
    for suffix in ("weight", "bias"):
        if suffix == "weight" or "qkv.bias" in renamed:
            parts = renamed.pop(f"qkv.{suffix}").chunk(3)
            renamed |= {f"{p}_proj.{suffix}": t for p, t in zip("qkv", parts, strict=True)}
    return renamed


def _mh_moe(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = dict(tensors)
    gate, up = renamed.pop("experts.gate_proj"), renamed.pop("experts.up_proj")
    renamed["experts.up_proj"] = torch.cat([gate, up], dim=1)
    if "shared.gate_proj.weight" in renamed:
        gate, up, down = (renamed.pop(f"shared.{p}_proj.weight") for p in ("gate", "up", "down"))
        renamed["shared_expert.up_proj"] = torch.cat([gate, up]).unsqueeze(0)
        renamed["shared_expert.down_proj"] = down.unsqueeze(0)
    return renamed


_KINDS: dict[str, tuple[Callable[..., nn.Module], Callable[[dict], dict[str, Tensor]]]] = {
    "moh_attention": (MoHAttention, _moh_attention),
    "mh_moe": (MHMoE, _mh_moe),
    "moh_llama": (_llama, dict),
}
