"""`headwise generate`: a text, continued by a saved model."""

from pathlib import Path
from typing import Annotated

import tyro
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwise.loading import load_causal_lm, load_tokenizer
from headwise.parsing import called
from headwise.training.generation import continue_text


def main(argv: list[str]) -> None:
    """Run the command."""
    called(generate, argv, "headwise generate")


def generate(
    directory: Annotated[Path, tyro.conf.Positional],
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    seed: int = 0,
) -> None:
    """Continue a text with a saved model.

    Args:
        directory: Directory of the model, for example runs/lm/models/moh-seed0.
        prompt: The text to continue.
        max_new_tokens: How many tokens to write; without it 100, or fewer where the model ends.
        temperature: Temperature of the sampling; 0 takes the likeliest token each time.
        seed: Seed of the sampling.
    """
    model, tokenizer = load_model(directory)
    text = continue_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    print(text)


def load_model(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a directory that a run or `save_pretrained` left.

    Raises:
        ValueError: If the directory holds no model, a broken one or none of language.
    """
    return load_causal_lm(directory), tokenizer_beside(directory)


def tokenizer_beside(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's directory; raises ValueError if there is none."""
    tokenizer = load_tokenizer(str(directory))
    if tokenizer is None:
        raise ValueError(f"{directory} has no tokenizer, and text needs one; save one beside it")
    return tokenizer
