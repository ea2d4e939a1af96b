"""Weights that models saved by former versions have under other names."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from headwise.hf.conversion import Conversion

# The matrices of gated experts were called as those of plain ones still are.
_OF_GATED = {
    rf"\.mlp\.layer\.{place}\.up_proj$": f".mlp.layer.{place}.gate_up_proj"
    for place in ("experts", "shared_expert")
}


def former_names(path: Any, options: Mapping[str, Any]) -> dict[str, str]:
    """The `key_mapping` of `from_pretrained` that brings former names to those of today.

    Args:
        path: Of the model.
        options: Those of `from_pretrained`.
    """
    config = options.get("config")
    if isinstance(config, PreTrainedConfig):
        fields = config.to_dict()
    else:
        fields, _ = PreTrainedConfig.get_config_dict(config or path, **options)
    mlp = Conversion.from_dict(fields.get("headwise", {})).mlp
    return _OF_GATED if mlp is not None and mlp.glu else {}


def forget_former_names(model: Any) -> None:
    """Let `save_pretrained` write the names of today; transformers would go back to those read."""
    model._weight_conversions = [
        used for used in model._weight_conversions if used.target_patterns[0] not in _NAMES
    ]


_NAMES = set(_OF_GATED.values())
