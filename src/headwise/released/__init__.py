"""Reading weights under the names of the released code, of which `names` has the tables."""

import argparse
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from headwise.hf import MoHConfig, convert
from headwise.hf.reading import first_of, load_strictly
from headwise.models import DiT, TransNeXtForImageClassification
from headwise.nn import MHMoE, MoE, MoHAttention
from headwise.ops.choice import look_up
from headwise.ops.fields import check
from headwise.released import constructors, names

Source = Mapping[str, Tensor] | str | os.PathLike[str]


def load_released(
    kind: str,
    source: Source,
    *,
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A layer or a model with released weights, in eval mode.

    Args:
        kind: "moh_attention" (the attention of MoH-DiT), "mh_moe", "moh_llama", "moh_transnext"
            (MoH-ViT, and TransNeXt itself) or "moh_dit" (MoH-DiT, and DiT itself).
        source: Tensors by name, or the path of a safetensors file or of a PyTorch checkpoint (.pth,
            .pt), of which only tensors are read; of several sets of weights the averaged ones
            ("ema") are taken. For "moh_llama" also the path of a directory as transformers saves
            it, such as a copy of the released MoH-LLaMA3-8B.
        preset: For "moh_transnext" and "moh_dit": the name of published sizes, such as
            "moh-vit-s-75" (`models.TransNeXtConfig.presets`, `models.DiTConfig.presets`).
        config: Or the sizes. For "moh_attention": dim, num_heads, shared_heads, active_heads,
            head_dim. For "mh_moe": dim, num_heads, num_experts, top_k, expert_dim, normalize_top_k,
            shared_expert_dim. For "moh_llama": what LlamaConfig takes; None for a directory, which
            has its own. For "moh_transnext" and "moh_dit": what the released code's TransNeXt or
            DiT takes, which is dense without shared_head and routed_head.

    Returns:
        MoHAttention (mode "released"), MHMoE, a `models.TransNeXtForImageClassification`, a
        `models.DiT`, or a LlamaForCausalLM with the first half of its heads shared, where a token
        chooses half of the others by the norms of its queries. In the dtype of the tensors.

    Raises:
        ValueError: If the kind is unknown, not exactly one of preset and config is given where one
            is needed, there is no such preset, the config lacks or does not know a field, the file
            holds no weights, or a tensor is missing, left over or misshapen.
    """
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {list(_KINDS)}")
    if not isinstance(source, Mapping | str | os.PathLike):
        raise ValueError(
            f"source is a {type(source).__name__}; it must be tensors by name, or a path"
        )
    of = "" if isinstance(source, Mapping) else f" of {source}"
    if kind == "moh_llama" and not isinstance(source, Mapping) and Path(source).is_dir():
        for field, value in (("preset", preset), ("config", config)):
            if value is not None:
                raise ValueError(
                    f"{field} is {value!r}; it must be None, {source} has its own sizes"
                )
        model, _ = load_strictly(LlamaForCausalLM.from_pretrained, source)
        return _route_llama(model)
    rename = _KINDS[kind][1]
    module = _built(kind, preset, config)
    tensors = _tensors(source)
    try:
        renamed = rename(tensors)
    except KeyError as error:
        raise ValueError(f"{kind}: tensor {error}{of} is missing") from None
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"{kind}: a tensor{of} has too few dimensions: {error}") from None
    if misfits := _misfits(module, renamed):
        raise ValueError(f"{kind}: the tensors{of} do not fit the config: {misfits}")
    if whole := [name for name, tensor in renamed.items() if not tensor.is_floating_point()]:
        raise ValueError(
            f"{kind}: {whole[0]}{of} holds {renamed[whole[0]].dtype}; it must be floating"
        )
    module.load_state_dict(renamed)
    return module.to(next(iter(renamed.values())).dtype).eval()


def _built(kind: str, preset: str | None, config: Mapping[str, Any] | None) -> nn.Module:
    """The module of exactly one of the two, its weights as they start."""
    if preset is not None and config is not None:
        raise ValueError(f"preset is {preset!r} and config is {config!r}; one must be None")
    if preset is not None:
        if kind not in _PRESETS:
            raise ValueError(f"preset is {preset!r}; {kind!r} has no presets, so give config")
        check("preset", preset, str)
        model_class = _PRESETS[kind]
        return model_class(model_class.config_class.preset(preset))
    if not isinstance(config, Mapping):
        or_preset = " or preset, a name" if kind in _PRESETS else ""
        raise ValueError(
            f"config is {config!r}; {kind!r} needs a dict of its sizes (num_heads, …){or_preset}"
        )
    build = _KINDS[kind][0]
    places = _FIELDS.get(kind, (build,))
    known = {name: place for place in places for name in inspect.signature(place).parameters}
    for field in config:
        if field != "rope_theta":  # LlamaConfig has it among its **kwargs.
            look_up("field of config", field, known)
    try:
        return build(**config)
    except TypeError as error:
        raise ValueError(f"config does not fit {kind}: {error}") from None


def _tensors(source: Source) -> dict[str, Tensor]:
    """By name, from wherever they are."""
    found: Any = source if isinstance(source, Mapping) else _read(Path(source))
    where = "source" if isinstance(source, Mapping) else str(source)
    for name in ("ema", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} holds a {type(found).__name__}; it must hold tensors by name")
    for name, tensor in found.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise ValueError(
                f"{where} has a {type(tensor).__name__} under {name!r}; there must be tensors by "
                "name, alone or under 'ema' or 'model'"
            )
    return dict(found)


def _read(path: Path) -> Any:
    """What a file holds, if only tensors."""
    if not path.is_file():
        raise ValueError(f"source is {path}, where there is no file")
    if path.suffix not in (".pth", ".pt"):
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is no safetensors file (a checkpoint of PyTorch ends in .pth or .pt): "
                f"{error}"
            ) from None
    # Namespaces are what the released code keeps its command line in.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            # A file of other bytes ends the unpickler in whatever they come to mean; and what torch
            # says of a whole one with more than tensors advises to read it all the same.
            raise ValueError(
                f"{path} is no checkpoint of PyTorch, is broken, or holds more than tensors, which "
                "is not read"
            ) from None


def _misfits(module: nn.Module, tensors: dict[str, Tensor]) -> str:
    """What is misshapen, missing or left over, under our names; "" where nothing is."""
    wanted = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: list(tensor.shape) for name, tensor in tensors.items()}
    both = [name for name in wanted if name in given]
    kinds = {
        "size mismatch": [
            f"{name} {given[name]}, not {wanted[name]}"
            for name in both
            if given[name] != wanted[name]
        ],
        "missing": [f"{name} {shape}" for name, shape in wanted.items() if name not in given],
        "left over": [f"{name} {shape}" for name, shape in given.items() if name not in wanted],
    }
    return "; ".join(f"{kind}: {first_of(names)}" for kind, names in kinds.items() if names)


def _llama(**config: Any) -> nn.Module:
    return _route_llama(LlamaForCausalLM(LlamaConfig(**config)))


def _route_llama(model: Any) -> Any:
    released = MoHConfig(shared=0.5, active=0.75, router="query_norm")
    return convert(model, attention=released).eval()


_KINDS: dict[str, tuple[Callable[..., nn.Module], Callable[[dict], dict[str, Tensor]]]] = {
    "moh_attention": (MoHAttention, names.moh_attention),
    "mh_moe": (MHMoE, names.mh_moe),
    "moh_llama": (_llama, dict),
    "moh_transnext": (constructors.transnext, names.transnext),
    "moh_dit": (constructors.dit, names.dit),
}
# What has the fields of a config as arguments, where the constructor takes them as **fields.
_FIELDS: dict[str, tuple[Any, ...]] = {"moh_llama": (LlamaConfig,), "mh_moe": (MHMoE, MoE)}
_PRESETS: dict[str, Any] = {"moh_transnext": TransNeXtForImageClassification, "moh_dit": DiT}
