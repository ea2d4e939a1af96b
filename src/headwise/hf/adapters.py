"""What PEFT adapts in a converted model where it is not told what: as in the original."""

import sys
from typing import Any

MODEL_TYPE = "headwise"


class DefaultTargets:
    """Mixed into the class of a converted model's config.

    PEFT has tables of targets by model type, which is "headwise" whatever was converted. Right
    before it looks something up it asks the config for its fields; "headwise" then gets what the
    original's type has.
    """

    def to_dict(self) -> dict[str, Any]:
        """transformers' own."""
        fields: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        for table in _tables():
            table.pop(MODEL_TYPE, None)
            if (of_original := table.get(fields.get("base_model_type", ""))) is not None:
                table[MODEL_TYPE] = of_original
        return fields


def _tables() -> list[dict[str, Any]]:
    """PEFT's, where it is imported."""
    constants: Any = sys.modules.get("peft.utils.constants")
    named = {} if constants is None else vars(constants)
    return [table for name, table in named.items() if name.startswith("TRANSFORMERS_MODELS_TO_")]
