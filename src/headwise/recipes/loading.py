"""Loading what a path holds: a causal language model, converted or not, and its tokenizer."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


def load_causal_lm(path: str, **options: Any) -> Any:
    """The model; options are those of `from_pretrained`.

    Raises:
        ValueError: If there is none that can be loaded.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        nowhere = "" if Path(path).is_dir() else "there is no such directory, and "
        raise ValueError(f"{path} holds no model that can be loaded: {nowhere}{reason}") from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer; None where there is none."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError):
        return None


def check_length(field: str, length: int, model: Any, path: str) -> None:
    """Raises ValueError if the model was not made for sequences of that length."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(
            f"{field} is {length}; the model in {path} takes at most {most} tokens "
            "(max_position_embeddings)"
        )
