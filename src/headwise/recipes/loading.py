"""Loading what a path holds: its config, a causal language model, converted or not, a tokenizer."""

import math
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from headwise.hf.loading import check_place


def load_causal_lm(path: str, **options: Any) -> Any:
    """The model; options are those of `from_pretrained`.

    Raises:
        ValueError: If there is none that can be loaded.
    """
    try:
        check_place(path)
        return AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} holds no model that can be loaded: {reason}") from error


def load_config(path: str) -> PreTrainedConfig:
    """The config of a model that `models` names.

    Raises:
        ValueError: If there is none.
    """
    try:
        check_place(path)
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"models names {path}, which has no model: {reason}") from error


def is_image_classifier(config: PreTrainedConfig) -> bool:
    """Whether the model is one, by the name of its class."""
    return any("ForImageClassification" in name for name in config.architectures or ())


def check_holds_model(directory: Path) -> None:
    """Raises ValueError if no model was saved there, with those of the run that may be there."""
    if not (directory / "config.json").is_file():
        inside = sorted(str(p.parent) for p in directory.glob("models/*/config.json"))
        hint = f"; the run in it has {', '.join(inside)}" if inside else ""
        raise ValueError(f"{directory} holds no model (no config.json){hint}")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer; None where there is none."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError):
        return None


def longest_sequence(model: Any) -> float:
    """Tokens of the longest sequence that the model was made for; inf where it does not say."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # XLNet says -1.
    return most if most is not None and most > 0 else math.inf


def check_length(field: str, length: int, model: Any, path: str) -> None:
    """Raises ValueError if the model was not made for sequences of that length."""
    if length > (most := longest_sequence(model)):
        raise ValueError(
            f"{field} is {length}; the model in {path} takes at most {most} tokens "
            "(max_position_embeddings)"
        )
