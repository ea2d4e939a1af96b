"""Building the models of a comparison: mixtures of equal cost, and whole models of equal cost."""

from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from headwise.hf import MHMoEConfig, MoEConfig, convert
from headwise.parity import count_flops, match_sparse_moe
from headwise.recipes.comparison import ComparisonRun, Variant


def sparse_moe(run: ComparisonRun, **changes: Any) -> MoEConfig:
    """The run's sparse mixture: experts as wide as the dense model's MLP."""
    fields: dict[str, Any] = {
        "num_experts": run.num_experts,
        "top_k": run.top_k,
        "expert_dim": run.mlp_dim,
        "normalize_top_k": run.top_k > 1,  # of a single choice the weight would always be 1
        "balance_coefficient": run.balance_coefficient,
    }
    return MoEConfig(**fields | changes)


def fine_grained_moe(run: ComparisonRun, **changes: Any) -> MoEConfig:
    """The sparse mixture with twice as many experts of half the width, twice as many of them on."""
    return replace(sparse_moe(run, **changes).fine_grained(2), normalize_top_k=True)


def mh_moe(run: ComparisonRun, *, heads: int, top_k: int, **changes: Any) -> MHMoEConfig:
    """MH-MoE at the FLOPs and parameters of the run's sparse mixture."""
    match = match_sparse_moe(
        run.dim, run.num_experts, run.top_k, run.mlp_dim, heads=heads, top_k_mh=top_k
    )
    fields: dict[str, Any] = {
        "num_heads": heads,
        "num_experts": match.num_experts,
        "top_k": top_k,
        "expert_dim": match.expert_dim,
        "normalize_top_k": top_k > 1,
        "balance_coefficient": run.balance_coefficient,
    }
    return MHMoEConfig(**fields | changes)


def build_model(
    run: ComparisonRun, variant: Variant, *, vocab_size: int, seed: int
) -> PreTrainedModel:
    """The model of a variant, with the FLOPs per token of the run's `cost_of`.

    Routers cost a little, heads that are off save a little: the dense MLPs that are left take up
    the difference, to the next multiple of 8 of their width.

    Raises:
        ValueError: If no width of the dense MLPs gives that cost.
    """
    width = run.mlp_dim
    if (reference := run.cost_of()) is not None:
        target = _flops(run, _assemble(run, reference, width, vocab_size))
        now, wider = (
            _flops(run, _assemble(run, variant, mlp_dim, vocab_size))
            for mlp_dim in (width, width + 8)
        )
        width += 8 * round((target - now) / (wider - now)) if wider > now else 0
        if width < 8:
            raise ValueError(
                f"mlp_dim is {run.mlp_dim}, too small for {variant.name} to cost what "
                f"{reference.name} does"
            )
    torch.manual_seed(seed)
    return _assemble(run, variant, width, vocab_size, device="cpu")


def _assemble(
    run: ComparisonRun, variant: Variant, mlp_dim: int, vocab_size: int, *, device: str = "meta"
) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=run.dim,
        intermediate_size=mlp_dim,
        num_hidden_layers=run.num_layers,
        num_attention_heads=run.num_heads,
        max_position_embeddings=run.sequence_length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
        changes: dict[str, Any] = {
            "attention": variant.attention,
            "mlp": variant.mlp,
            "ternary": variant.ternary,
        }
        return convert(model, every=run.every, **changes) if any(changes.values()) else model


def _flops(run: ComparisonRun, model: PreTrainedModel) -> float:
    return sum(count_flops(model, sequence_length=run.sequence_length).values())
