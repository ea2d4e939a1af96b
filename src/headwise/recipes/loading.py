"""Loading what a path holds: a causal language model, converted or not, and its tokenizer."""

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
        raise ValueError(f"{path} holds no model that can be loaded: {reason}") from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer; None where there is none."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError):
        return None
