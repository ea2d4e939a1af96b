"""Published sizes by name, with changes."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from headwise.ops.choice import look_up

_CLASSES = 1000
_OF_CLASSES = ("num_labels", "id2label", "label2id")


def preset_fields(
    config: type[PreTrainedConfig],
    presets: Mapping[str, Mapping[str, Any]],
    name: str,
    changes: Mapping[str, Any],
    also: Iterable[str] = (),
) -> dict[str, Any]:
    """What a config of a preset is made of: of 1000 classes unless preset or changes say otherwise.

    Args:
        config: The class.
        presets: Fields by the preset's name.
        name: Of one of them.
        changes: Fields that differ from it.
        also: Names that changes may have beside the class's fields and its classes.

    Raises:
        ValueError: If there is no such preset or field, with the nearest name, and all presets; or
            with the class whose preset it is.
    """
    known = dict.fromkeys([*(field.name for field in fields(config)), *_OF_CLASSES, *also])
    for field in changes:
        look_up("field", field, known)
    preset = {"num_labels": _CLASSES} | dict(_preset(config, presets, name))
    if "id2label" in changes:
        del preset["num_labels"]
    return preset | dict(changes)


def _preset(
    config: type[PreTrainedConfig], presets: Mapping[str, Mapping[str, Any]], name: str
) -> Mapping[str, Any]:
    # Not above: they import this module.
    from headwise.models import dit_config, transnext_config

    others = {
        "DiTConfig": dit_config.PRESETS,
        "TransNeXtConfig": transnext_config.PRESETS,
    }
    for other, known in others.items():
        if name in known and name not in presets:
            raise ValueError(f"{config.__name__} has no preset {name!r}; {other} has one")
    return look_up("preset", name, presets, listed=True)
