"""Masked models of images and text at equal cost: dense, sparse MoE, X-MoE and MH-MoE."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from headwise.data.images import halve_images, load_images
from headwise.data.masked_pairs import IGNORED, CaptionedPatches, MaskedPairs
from headwise.data.patches import fit_codebook, in_floats, patches_of, visual_tokens
from headwise.data.sampling import draw, spread
from headwise.data.text import END_OF_TEXT, Domain, train_tokenizer
from headwise.hf import record_routing
from headwise.memory import check_memory
from headwise.models import MaskedConfig, MaskedModel
from headwise.models.masked import summed_nats
from headwise.ops import Routing
from headwise.parity import count_flops
from headwise.recipes.layered import (
    LayeredRun,
    convert_variant,
    equal_width,
    first_paper_models,
)
from headwise.training.comparison import Examples, Scores, Task, Variant
from headwise.training.directory import fingerprint
from headwise.training.evaluation import RoutingStatistics
from headwise.training.fields import check_at_least, check_batch_size

_MASK = "<|mask|>"
_EVALUATION_SEED = 0  # of the masks: the same for all models and seeds
_CODEBOOK_SEED = 0
_IMAGES_AT_A_TIME = 1024


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
        eval_pairs: Pairs that are scored, at most, of half of those held out; of the other half as
            many are for the validation curve.
        eval_masks: How often each of them is masked and counted.
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
        embeddings = 4 * self.vocab_size * self.dim
        check_memory(embeddings, "the embeddings", vocab_size=self.vocab_size, dim=self.dim)
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

    def least_numbers(self) -> tuple[int, dict[str, object]]:
        """Of an image one channel at least."""
        numbers, fields = super().least_numbers()
        if (side := self.image_size or 1) == 1:
            return numbers, fields
        return max(numbers, side**2), {**fields, "image_size": side}


def read(run: MaskedRun) -> "MaskedTask":
    """Load the images, and train tokenizer and codebook on those to train on.

    Raises:
        ValueError: If the data cannot be used, or patch_size or codebook_size does not fit them.
    """
    training, held_out = load_images(run.data, image_size=run.image_size)
    # Spread over the held-out images, which may come class by class.
    halves = (x.take(spread(len(x), run.eval_pairs).tolist()) for x in halve_images(held_out))
    parts = (training, *halves)
    size = training.pixels.shape[-1]
    if size % run.patch_size:
        raise ValueError(f"patch_size is {run.patch_size}; it must divide the image size, {size}")
    check_batch_size(run.batch_size, len(training))
    PartialState().print(
        "Training a tokenizer on the captions, a codebook on the patches", flush=True
    )
    captions = {str(i): caption for i, caption in enumerate(training.captions)}
    # The mask token is one more entry.
    bpe = train_tokenizer([Domain("captions", captions, {})], vocab_size=run.vocab_size - 1)
    tokens = [[bpe.encode(caption).ids for caption in s.captions] for s in parts]
    text_length = min(run.text_length, max(map(len, tokens[0])))
    patches = patches_of(in_floats(training.pixels), run.patch_size).flatten(0, 1).numpy()
    codebook = fit_codebook(patches, run.codebook_size, seed=_CODEBOOK_SEED)
    return MaskedTask(
        run,
        PreTrainedTokenizerFast(
            tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, mask_token=_MASK
        ),
        torch.from_numpy(codebook),
        *(
            CaptionedPatches(
                images.pixels,
                ids,
                _visual(images.pixels, run.patch_size, torch.from_numpy(codebook)),
                text_length=text_length,
            )
            for images, ids in zip(parts, tokens, strict=True)
        ),
    )


@dataclass(frozen=True)
class MaskedTask(Task):
    """Images and captions, as patches and tokens.

    Attributes:
        run: Whose data they are.
        tokenizer: Of the captions; its last entry is the mask token.
        codebook: The patches that visual tokens stand for, [codebook, patch].
        training: Images and captions.
        validation: Of half of those held out, to choose models by.
        test: Of the other half, which is scored.
    """

    run: MaskedRun
    tokenizer: PreTrainedTokenizerFast
    codebook: Tensor
    training: CaptionedPatches
    validation: CaptionedPatches
    test: CaptionedPatches

    @property
    def processor(self) -> PreTrainedTokenizerFast:
        return self.tokenizer

    @property
    def length(self) -> int:
        return self.training.visual.shape[1] + self.training.tokens.shape[1]

    def fingerprint(self) -> dict[str, str]:
        parts = {"training": self.training, "validation": self.validation, "test": self.test}
        return fingerprint({
            name: [part.pixels, part.tokens, part.lengths, part.visual]
            for name, part in parts.items()
        })  # fmt: skip

    def check(self) -> None:
        for variant in self.run.selected():
            self._assemble(variant, self._width(variant), "meta")
        for half in (self.validation, self.test):
            pairs, patches = self._held_out(half), half.visual.shape[1]
            labels = (pairs[i]["labels"][patches:] for i in range(len(pairs)))
            if all((row == IGNORED).all() for row in labels):
                raise ValueError(
                    f"mask_text is {self.run.mask_text}, with which no token of the {len(half)} "
                    f"captions of half of what is held out is masked in {self.run.eval_masks} "
                    "tries; it or eval_masks must be more"
                )

    def model(self, variant: Variant, seed: int) -> MaskedModel:
        """With the dense model's FLOPs per token, and the codebook in its buffer."""
        torch.manual_seed(seed)
        model = self._assemble(variant, self._width(variant), "cpu")
        model.codebook.copy_(self.codebook)
        return model

    def _width(self, variant: Variant) -> int:
        def flops(variant: Variant, width: int) -> float:
            return self.flops(self._assemble(variant, width, "meta"))

        return equal_width(self.run, variant, flops)

    def _assemble(self, variant: Variant, mlp_dim: int, device: str) -> MaskedModel:
        run, (_, channels, size, _) = self.run, self.training.pixels.shape
        config = MaskedConfig(
            hidden_size=run.dim,
            num_hidden_layers=run.num_layers,
            num_attention_heads=run.num_heads,
            intermediate_size=mlp_dim,
            patch_size=run.patch_size,
            codebook_size=run.codebook_size,
            image_size=size,
            num_channels=channels,
            vocab_size=len(self.tokenizer),
            max_text_length=self.training.tokens.shape[1],
            initializer_range=run.initial_deviation,
        )
        with torch.device(device):
            return convert_variant(run, variant, MaskedModel(config))

    def flops_by_module(self, model: MaskedModel) -> dict[str, float]:
        """What only patches or only tokens pass is counted with their share of the sequence."""
        patches = model.config.num_patches / self.length
        shares = {"patches": patches, "image_head": patches, "text_head": 1 - patches}
        flops = count_flops(model, sequence_length=self.length, causal=False)
        return {name: cost * shares.get(name, 1) for name, cost in flops.items()}

    def example(self, model: MaskedModel) -> dict[str, Tensor]:
        return {name: x[None].to(model.device) for name, x in self._held_out(self.test)[0].items()}

    def datasets(self, variant: Variant, seed: int) -> tuple[Examples, Examples]:
        """Pairs to train on; every pair to validate on `eval_masks` times, masked alike always."""
        generator = np.random.default_rng(seed)
        order = draw(len(self.training), self.run.steps * self.run.batch_size, generator)
        return self._masked(self.training, order, seed), self._held_out(self.validation)

    def _held_out(self, half: CaptionedPatches) -> MaskedPairs:
        order = np.tile(np.arange(len(half)), self.run.eval_masks)
        return self._masked(half, order, _EVALUATION_SEED)

    def _masked(self, pairs: CaptionedPatches, order: NDArray[np.int64], seed: int) -> MaskedPairs:
        return MaskedPairs(
            pairs,
            order,
            mask_token=self.tokenizer.mask_token_id,
            mask_text=self.run.mask_text,
            mask_image=self.run.mask_image,
            seed=seed,
        )

    @torch.no_grad()
    def score(self, model: Any) -> Scores:
        """Perplexity of masked text tokens and of masked patches, over all pairs of the test half.

        What experts do is counted for tokens and for patches apart.
        """
        model.eval()
        patches = model.config.num_patches
        statistics = RoutingStatistics(model)
        nats = {name: torch.zeros(2, dtype=torch.float64) for name in ("text", "patches")}
        with record_routing(model) as routings:
            for batch in DataLoader(self._held_out(self.test), batch_size=self.run.batch_size):
                batch = {name: x.to(model.device) for name, x in batch.items()}
                labels = batch.pop("labels")
                output = model(**batch)
                image, text = labels.tensor_split([patches], dim=1)
                is_image = torch.arange(labels.shape[1], device=model.device) < patches
                for name, logits, wanted, part in (
                    ("text", output.text_logits, text, ~is_image),
                    ("patches", output.image_logits, image, is_image),
                ):
                    nats[name] += torch.stack(summed_nats(logits, wanted)).cpu()
                    statistics.add(name, {n: _only(r, part) for n, r in routings.items()})
        columns = {f"perplexity_{name}": (x[0] / x[1]).exp().item() for name, x in nats.items()}
        columns["scored_pairs"] = len(self.test)
        return Scores(columns, statistics.head_loads(), statistics.expert_loads(), texts=[])

    def facts(self) -> dict[str, str]:
        tokens = self.test.tokens
        real = tokens[np.arange(tokens.shape[1]) < self.test.lengths[:, None]]
        guesses = (_of_the_best_guess(x) for x in (real, self.test.visual))
        return {
            "Images": self.run.data or "scikit-learn's handwritten digits",
            "Pairs": f"{len(self.training)} to train on; held out: {len(self.validation)} for the "
            f"validation curve, {len(self.test)} for the scores",
            "Perplexity of guesses by frequency": "text {:.1f}, patches {:.1f}".format(*guesses),
        }


def _only(routing: Routing, part: Tensor) -> Routing:
    """The routing with all positions [T] off that are not of the part."""
    mask = part.reshape(1, -1, *[1] * (routing.indices.ndim - 3))
    return routing.with_mask(mask if routing.mask is None else mask & routing.mask)


def _of_the_best_guess(tokens: NDArray[np.int64]) -> float:
    _, counts = np.unique(tokens, return_counts=True)
    shares = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _visual(pixels: NDArray[np.uint8], patch_size: int, codebook: Tensor) -> NDArray[np.int64]:
    chunks = np.array_split(pixels, -(-len(pixels) // _IMAGES_AT_A_TIME))
    tokens = [visual_tokens(patches_of(in_floats(x), patch_size), codebook) for x in chunks]
    return torch.cat(tokens).numpy()
