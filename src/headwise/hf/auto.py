"""Classes for converted models: what they add to transformers' own, and how they load again."""

import functools
from collections.abc import Callable
from typing import Any

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
from headwise.hf.conversion import Conversion, Converted
from headwise.hf.former_names import forget_former_names, former_names
from headwise.hf.parallelism import refuse_tensor_parallel_loading
from headwise.hf.reading import reading_model
from headwise.hf.surgery import install
from headwise.hf.training_loss import with_routing_loss

_PREFIX = "Routed"
# As they are in a router of any dtype; transformers would load them in the model's.
_FLOAT32_BUFFERS = ("mlp.layer.router.bias", "mlp.layer.router.load")


class Routed(Converted, PreTrainedModel):
    """Mixed into the class of a converted model of transformers."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        conversion = Conversion.from_dict(config.headwise)
        if conversion.attention is not None:
            for part in (config, *(getattr(config, name) for name in config.sub_configs)):
                if part is not None and part._attn_implementation is not None:
                    check_implementation(part._attn_implementation)
        super().__init__(config, *args, **kwargs)
        install(self, conversion)

    def _can_set_experts_implementation(self) -> bool:
        # transformers looks for its decorator in the file of the class, which is this one.
        of_original: bool = self.original_class._can_set_experts_implementation()
        return of_original or self.conversion.mlp is not None

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
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, but strict, and not tensor-parallel.

        Raises:
            ValueError: For a missing, unexpected or misshapen weight, a model that cannot be read,
                or tensor parallelism.
        """
        refuse_tensor_parallel_loading(kwargs)
        with reading_model(path):
            names = former_names(path, kwargs) | (kwargs.pop("key_mapping", None) or {})
        found = super().from_pretrained(path, *args, key_mapping=names, **kwargs)
        forget_former_names(found[0] if isinstance(found, tuple) else found)
        return found

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """transformers' own, but not away from routed heads: another function would ignore them."""
        if self.conversion.attention is not None:
            check_implementation(attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)


@functools.cache
def routed_classes(model_class: Any) -> tuple[type[PreTrainedModel], type[PreTrainedConfig]]:
    """The classes of a converted model and of its config, made from transformers' own.

    Both are subclasses of the originals. The config's model_type is "headwise", so that a saved
    model is never taken for a plain one; the original's stands under `base_model_type`.
    """
    base_config = model_class.config_class
    autos = [auto for auto in _auto_classes() if model_class in _classes_of(auto, base_config)]
    if not autos:
        raise ValueError(
            f"{model_class.__name__} cannot be converted: no Auto class of transformers loads it, "
            "so it could not be loaded again; convert a model class that transformers has, or "
            "register it with one (AutoModel.register)"
        )
    name = f"{_PREFIX}{base_config.__name__}"
    of_config = {"model_type": MODEL_TYPE, "__reduce_ex__": _reduced_to(model_class, 1)}
    config_class = type(name, (DefaultTargets, base_config), of_config)
    members = {
        "__reduce_ex__": _reduced_to(model_class, 0),
        "config_class": config_class,
        "forward": with_routing_loss(model_class.forward),
        "_keep_in_fp32_modules_strict": {
            *(model_class._keep_in_fp32_modules_strict or ()),
            *_FLOAT32_BUFFERS,
        },
    }
    routed = type(f"{_PREFIX}{model_class.__name__}", (Routed, model_class), members)
    # Keyed by class, filled by its __init__, which a model that is converted does not go through.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(routed), model_class._can_record_outputs)
    for auto in autos:
        auto.register(config_class, routed)
    return routed, config_class


def _reduced_to(model_class: Any, which: int) -> Callable[[Any, Any], Any]:
    """What pickle and copy ask an instance of a class of `routed_classes`: how to make it again.

    They look classes up by name, and in another process these may not be made yet.
    """

    def reduced(instance: Any, protocol: Any) -> Any:
        default = object.__reduce_ex__(instance, protocol)
        # Sharding puts a class of its own before the model's.
        if type(instance) is not routed_classes(model_class)[which]:
            return default
        return (_blank, (model_class, which), *default[2:])

    return reduced


def _blank(model_class: Any, which: int) -> Any:
    """An instance without its state, of the class of a converted model (0) or of its config (1)."""
    kind: Any = routed_classes(model_class)[which]
    return kind.__new__(kind)


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


def _classes_of(auto: Any, config_class: Any) -> tuple[Any, ...]:
    mapping = getattr(auto, "_model_mapping", None)
    if mapping is None or config_class not in mapping:
        return ()
    classes = mapping[config_class]
    return tuple(classes) if isinstance(classes, list | tuple) else (classes,)


class RoutedConfig(PreTrainedConfig):
    """What AutoConfig knows under "headwise": reads config.json as the right model's class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A config of the class that `routed_classes` makes for the model's architecture."""
        Conversion.from_dict(config_dict.get("headwise", {}))
        (architecture,) = config_dict["architectures"]
        base = architecture.removeprefix(_PREFIX)
        base_type = config_dict.get("base_model_type", "")
        known = base_type in CONFIG_MAPPING
        original = class_named(base, CONFIG_MAPPING[base_type] if known else None)
        if original is None:
            raise ValueError(f"{base} is not known: neither transformers nor an import has it")
        _, config_class = routed_classes(original)
        return config_class.from_dict(config_dict, **kwargs)


AutoConfig.register(MODEL_TYPE, RoutedConfig)
