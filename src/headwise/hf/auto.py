"""Classes for converted models: what they add to transformers' own, and how they load again."""

import copy
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoBackbone,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from headwise.hf.adapters import MODEL_TYPE, DefaultTargets
from headwise.hf.attention import NAME, check_implementation
from headwise.hf.batching import init_continuous_batching
from headwise.hf.conversion import Conversion, Converted
from headwise.hf.engines import attention_for
from headwise.hf.former_names import forget_former_names, former_names
from headwise.hf.parallelism import check_split, refuse_split_loading
from headwise.hf.reading import reading_model
from headwise.hf.surgery import install
from headwise.hf.training_loss import bound_with_routing_loss, with_routing_loss
from headwise.results.files import write_whole

_PREFIX = "Routed"
# The module beside the weights, which transformers imports with trust_remote_code=True. What it
# imports is looked for first, and where it is missing transformers says to install it.
_MODULE = "modeling_headwise"
_MODELING = '''"""The classes of this model, which headwise makes of those of transformers."""

from headwise.hf import __getattr__
'''
# Written in the place of a number that weights which are read do not need: a config class that
# declares it refuses the sentence and shows it, so none loads a converted model as a dense one.
# Those that only look whether there is a config, as transformers' Trainer, read on.
_LOADED_BY = (
    "what it holds is routed: load it by headwise.load, or an Auto class with "
    "trust_remote_code=True"
)
_STOPS = ("initializer_range", "init_std", "initializer_factor", "attention_dropout")
# As they are in a router of any dtype; transformers would load them in the model's.
_FLOAT32_BUFFERS = ("mlp.layer.router.bias", "mlp.layer.router.load")


class Routed(Converted, PreTrainedModel):
    """Mixed into the class of a converted model of transformers."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        conversion = Conversion.from_dict(config.headwise)
        parts = (config, *(getattr(config, name) for name in config.sub_configs))
        found = [part for part in parts if part is not None]
        for part in found:
            if part._attn_implementation == _LOADED_BY:
                part._attn_implementation_internal = None
        if conversion.attention is not None:
            config._attn_implementation = attention_for(found, conversion)
        super().__init__(config, *args, **kwargs)
        # A head may have made the model inside by AutoModel, of the same config.
        if not any(isinstance(module, Routed) for module in self.modules() if module is not self):
            install(self, conversion)
        if conversion.mlp is not None and conversion.mlp.bias_rate:
            # Here, not in the class: a fitted router's bias is a parameter, of the model's dtype.
            model: Any = self
            model._keep_in_fp32_modules_strict |= {*_FLOAT32_BUFFERS}

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers asks classes, and whether a model has experts only its config says."""
        return True

    def _grouped_mm_can_dispatch(self) -> bool:
        """Whether there are experts; where this raises, transformers' own default is "eager"."""
        original: Any = self.original_class
        if self.conversion.mlp is None and not original._can_set_experts_implementation():
            raise ValueError(
                "experts_implementation is 'grouped_mm'; the model has no experts, so leave it out"
            )
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """transformers' own; for experts of ours, the default is ours."""
        conversion = self.conversion
        if conversion.mlp is not None:
            requested_experts = requested_experts or NAME
            if conversion.ternary != "no" and requested_experts != NAME:
                raise ValueError(
                    f"experts_implementation is {requested_experts!r}; ternary experts take "
                    f"{NAME!r} only"
                )
        found: str = super().get_correct_experts_implementation(requested_experts)
        return found

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, but strict.

        Raises:
            ValueError: For a missing, unexpected or misshapen weight, a model that cannot be read,
                or one that cannot be split over so many processes.
        """
        refuse_split_loading(kwargs)
        path = pretrained_model_name_or_path  # the name by which transformers may give it
        with reading_model(path):
            names = former_names(path, kwargs) | (kwargs.pop("key_mapping", None) or {})
        found = super().from_pretrained(path, *args, key_mapping=names, **kwargs)
        forget_former_names(found[0] if isinstance(found, tuple) else found)
        return found

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """transformers' own, which splits the model over processes before it reads the weights."""
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        if mesh_manager is not None:
            check_split(model, distributed_config)
        return model

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, which would want another attention."""
        if self.conversion.attention is None:
            return super().init_continuous_batching(*args, **kwargs)
        return init_continuous_batching(self, *args, **kwargs)

    def _get_name(self) -> str:
        """The original's: by it transformers tells what labels of a language model belong to."""
        name: str = self.original_class.__name__
        return name

    def __setattr__(self, name: str, value: Any) -> None:
        """A forward that somebody puts in the place of the model's has the balance losses, too."""
        if name == "forward":
            value = bound_with_routing_loss(self, value)
        super().__setattr__(name, value)

    def names_of_other_heads(self) -> set[str]:
        """Weights that the class in `config.architectures` has and this has not, or the reverse."""
        saved_class = class_of(self.config.architectures[0], self.original_class.config_class)
        if isinstance(self, saved_class):
            return set()
        with torch.device("meta"):
            saved: Any = saved_class(copy.deepcopy(self.config))
        return _bare_names(saved) ^ _bare_names(self)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """transformers' own, but not away from routed heads: another function would ignore them."""
        if self.conversion.attention is not None:
            check_implementation(attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)


class _OfRouted(DefaultTargets):
    """Mixed into the class of a converted model's config."""

    # transformers' own: the classes of the configs inside, and the name of an attention.
    sub_configs: ClassVar[dict[str, Any]]
    _attn_implementation: str | None

    def __post_init__(self, **fields: Any) -> None:
        super().__post_init__(**fields)  # type: ignore[misc]
        if self._attn_implementation is None:
            # A class of transformers that is given this config knows no such attention.
            self._attn_implementation = _LOADED_BY
        describe(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """transformers' own, of what `to_json_file` writes."""
        fields = copy.deepcopy(config_dict)
        inner = (fields.get(name) for name in cls.sub_configs)
        for part in (fields, *(part for part in inner if isinstance(part, dict))):
            for name in _STOPS:
                if part.get(name) == _LOADED_BY:
                    part[name] = part.pop(f"base_{name}")
        return super().from_dict(fields, **kwargs)  # type: ignore[misc]

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """transformers' own, with a sentence for the first of `_STOPS` in each part."""
        fields = json.loads(self.to_json_string(use_diff))  # type: ignore[attr-defined]
        inner = ((getattr(self, name), fields.get(name)) for name in self.sub_configs)
        for part, written in ((self, fields), *inner):
            if name := next((name for name in _STOPS if hasattr(part, name)), None):
                written |= {name: _LOADED_BY, f"base_{name}": getattr(part, name)}
        text = json.dumps(fields, indent=2, sort_keys=True)
        Path(json_file_path).write_text(f"{text}\n", encoding="utf-8")

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """transformers' own, and beside it the module that `auto_map` names."""
        super().save_pretrained(save_directory, **options)  # type: ignore[misc]
        module = Path(save_directory) / f"{_MODULE}.py"
        write_whole(module, lambda partial: partial.write_text(_MODELING))


def describe(config: Any) -> None:
    """Say in the config of a converted model what tools that do not know headwise look for.

    `auto_map` names the classes, for tools that trust code beside the weights. By
    `router_aux_loss_coef` trainers tell that there is a loss to balance routers, which is weighted
    already; that of a model that had experts before stays.
    """
    base = type(config).__bases__[-1]
    classes = {auto.__name__: _classes_of(auto, base)[0].__name__ for auto in _autos_of(base)}
    names = {"AutoConfig": "Config"} | classes
    config.auto_map = {auto: f"{_MODULE}.{_PREFIX}{name}" for auto, name in names.items()}
    text = config.get_text_config()
    if hasattr(config, "headwise") and not hasattr(text, "router_aux_loss_coef"):
        balances = Conversion.from_dict(config.headwise).balances_load
        text.router_aux_loss_coef = 1.0 if balances else 0.0
    coefficient = getattr(text, "router_aux_loss_coef", 0.0)
    if not isinstance(coefficient, int | float):
        raise ValueError(f"router_aux_loss_coef is {coefficient!r}; it must be a number, 0 for off")


@functools.cache
def routed_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class of a converted model's config, a subclass of the original's.

    Its model_type is "headwise", so that a saved model is never taken for a plain one; the
    original's stands under `base_model_type`.
    """
    members = {"model_type": MODEL_TYPE, "__reduce_ex__": _reduced_to(routed_config_class, base)}
    if not hasattr(base, "output_router_logits"):
        # Trainers look whether there is one. Where it is True they compute a loss of their own from
        # logits of experts; whether ours is wanted says its coefficient.
        members["output_router_logits"] = property(lambda _: False, lambda _, asked: None)
    return type(f"{_PREFIX}{base.__name__}", (_OfRouted, base), members)


@functools.cache
def routed_class(model_class: Any) -> type[PreTrainedModel]:
    """The class of a converted model, a subclass of the original's."""
    members = {
        "__reduce_ex__": _reduced_to(routed_class, model_class),
        "config_class": routed_config_class(model_class.config_class),
        "forward": with_routing_loss(model_class.forward),
    }
    routed = type(f"{_PREFIX}{model_class.__name__}", (Routed, model_class), members)
    for module in _modules_of_transformers():
        setattr(module, routed.__name__, routed)
    # Keyed by class, filled by its __init__, which a model that is converted does not go through.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(routed), model_class._can_record_outputs)
    return routed


def _modules_of_transformers() -> list[ModuleType]:
    """Where servers look a class up by the name in `config.architectures`.

    Importing a part of transformers makes its module anew, and who imported it before has another.
    """
    imported = (getattr(module, "__dict__", {}) for module in [*sys.modules.values()])
    found = [sys.modules["transformers"], *(names.get("transformers") for names in imported)]
    return [x for x in found if isinstance(x, ModuleType) and x.__name__ == "transformers"]


def routed_classes(model_class: Any) -> tuple[type[PreTrainedModel], type[PreTrainedConfig]]:
    """The classes of a converted model and of its config, after `register_family`.

    Raises:
        ValueError: If no Auto class knows the original.
    """
    base: Any = model_class.config_class
    if not any(model_class in _classes_of(auto, base) for auto in _autos_of(base)):
        raise ValueError(
            f"{model_class.__name__} cannot be converted: no Auto class of transformers loads it, "
            "so it could not be loaded again; convert a model class that transformers has, or "
            "register it with one (AutoModel.register)"
        )
    register_family(base)
    return routed_class(model_class), routed_config_class(base)


def register_family(base: Any) -> None:
    """Let every Auto class that knows configs of that class know the converted ones, too.

    A converted model then loads with another head just as its original does.
    """
    config_class = routed_config_class(base)
    for auto in _autos_of(base):
        routed = tuple(map(routed_class, _classes_of(auto, base)))
        auto._model_mapping.register(
            config_class, routed if len(routed) > 1 else routed[0], exist_ok=True
        )


def _reduced_to(make: Callable[[Any], Any], original: Any) -> Callable[[Any, Any], Any]:
    """What pickle and copy ask an instance of a class that was made: how to make it again.

    They look classes up by name, and in another process these may not be made yet.
    """

    def reduced(instance: Any, protocol: Any) -> Any:
        default = object.__reduce_ex__(instance, protocol)
        # Sharding puts a class of its own before the model's.
        if type(instance) is not make(original):
            return default
        return (_blank, (make, original), *default[2:])

    return reduced


def _blank(make: Callable[[Any], Any], original: Any) -> Any:
    """An instance without its state, of the class that is made for the original."""
    kind = make(original)
    return kind.__new__(kind)


def _bare_names(model: PreTrainedModel) -> set[str]:
    """The names of the weights, without what heads have before those of the model inside."""
    return {name.removeprefix(f"{model.base_model_prefix}.") for name in model.state_dict()}


def auto_class_of(model: PreTrainedModel) -> Any:
    """The Auto class of transformers that loads the model's class."""
    # Sharding puts a class of its own before the model's.
    own, config_class = set(type(model).__mro__), type(model.config)
    # The last one: that for a task says more than AutoModelForPreTraining.
    return [auto for auto in _auto_classes() if own & {*_classes_of(auto, config_class)}][-1]


def class_named(name: str, config_class: Any) -> Any:
    """The model class of that name: transformers', or one registered for that class of configs.

    None where there is none.
    """
    if own := getattr(transformers, name, None):
        return own
    autos = [*_auto_classes(), AutoBackbone]
    registered = (x for auto in autos for x in _classes_of(auto, config_class))
    return next((x for x in registered if x.__name__ == name), None)


def _auto_classes() -> list[Any]:
    return [x for name, x in vars(modeling_auto).items() if name.startswith("AutoModel")]


def _autos_of(config_class: Any) -> list[Any]:
    """The Auto classes that load a model of such a config."""
    return [auto for auto in _auto_classes() if _classes_of(auto, config_class)]


def _classes_of(auto: Any, config_class: Any) -> tuple[Any, ...]:
    mapping = getattr(auto, "_model_mapping", None)
    if mapping is None or config_class not in mapping:
        return ()
    found = mapping[config_class]
    classes = found if isinstance(found, list | tuple) else [found]
    # Of a config with parts it may be a class for one of the parts.
    return tuple(x for x in classes if getattr(x, "config_class", None) is config_class)


class RoutedConfig(PreTrainedConfig):
    """What AutoConfig knows under "headwise": reads config.json as the right model's class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A config of the class that `routed_config_class` makes for the model's architecture."""
        Conversion.from_dict(config_dict.get("headwise", {}))
        (architecture,) = config_dict["architectures"]
        base_type = config_dict.get("base_model_type")
        known = base_type in CONFIG_MAPPING
        routed = class_of(architecture, CONFIG_MAPPING[base_type] if known else None)
        if routed is None:
            original = architecture.removeprefix(_PREFIX)
            raise ValueError(f"{original} is not known: neither transformers nor an import has it")
        return routed.config_class.from_dict(config_dict, **kwargs)


def class_of(name: str, base: type[PreTrainedConfig] | None = None) -> Any:
    """The class of that name, such as "RoutedLlamaForCausalLM", of a converted model.

    None if neither transformers nor an import has the original.

    Args:
        name: What `config.architectures` holds.
        base: The class of the original's configs, where that is none of transformers.
    """
    original = class_named(name.removeprefix(_PREFIX), base)
    return None if original is None else routed_classes(original)[0]


AutoConfig.register(MODEL_TYPE, RoutedConfig)
