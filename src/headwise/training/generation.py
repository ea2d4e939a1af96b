"""Continuing a text with a language model."""

import math
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from headwise.loading import longest_sequence
from headwise.memory import check_memory
from headwise.training.fields import check_at_least, check_seed, check_text

_LEAST_TEMPERATURE = 1e-6
_NEW_TOKENS = 100


def continue_text(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
) -> str:
    """The prompt and what the model makes of it.

    Args:
        model: A language model.
        tokenizer: Its own.
        prompt: What to continue, of at least one token.
        max_new_tokens: How many tokens to write; None for 100, or fewer where the model ends.
        temperature: 0 takes the likeliest token.
        seed: Of the sampling.

    Raises:
        ValueError: For a prompt without tokens, a temperature that cannot be divided by, or more
            tokens than the model takes.
    """
    # Below it float32 would end at infinity; the likeliest token is all that is left of it anyway.
    if temperature != 0 and not _LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature is {temperature}; it must be 0 or lie in {_LEAST_TEMPERATURE}..inf"
        )
    check_seed("seed", seed)
    check_text("prompt", prompt)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    max_new_tokens = new_tokens("prompt", inputs["input_ids"].shape[1], max_new_tokens, model)
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


def new_tokens(field: str, tokens: int, wanted: int | None, model: Any) -> int:
    """How many tokens to write after a prompt.

    Args:
        field: What the prompt is called.
        tokens: Of the prompt.
        wanted: How many should be written; None for 100, or fewer where the model ends.
        model: Anything with a config.

    Raises:
        ValueError: If the prompt is empty or fills the model, or does so with what is wanted.
    """
    if tokens == 0:
        raise ValueError(f"{field} is empty; give the model at least one token to continue")
    most = longest_sequence(model)
    limit = f"the model takes at most {most} (max_position_embeddings)"
    if tokens >= most:
        raise ValueError(f"{field} has {tokens} tokens; {limit}, with those that it writes")
    if wanted is None:
        return int(min(_NEW_TOKENS, most - tokens))
    check_at_least(1, "max_new_tokens", wanted)
    if tokens + wanted > most:
        raise ValueError(
            f"max_new_tokens is {wanted}, after a prompt of {tokens} tokens; {limit} together"
        )
    check_memory(8 * wanted, "the tokens", max_new_tokens=wanted)
    return wanted
