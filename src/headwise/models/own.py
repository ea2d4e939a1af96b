"""What our own models share: the loss of their routers, sizes by a preset's name."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import PreTrainedConfig

from headwise.ops import Routing
from headwise.ops.balance import mean_balance_loss
from headwise.ops.choice import look_up

_CLASSES = 1000
_OF_CLASSES = ("num_labels", "id2label", "label2id")


class BalancesHeads:
    """Mixed into a model that routes its attention heads."""

    config: Any

    def routing_loss(self, routings: Mapping[str, Routing]) -> Tensor:
        """The mean balance loss of the layers that route, times balance_coefficient.

        Args:
            routings: What `headwise.record_routing` saw in a forward. Where none of them routes,
                the loss is 0.
        """
        return self.config.balance_coefficient * mean_balance_loss(routings.values())


class OwnConfig(PreTrainedConfig):
    """A config that refuses another model's fields, of which transformers would only warn.

    Attributes:
        presets: For each preset's name the fields that differ from the defaults. A preset has 1000
            classes unless it says otherwise.
        aliases: Names that `preset` accepts beside the class's fields.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    aliases: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_labels < 1:
            raise ValueError(f"num_labels is {self.num_labels}; it must be at least 1")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The sizes that go by that name in `presets`, with changes.

        Args:
            name: Such as "moh-vit-s-75" or "moh-dit-xl-90"; those with "test" in them are tiny.
            **changes: Fields that differ from the preset.

        Raises:
            ValueError: If there is no such preset or field, with the nearest name and all presets,
                or with the class whose preset it is; or if the changes do not fit.
        """
        known = dict.fromkeys([*(field.name for field in fields(cls)), *_OF_CLASSES, *cls.aliases])
        for field in changes:
            look_up("field", field, known)
        for other in OwnConfig.__subclasses__():
            if name in other.presets and name not in cls.presets:
                raise ValueError(f"{cls.__name__} has no preset {name!r}; {other.__name__} has one")
        preset = {"num_labels": _CLASSES} | dict(look_up("preset", name, cls.presets, listed=True))
        if "id2label" in changes:
            del preset["num_labels"]
        return cls(**preset | changes)

    @classmethod
    def get_config_dict(cls, path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' own: the fields in config.json, and the arguments that are left."""
        fields, rest = super().get_config_dict(path, **kwargs)
        if (kind := fields.get("model_type")) != cls.model_type:
            raise ValueError(f"{path} holds a model of model_type {kind!r}, not {cls.model_type!r}")
        return fields, rest
