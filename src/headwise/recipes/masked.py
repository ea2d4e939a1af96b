"""Masked models of images and text at equal cost: dense, sparse MoE, X-MoE and MH-MoE."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from headwise.hf import MHMoEConfig, MoEConfig, convert
from headwise.models import MaskedConfig, MaskedModel
from headwise.ops.choice import check_choice
from headwise.parity import count_flops, match_sparse_moe

MaskedName = Literal["dense", "moe", "x_moe", "mh_moe"]

LABELS: dict[str, str] = {
    "dense": "dense",
    "moe": "sparse MoE",
    "x_moe": "X-MoE",
    "mh_moe": "MH-MoE",
}


@dataclass(frozen=True, kw_only=True)
class MaskedRun:
    """A complete run of masked modelling: images and captions share one transformer.

    **Source**: the third task of MH-MoE's first paper, arXiv 2404.15045, in the manner of BEiT-3,
    arXiv 2208.10442, which masks 40 % of the patches and of text 15 %, of an image's caption 50 %.

    Attributes:
        output: Directory of the run.
        data: Captioned images: None for scikit-learn's digits, a Parquet file, a directory with a
            directory for each class, a dataset's name.
        models: Which models to train, at equal FLOPs per token.
        seeds: Each model is trained once with each.
        dim: Width of the models.
        num_layers: Layers.
        num_heads: Attention heads of a layer.
        mlp_dim: Hidden width of the dense model's MLPs, and of a sparse MoE's experts.
        image_size: Side to which images are cropped and resized; None leaves them.
        patch_size: Side of a patch.
        codebook_size: Visual tokens.
        vocab_size: Most entries of the tokenizer that is trained on the captions.
        text_length: Tokens of a caption that count.
        mask_text: Probability that a token of a caption is masked.
        mask_image: Share of an image's patches that is masked.
        num_experts: Experts of the sparse MoE; MH-MoE's number follows from equal parameters.
        top_k: Experts that a token of the sparse MoE goes to.
        mh_heads: MH-MoE: sub-tokens of a token.
        mh_top_k: MH-MoE: experts that a sub-token goes to.
        every: Experts replace the MLP of every `every`-th layer.
        balance_coefficient: Factor of the balance losses.
        steps: Optimizer steps.
        batch_size: Pairs of a step, over all processes.
        learning_rate: Peak, reached after warmup_steps, cosine to a tenth of it.
        warmup_steps: Steps of linear warmup.
        weight_decay: Of AdamW.
        precision: "fp32", or "bf16" for autocast.
        eval_pairs: Held-out pairs that count, at most.
        eval_masks: How often each of them is masked and counted at the end.
        log_every: Steps between two points of the training curve.
        eval_every: Steps between two points of the validation curve.
        save_every: Steps between two checkpoints.
        report_to: Trackers of transformers' Trainer: tensorboard, trackio, wandb, …
        resume: Go on with the run in `output`.
        overwrite: Delete the run in `output` and start anew.
    """

    output: Path = Path("runs/masked")
    data: str | None = None
    models: tuple[MaskedName, ...] = get_args(MaskedName)
    seeds: tuple[int, ...] = (0,)
    dim: int = 64
    num_layers: int = 4
    num_heads: int = 4
    mlp_dim: int = 256
    image_size: int | None = None
    patch_size: int = 2
    codebook_size: int = 64
    vocab_size: int = 1024
    text_length: int = 16
    mask_text: float = 0.15
    mask_image: float = 0.4
    num_experts: int = 8
    top_k: int = 1
    mh_heads: int = 2
    mh_top_k: int = 2
    every: int = 2
    balance_coefficient: float = 0.01
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.05
    precision: Literal["fp32", "bf16"] = "fp32"
    eval_pairs: int = 500
    eval_masks: int = 4
    log_every: int = 20
    eval_every: int = 200
    save_every: int = 200
    report_to: tuple[str, ...] = field(default=())
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("models", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is {values}; it takes one entry or more, each once")
        for name in _COUNTS:
            _check_at_least(1, name, getattr(self, name))
        _check_at_least(258, "vocab_size", self.vocab_size)  # every byte, padding and mask
        _check_at_least(0, "warmup_steps", self.warmup_steps)
        for name in ("mask_text", "mask_image"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide dim = {self.dim}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be at least 0")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite are both set; choose one")
        check_choice("precision", self.precision, Literal["fp32", "bf16"])
        for model in self.models:
            check_choice("models", model, MaskedName)
            self.mixture(model)

    def mixture(self, name: str) -> MoEConfig | None:
        """What convert puts for MLPs of that model: ViT's kind, of equal FLOPs and parameters."""
        if name == "dense":
            return None
        shape: dict[str, Any] = {"glu": False, "activation": "gelu"}
        if name in ("moe", "x_moe"):
            return MoEConfig(
                num_experts=self.num_experts,
                top_k=self.top_k,
                expert_dim=self.mlp_dim,
                router="cosine" if name == "x_moe" else "linear",
                normalize_top_k=self.top_k > 1,  # of a single choice the weight would always be 1
                balance_coefficient=self.balance_coefficient,
                **shape,
            )
        match = match_sparse_moe(
            self.dim,
            self.num_experts,
            self.top_k,
            self.mlp_dim,
            heads=self.mh_heads,
            top_k_mh=self.mh_top_k,
            glu=False,
        )
        return MHMoEConfig(
            num_heads=self.mh_heads,
            num_experts=match.num_experts,
            top_k=self.mh_top_k,
            expert_dim=match.expert_dim,
            normalize_top_k=self.mh_top_k > 1,
            balance_coefficient=self.balance_coefficient,
            **shape,
        )


_COUNTS = (
    "dim", "num_layers", "num_heads", "mlp_dim", "patch_size", "text_length", "num_experts",
    "mh_heads", "every", "steps", "batch_size", "eval_pairs", "eval_masks", "log_every",
    "eval_every", "save_every",
)  # fmt: skip


def masked() -> MaskedRun:
    """Four small masked models of handwritten digits and their captions."""
    return MaskedRun()


def build_model(
    run: MaskedRun, name: str, *, sizes: dict[str, int], codebook: Tensor, seed: int
) -> MaskedModel:
    """The model of that name, with the dense model's FLOPs per token.

    Routers cost a little: the dense MLPs that are left take up the difference, to the next multiple
    of 8 of their width.

    Args:
        run: Sizes of the transformer.
        name: Which model.
        sizes: What the data say of a MaskedConfig: image_size, num_channels, vocab_size,
            max_text_length.
        codebook: Patches that the visual tokens stand for.
        seed: Of the weights.

    Raises:
        ValueError: If no width makes the model cost what the dense one does.
    """
    widths = (run.mlp_dim, run.mlp_dim + 8)
    target = flops_per_token(_assemble(run, "dense", run.mlp_dim, sizes))
    narrow, wide = (flops_per_token(_assemble(run, name, width, sizes)) for width in widths)
    missing = target - narrow
    width = run.mlp_dim + (8 * round(missing / (wide - narrow)) if wide > narrow else 0)
    if width < 8:
        raise ValueError(f"mlp_dim is {run.mlp_dim}, too small for {name} to cost what dense does")
    torch.manual_seed(seed)
    model = _assemble(run, name, width, sizes, device="cpu")
    model.codebook.copy_(codebook)
    return model


def flops_per_token(model: MaskedModel) -> float:
    """Of a forward on an image and the longest text, by formula, heads that are off left out.

    What only patches or only tokens pass is counted with their share of the sequence.
    """
    patches, tokens = model.config.num_patches, model.config.max_text_length
    length = patches + tokens
    shares = {
        "patches": patches / length,
        "image_head": patches / length,
        "text_head": tokens / length,
    }
    flops = count_flops(model, sequence_length=length, causal=False)
    return sum(cost * shares.get(name, 1) for name, cost in flops.items())


def _assemble(
    run: MaskedRun, name: str, mlp_dim: int, sizes: dict[str, int], *, device: str = "meta"
) -> MaskedModel:
    config = MaskedConfig(
        hidden_size=run.dim,
        num_hidden_layers=run.num_layers,
        num_attention_heads=run.num_heads,
        intermediate_size=mlp_dim,
        patch_size=run.patch_size,
        codebook_size=run.codebook_size,
        **sizes,
    )
    mixture = run.mixture(name)
    with torch.device(device):
        model = MaskedModel(config)
        return model if mixture is None else convert(model, mlp=mixture, every=run.every)


def _check_at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
