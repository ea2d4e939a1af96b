"""Masked models of images and text at equal cost: dense, sparse MoE, X-MoE and MH-MoE."""

from dataclasses import dataclass
from pathlib import Path

from headwise.memory import check_memory
from headwise.recipes.arguments import check_at_least
from headwise.recipes.comparison import LayeredRun, Variant
from headwise.recipes.task import Task
from headwise.recipes.variants import first_paper_models


@dataclass(frozen=True, kw_only=True)
class MaskedRun(LayeredRun):
    """Four masked models at equal FLOPs per token: dense, moe, x_moe, mh_moe.

    Images and captions share one transformer, which says what is masked in both.

    **Source**: the third task of MH-MoE's first paper, arXiv 2404.15045, in the manner of BEiT-3,
    arXiv 2208.10442, which masks 40 % of the patches and 50 % of an image's caption.

    Attributes:
        data: Captioned images: None for scikit-learn's digits, a Parquet file, a directory with a
            directory for each class, a dataset's name.
        image_size: Side to which images are cropped and resized; None leaves them.
        patch_size: Side of a patch.
        codebook_size: Visual tokens.
        vocab_size: Most entries of the tokenizer that is trained on the captions.
        text_length: Tokens of a caption that count.
        mask_text: Probability that a token of a caption is masked.
        mask_image: Share of an image's patches that is masked.
        mh_heads: MH-MoE: sub-tokens of a token.
        mh_top_k: MH-MoE: experts that a sub-token goes to.
        eval_pairs: Held-out pairs that count, at most.
        eval_masks: How often each of them is masked and counted at the end.
    """

    output: Path = Path("runs/masked")
    dim: int = 64
    num_heads: int = 4
    mlp_dim: int = 256
    image_size: int | None = None
    patch_size: int = 2
    codebook_size: int = 64
    vocab_size: int = 1024
    text_length: int = 16
    mask_text: float = 0.5
    mask_image: float = 0.4
    mh_heads: int = 2
    mh_top_k: int = 2
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.05
    eval_pairs: int = 500
    eval_masks: int = 4
    log_every: int = 20
    eval_every: int = 200
    save_every: int = 200

    def __post_init__(self) -> None:
        for name in ("patch_size", "text_length", "eval_pairs", "eval_masks"):
            check_at_least(1, name, getattr(self, name))
        if self.image_size is not None:
            check_at_least(1, "image_size", self.image_size)
        check_at_least(258, "vocab_size", self.vocab_size)  # every byte, padding and mask
        for name in ("mask_text", "mask_image"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        check_memory(8 * self.text_length, "the tokens", text_length=self.text_length)
        masks = 8 * self.eval_masks * self.eval_pairs
        sizes = {"eval_masks": self.eval_masks, "eval_pairs": self.eval_pairs}
        check_memory(masks, "the order of the held-out pairs", **sizes)
        super().__post_init__()

    @property
    def recipe(self) -> str:
        return "masked"

    @property
    def title(self) -> str:
        return "Masked models of images and captions at equal FLOPs per token"

    def variants(self) -> list[Variant]:
        """Dense first; experts are of ViT's kind, two matrices with GELU."""
        return first_paper_models(
            self, heads=self.mh_heads, top_k=self.mh_top_k, glu=False, activation="gelu"
        )

    def read(self) -> Task:
        # Not above: help on a recipe's fields shall not wait for what reads images.
        from headwise.recipes.masked_task import read_pairs

        return read_pairs(self)


def masked() -> MaskedRun:
    """Four small masked models of handwritten digits and their captions."""
    return MaskedRun()
