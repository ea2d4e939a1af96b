"""Runs on text: their fields, and the models that they compare, Llamas and what becomes of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from headwise.data.text import check_exponent
from headwise.data.typos import check_typos
from headwise.memory import check_memory
from headwise.models import DecoderConfig, DecoderForCausalLM
from headwise.parity import count_flops
from headwise.recipes.layered import LayeredRun, convert_variant, equal_width
from headwise.training.comparison import Variant
from headwise.training.fields import check_at_least, check_text


@dataclass(frozen=True, kw_only=True)
class TextRun(LayeredRun):
    """Language models, of Llama's layout, that are compared on text.

    Attributes:
        data: Text: None for what every Python carries, a file, a directory, a dataset's name; or a
            mixture of datasets to stream: "moh-llm", "red-pajama", or a file of sources whose name
            ends in .mixture.json.
        vocab_size: Entries of the tokenizer that is trained on the text.
        sequence_length: Tokens that a model sees at once.
        domain_exponent: A domain of n tokens is drawn with weight n^domain_exponent.
        eval_blocks_per_file: Blocks of a file that is scored, spread over it, at most.
        typos: Shares of letters mistyped at which the held-out text is scored as well; each above 0
            and below 1.
        sample_prompt: What the best model continues in the report.
        speed_contexts: Tokens of context at which the dense model and the one with routed heads are
            timed after training, where the run has both; empty leaves it out.
    """

    output: Path = Path("runs/lm")
    vocab_size: int = 4096
    sequence_length: int = 256
    domain_exponent: float = 0.5
    eval_blocks_per_file: int = 64
    typos: tuple[float, ...] = ()
    sample_prompt: str = "def "
    speed_contexts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_at_least(1, "eval_blocks_per_file", self.eval_blocks_per_file)
        check_at_least(2, "sequence_length", self.sequence_length)
        check_at_least(257, "vocab_size", self.vocab_size)  # every byte, and the end of a text
        check_exponent("domain_exponent", self.domain_exponent)
        check_typos("typos", self.typos)
        check_text("sample_prompt", self.sample_prompt)
        for context in self.speed_contexts:
            check_at_least(1, "speed_contexts", context)
            check_memory(8 * context, "the tokens to time", speed_contexts=context)
        embeddings = 4 * self.vocab_size * self.dim
        check_memory(embeddings, "the embeddings", vocab_size=self.vocab_size, dim=self.dim)
        super().__post_init__()
        if (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"num_heads is {self.num_heads}; dim = {self.dim} must be an even multiple of it"
            )

    def least_numbers(self) -> tuple[int, dict[str, object]]:
        """Every layer keeps its input of each token, for the backward pass."""
        numbers, fields = super().least_numbers()
        length = self.sequence_length
        return length * numbers, {"sequence_length": length, **fields}

    def share_of_heads(self, variant: Variant) -> float:
        return (variant.num_heads or self.num_heads) / self.num_heads


def build_model(run: TextRun, variant: Variant, *, vocab_size: int, seed: int) -> PreTrainedModel:
    """The language model of a variant, with the FLOPs per token of the run's `cost_of`.

    Raises:
        ValueError: If no width of the dense MLPs gives that cost.
    """
    width = model_width(run, variant, vocab_size=vocab_size)
    torch.manual_seed(seed)
    return _assemble(run, variant, width, vocab_size, device="cpu")


def model_width(run: TextRun, variant: Variant, *, vocab_size: int) -> int:
    """The width of a variant's dense MLPs. Nothing is built but on the meta device.

    Raises:
        ValueError: If no width gives that cost, or the model cannot be built.
    """

    def flops(variant: Variant, width: int) -> float:
        model = _assemble(run, variant, width, vocab_size)
        return sum(count_flops(model, sequence_length=run.sequence_length).values())

    width = equal_width(run, variant, flops)
    _assemble(run, variant, width, vocab_size)
    return width


def _assemble(
    run: TextRun, variant: Variant, mlp_dim: int, vocab_size: int, *, device: str = "meta"
) -> PreTrainedModel:
    with torch.device(device):
        if variant.head_dims:
            # It comes with its routers; what is left to do is the start.
            dense = replace(variant, attention=None)
            return convert_variant(run, dense, _of_widths(run, variant, mlp_dim, vocab_size))
        return convert_variant(run, variant, _dense(run, variant, mlp_dim, vocab_size))


def _dense(run: TextRun, variant: Variant, mlp_dim: int, vocab_size: int) -> PreTrainedModel:
    heads = variant.num_heads or run.num_heads
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": run.dim,
        "intermediate_size": mlp_dim,
        "num_hidden_layers": run.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": run.dim // run.num_heads,
        "max_position_embeddings": run.sequence_length,
        "initializer_range": run.initial_deviation,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if run.dim % heads:
        # LlamaConfig refuses such heads; without a window Mistral is the same model.
        return MistralForCausalLM(MistralConfig(**sizes, sliding_window=None))
    return LlamaForCausalLM(LlamaConfig(**sizes))


def _of_widths(run: TextRun, variant: Variant, mlp_dim: int, vocab_size: int) -> PreTrainedModel:
    """The model of a variant that says how wide each head is.

    In all models of the comparison positions turn as many channels of a head as the narrowest has.
    """
    routed: dict[str, Any] = {}
    if (moh := variant.attention) is not None:
        routed = {
            "shared_heads": moh.shared,
            "active_heads": moh.active,
            "router": moh.router,
            "mode": moh.mode,
            "scores": moh.scores,
            "router_std": moh.router_std,
            "balance_coefficient": moh.balance_coefficient,
        }
    config = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=run.dim,
        intermediate_size=mlp_dim,
        num_hidden_layers=run.num_layers,
        head_dims=variant.head_dims,
        rotary_dim=min(width for model in run.variants() for width in model.head_dims),
        max_position_embeddings=run.sequence_length,
        initializer_range=run.initial_deviation,
        bos_token_id=0,
        eos_token_id=0,
        **routed,
    )
    return DecoderForCausalLM(config)
