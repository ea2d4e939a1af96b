"""Building the models of a comparison: mixtures of equal cost, and whole models of equal cost."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from headwise.hf import MHMoEConfig, MoEConfig, convert
from headwise.parity import count_flops, match_sparse_moe
from headwise.recipes.comparison import LayeredRun, TextRun, Variant


def sparse_moe(run: LayeredRun, **changes: Any) -> MoEConfig:
    """The run's sparse mixture: experts as wide as the dense model's MLP."""
    fields: dict[str, Any] = {
        "num_experts": run.num_experts,
        "top_k": run.top_k,
        "expert_dim": run.mlp_dim,
        "normalize_top_k": run.top_k > 1,  # of a single choice the weight would always be 1
        "balance_coefficient": run.balance_coefficient,
    }
    return MoEConfig(**fields | changes)


def fine_grained_moe(run: LayeredRun, **changes: Any) -> MoEConfig:
    """The sparse mixture with twice as many experts of half the width, twice as many of them on."""
    return replace(sparse_moe(run, **changes).fine_grained(2), normalize_top_k=True)


def mh_moe(run: LayeredRun, *, heads: int, top_k: int, **changes: Any) -> MHMoEConfig:
    """MH-MoE at the FLOPs and parameters of the run's sparse mixture."""
    match = match_sparse_moe(
        run.dim,
        run.num_experts,
        run.top_k,
        run.mlp_dim,
        heads=heads,
        top_k_mh=top_k,
        glu=changes.get("glu", True),
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


def first_paper_models(run: LayeredRun, *, heads: int, top_k: int, **shape: Any) -> list[Variant]:
    """What MH-MoE's first paper compares, arXiv 2404.15045: dense, a sparse MoE, X-MoE and MH-MoE.

    **Deviates**: the paper's MH-MoE costs about four times X-MoE's FLOPs; here all cost the same,
    and MH-MoE is that of the second paper, with a linear router.

    Args:
        run: The comparison.
        heads: Sub-tokens of a token of MH-MoE.
        top_k: Experts that a sub-token goes to.
        shape: Of all experts: glu, activation.
    """
    return [
        Variant(name="dense", label="dense"),
        Variant(name="moe", label="sparse MoE", mlp=sparse_moe(run, **shape)),
        Variant(name="x_moe", label="X-MoE", mlp=sparse_moe(run, router="cosine", **shape)),
        Variant(name="mh_moe", label="MH-MoE", mlp=mh_moe(run, heads=heads, top_k=top_k, **shape)),
    ]


def equal_width(run: LayeredRun, variant: Variant, flops: Callable[[Variant, int], float]) -> int:
    """The width of the dense MLPs with which a variant costs what the run's `cost_of` does.

    Routers cost a little, heads that are off save a little: the dense MLPs that are left take up
    the difference, to the next multiple of 8 of their width.

    Args:
        run: The comparison.
        variant: One of its models.
        flops: Of a model, by variant and width of its dense MLPs.

    Raises:
        ValueError: If there is no such width.
    """
    width, reference = run.mlp_dim, run.cost_of()
    if reference is None:
        return width
    target = flops(reference, width)
    now, wider = flops(variant, width), flops(variant, width + 8)
    if wider == now and abs(now / target - 1) > _AS_GOOD_AS_EQUAL:
        raise ValueError(
            f"every is {run.every}, which leaves no dense MLP in {variant.name} to make up for "
            f"what its routers cost and its heads save; it must be at least 2"
        )
    width += 8 * round((target - now) / (wider - now)) if wider > now else 0
    if width < 8:
        raise ValueError(
            f"mlp_dim is {run.mlp_dim}, too small for {variant.name} to cost what "
            f"{reference.name} does"
        )
    return width


# Of a comparison at equal cost.
_AS_GOOD_AS_EQUAL = 0.005


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
        return model_flops(run, _assemble(run, variant, width, vocab_size))

    width = equal_width(run, variant, flops)
    _assemble(run, variant, width, vocab_size)
    return width


def model_flops(run: TextRun, model: PreTrainedModel) -> float:
    """Of a forward, per token, by formula."""
    return sum(count_flops(model, sequence_length=run.sequence_length).values())


def _assemble(
    run: TextRun, variant: Variant, mlp_dim: int, vocab_size: int, *, device: str = "meta"
) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=run.dim,
        intermediate_size=mlp_dim,
        num_hidden_layers=run.num_layers,
        num_attention_heads=run.num_heads,
        max_position_embeddings=run.sequence_length,
        initializer_range=run.initial_deviation,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device(device):
        return convert_variant(run, variant, LlamaForCausalLM(config))


def convert_variant(run: LayeredRun, variant: Variant, model: Any) -> Any:
    """The dense model, made what the variant says."""
    changes: dict[str, Any] = {
        "attention": variant.attention,
        "mlp": variant.mlp,
        "ternary": variant.ternary,
    }
    return convert(model, every=run.every, **changes) if any(changes.values()) else model
