"""Turning a model into one with routed heads or experts, or ternary, in place; and the way back."""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from headwise.hf.attention import NAME
from headwise.hf.auto import describe, routed_classes
from headwise.hf.conversion import Conversion, Converted, is_of_diffusers
from headwise.hf.expert_configs import FittedExperts, MoEConfig
from headwise.hf.head_configs import FittedHeads, MoHConfig
from headwise.hf.loading import load_original
from headwise.hf.parallelism import refuse_split_model
from headwise.hf.surgery import attention_modules, install
from headwise.nn import HeadRouter


def convert(
    model_or_path: PreTrainedModel | str | os.PathLike[str],
    *,
    attention: MoHConfig | FittedHeads | None = None,
    mlp: MoEConfig | FittedExperts | None = None,
    layers: Sequence[int] | None = None,
    every: int = 1,
    ternary: bool = False,
) -> Any:
    """Give a model Mixture-of-Head attention, a mixture of experts, or both.

    The model is changed in place and stays an instance of its class; the names of the parameters
    that it keeps stay. Routers and experts are new and untrained; experts replace the MLP's
    weights, or start as slices of them (`MoEConfig.experts_from`). In training,
    the balance losses join the model's loss.

    Args:
        model_or_path: A model whose attention goes through transformers' AttentionInterface (Llama,
            Qwen, Mistral, Gemma, GPT-2, GPT-NeoX, BERT, ViT and many more), or the path or hub name
            of one. Or a model of diffusers whose self-attention is plain (DiTTransformer2DModel,
            PixArtTransformer2DModel, UNet2DConditionModel and others): there only attention is
            converted, and cross attention stays.
        attention: What to make of the attentions: a configuration, or what `headwise.fit` made of
            it. None leaves them.
        mlp: What to put for the MLPs: a configuration, or what `headwise.fit_experts` made of it.
            None leaves them. The layers must have a module `mlp`.
        layers: Numbers of the layers to convert, counted from 0, each once, such as [2, 3]; the
            others stay as they are. Default: all. Budgets of single layers in `attention` still
            have one entry for each layer of the model.
        every: `mlp` goes to every `every`-th of these layers: 1 for each, 2 for the second, fourth,
            … of them, which of all layers are 1, 3, 5, …
        ternary: Make every linear map of the layers and all experts ternary, with inputs of 8 bits
            (BitNet b1.58; `headwise.bitnet`); of all layers, so `layers` must be None. Embeddings,
            norms, routers and the output layer stay in full precision. The model must be trained
            so: what pretrained weights say is lost.

    Returns:
        The model. `save_pretrained` keeps the conversion. The directory loads with `headwise.load`,
        and after `import headwise` with the Auto class that loads the original's class. `restore`
        is the way back.
        A model of diffusers loads with the class that it then has, for one
        `headwise.hf.RoutedDiTTransformer2DModel`, and with pipelines that were saved with it. Give
        it back to its pipeline, which then notes the class and does not save it as a dense one:
        `pipe.transformer = headwise.convert(pipe.transformer, ...)`. Its forward knows no loss that
        balance losses could join: add `model.routing_loss(routings)` of what
        `headwise.record_routing` saw.

    Raises:
        ValueError: If the model is converted already, tensor-parallel or of another layout, its
            path does not hold all of its weights, a budget does not fit it, it has no layer of a
            number in `layers`, its attention drops the **kwargs by which a learned router's
            decision reaches it, or its layers have matrices that cannot be made ternary (GPT-2's
            Conv1D). The model is then as it was.
    """
    if not isinstance(ternary, bool):
        raise ValueError(f"ternary is {ternary!r}; it must be True or False")
    if ternary and layers is not None:
        raise ValueError(f"layers is {layers!r}; with ternary=True it must be None, for all layers")
    of_heads, heads = _config_of(attention, FittedHeads, "attention", "fit")
    of_experts, experts = _config_of(mlp, FittedExperts, "mlp", "fit_experts")
    for fitted in (heads, experts):
        if fitted is not None and layers is None:
            layers = fitted.layers
    conversion = Conversion(
        attention=of_heads,
        mlp=of_experts,
        layers=layers,
        every=every,
        ternary="trained" if ternary else "no",
    )
    model: Any = model_or_path
    if isinstance(model, Converted):
        raise ValueError(f"{type(model).__name__} is converted already; load the original instead")
    if is_of_diffusers(model):
        # Imported here because diffusers needs seconds for it, and is an extra.
        from headwise.hf.of_diffusers import convert_model

        return convert_model(model, conversion, heads)
    if not isinstance(model, PreTrainedModel | str | os.PathLike):
        raise ValueError(
            f"model_or_path is a {type(model).__name__}; it must be a model of transformers or "
            "diffusers, or a path"
        )
    if not isinstance(model, PreTrainedModel):
        model = load_original(model)
    refuse_split_model(model, "converted")
    original: Any = type(model)
    model_class, config_class = routed_classes(original)
    base_model_type = model.config.model_type
    if of_heads is not None:
        num_layers = len(attention_modules(model))
        conversion = replace(conversion, attention=of_heads.resolve(num_layers))
    with _own_config(model):
        install(model, conversion, heads=heads, experts=experts, keep_mlps=True)
    model.__class__ = model_class
    model.config.__class__ = config_class
    model.config.base_model_type = base_model_type
    model.config.headwise = conversion.to_dict()
    if of_experts is not None:
        model.set_experts_implementation(NAME)
    # As saving the model would; a config that is saved alone must say so, too.
    model.config.architectures = [model_class.__name__]
    describe(model.config)
    return model


def _config_of(given: Any, kind: Any, name: str, fit: str) -> tuple[Any, Any]:
    """The configuration in what `convert` was given, and what was fitted, if that is what it is."""
    if isinstance(given, kind):
        return given.config, given
    if getattr(given, "router", None) == "fitted":
        raise ValueError(
            f"{name} has router 'fitted', which is fitted to a text; give what headwise.{fit}("
            "model, batches, config) returns"
        )
    return given, None


def restore(model: Any) -> Any:
    """The way back from `convert`: the model without routers, every head on, as a new model.

    Its weights are copies of the model's: what the conversion left as it was, it gives back; a
    model that was tuned since comes back tuned.

    Args:
        model: What `convert` returned, or what was loaded of it; it stays as it is.

    Returns:
        A model of the class that it had before, with that class's names of weights, on the same
        device, in the same dtype and mode.

    Raises:
        ValueError: If it is no converted model, it is tensor-parallel, its MLPs were replaced by
            experts, or it is ternary: then the original's weights are gone.
    """
    if not isinstance(model, Converted):
        raise ValueError(
            f"model is a {type(model).__name__}; it must be a converted model, as "
            "`headwise.convert` returns it and `headwise.load` reads it"
        )
    if model.conversion.mlp is not None or model.conversion.ternary != "no":
        made = "is ternary" if model.conversion.mlp is None else "has experts for its MLPs"
        raise ValueError(
            f"the model {made}, so the original's weights are gone; load the original from "
            "where it lies (`headwise tune` takes it as --original, with --dense.steps 0)"
        )
    refuse_split_model(model, "restored")
    routed: Any = model
    if isinstance(routed, PreTrainedModel):
        original_class = routed.original_class
        fields = routed.config.to_dict()
        for field in ("headwise", "auto_map"):
            del fields[field]
        if not hasattr(type(routed.config.get_text_config()), "router_aux_loss_coef"):
            for part in (fields, *(fields.get(name, {}) for name in routed.config.sub_configs)):
                part.pop("router_aux_loss_coef", None)
        fields["model_type"] = fields.pop("base_model_type")
        fields["architectures"] = [original_class.__name__]
        config = original_class.config_class.from_dict(fields)
        original = original_class._from_config(config, dtype=routed.dtype)
    else:
        fields = {name: value for name, value in routed.config.items() if name != "headwise"}
        original = routed.original_class.from_config(fields).to(routed.dtype)
    routers = [name for name, module in routed.named_modules() if isinstance(module, HeadRouter)]
    of_routers = tuple(f"{name}." for name in routers)
    weights = {k: v for k, v in routed.state_dict().items() if not k.startswith(of_routers)}
    original.load_state_dict(weights)
    return original.to(routed.device).train(routed.training)


@contextmanager
def _own_config(model: PreTrainedModel) -> Iterator[None]:
    """Give the model a copy of its config, which other models may share; not if inside it fails."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    # The parts of a model keep its config or parts of that.
    references = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, PreTrainedConfig) and id(value) in copies
    ]
    for module, name, value in references:
        setattr(module, name, copies[id(value)])
    try:
        yield
    except BaseException:
        for module, name, value in references:
            setattr(module, name, value)
        raise
