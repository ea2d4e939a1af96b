"""Tiny language models, tokenizers, texts, and runs that train such models."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headwise.data.text import END_OF_TEXT, Domain, train_tokenizer

# Of a model of transformers, whose heads have 4 channels.
SIZES = {
    "vocab_size": 31, "hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2,
    "num_attention_heads": 6,
}  # fmt: skip
LINES = "".join(f"line {i}\n" for i in range(2000))
# Fields of a run that trains on text.
RUN = {
    "dim": 32, "num_heads": 4, "num_layers": 2, "mlp_dim": 64, "vocab_size": 300,
    "sequence_length": 16, "batch_size": 2, "warmup_steps": 0, "eval_blocks_per_file": 1,
}  # fmt: skip
ONE_STEP = {"steps": 1, "log_every": 1, "eval_every": 1, "save_every": 1}


def flags(**fields: object) -> list[str]:
    """Fields of a run, as the command takes them."""
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in fields.items())
    return [word for pair in pairs for word in pair]


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes))


def tokenizer(text: str, vocab_size: int = 300, **special: str) -> PreTrainedTokenizerFast:
    """One that was trained on that text, with the end of a text as its last token."""
    pieces = train_tokenizer([Domain("text", {"a": text}, {})], vocab_size=vocab_size)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, **{"eos_token": END_OF_TEXT} | special)
