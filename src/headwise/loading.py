"""Loading what a path holds: its config, a causal language model, converted or not, a tokenizer."""

import math
import os
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import try_to_load_from_cache
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from headwise.errors import UnreadableError
from headwise.hf.adapters import MODEL_TYPE
from headwise.hf.loading import check_holds_model, check_place, config_in
from headwise.hf.reading import load_strictly, reading_model
from headwise.models import DiTConfig

Kind = Literal["language model", "image classifier", "DiT"]
_USES: dict[Kind, str] = {
    "language model": "`headwise eval --tasks` scores it",
    "image classifier": "`headwise eval --images` scores it",
    "DiT": "`headwise draw` draws with it",
}


def load_causal_lm(path: str | Path, **options: Any) -> Any:
    """The model; options are those of `from_pretrained`."""
    load_config(path, "language model")
    load = AutoModelForCausalLM.from_pretrained
    model, _ = load_strictly(load, path, surplus_allowed=True, **options)
    return model


def load_config(path: str | Path, kind: Kind | None = None) -> PreTrainedConfig:
    """The config of the model in a directory, or of that name on the Hugging Face hub."""
    check_holds_model(path)
    with reading_model(path):
        check_place(str(path))
        config = config_in(os.fspath(path))
        found = kind_of(config)
        num_layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
        if num_layers < 1:
            raise ValueError(f"num_hidden_layers is {num_layers}; it must be at least 1")
    if kind is not None and found != kind:
        use = f"; {_USES[found]}" if found else ""
        raise ValueError(f"{path} holds {described(config)}, not {_with_article(kind)}{use}")
    return config


def kind_of(config: PreTrainedConfig) -> Kind | None:
    """What the model is, of what commands take."""
    if isinstance(config, DiTConfig):
        return "DiT"
    if any("ForImageClassification" in name for name in config.architectures or ()):
        return "image classifier"
    return "language model" if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None


def described(config: PreTrainedConfig) -> str:
    """What the model is, in words, and its model_type: of a converted one the original's."""
    kind, name = kind_of(config), config.model_type
    converted = name == MODEL_TYPE
    which = f"model_type {config.base_model_type if converted else name!r}"
    which += ", converted" * converted
    return f"{_with_article(kind)} ({which})" if kind else f"a model of {which}"


def _with_article(kind: Kind) -> str:
    return f"an {kind}" if kind[0] == "i" else f"a {kind}"


def load_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer; None where there is none, but an error where it cannot be read."""
    try:
        with reading_model(path, "holds a tokenizer that cannot be read"):
            return AutoTokenizer.from_pretrained(path)
    except UnreadableError:
        if _has_vocabulary(path):
            raise
        return None


_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip


def _has_vocabulary(path: str) -> bool:
    """Whether a directory, or what is kept of a name on the hub, has a tokenizer's vocabulary."""
    if Path(path).is_dir():
        return any((Path(path) / name).exists() for name in _VOCABULARIES)
    return any(isinstance(try_to_load_from_cache(path, name), str) for name in _VOCABULARIES)


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
