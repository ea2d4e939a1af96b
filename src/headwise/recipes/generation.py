"""Continuing a text with a saved model."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

from headwise.recipes.loading import load_causal_lm, load_tokenizer


def load_model(directory: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """Model and tokenizer of a directory that a run or `save_pretrained` left.

    Raises:
        ValueError: If the directory holds no model, a broken one or none of language.
    """
    model = load_causal_lm(directory)
    tokenizer = load_tokenizer(str(directory))
    if tokenizer is None:
        raise ValueError(f"{directory} has no tokenizer, and text needs one; save one beside it")
    return model, tokenizer


def continue_text(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """The prompt and what the model makes of it; temperature 0 takes the likeliest token.

    Raises:
        ValueError: For a prompt without tokens, a negative temperature or no new tokens.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("prompt is empty; give the model at least one token to continue")
    set_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    with torch.no_grad():
        output = model.eval().generate(
            **inputs.to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)
