"""What the configs of our own models share: they read no other model's."""

from typing import Any

from transformers import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    """transformers' own, which would take another model's fields for its own, and only warn."""

    @classmethod
    def get_config_dict(cls, path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' own: the fields in config.json, and the arguments that are left.

        Raises:
            ValueError: If they are those of another model.
        """
        fields, rest = super().get_config_dict(path, **kwargs)
        if (kind := fields.get("model_type")) != cls.model_type:
            raise ValueError(f"{path} holds a model of model_type {kind!r}, not {cls.model_type!r}")
        return fields, rest
