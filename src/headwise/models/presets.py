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
        ValueError: If there is no such preset or field, with the nearest name.
    """
    known = dict.fromkeys([*(field.name for field in fields(config)), *_OF_CLASSES, *also])
    for field in changes:
        look_up("field", field, known)
    preset = {"num_labels": _CLASSES} | dict(look_up("preset", name, presets))
    if "id2label" in changes:
        del preset["num_labels"]
    return preset | dict(changes)
