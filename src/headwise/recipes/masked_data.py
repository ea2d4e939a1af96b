"""Captioned images made ready for a masked run: words as tokens, patches as visual tokens."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from headwise.data.images import load_images
from headwise.data.masked_pairs import CaptionedPatches, MaskedPairs
from headwise.data.patches import fit_codebook, in_floats, patches_of, visual_tokens
from headwise.data.text import END_OF_TEXT, Domain, draw, train_tokenizer
from headwise.recipes.masked import MaskedRun

_MASK = "<|mask|>"
_EVALUATION_SEED = 0  # of the masks: the same for all models and seeds
_CODEBOOK_SEED = 0
_IMAGES_AT_A_TIME = 1024


class Pairs(NamedTuple):
    """All that the models of a run learn from and are measured by.

    Attributes:
        tokenizer: Of the captions; its last entry is the mask token.
        codebook: The patches that visual tokens stand for, [codebook, patch].
        training, validation: Images and captions.
    """

    tokenizer: PreTrainedTokenizerFast
    codebook: Tensor
    training: CaptionedPatches
    validation: CaptionedPatches

    def sizes(self) -> dict[str, int]:
        """What the data say of a `MaskedConfig`."""
        _, channels, size, _ = self.training.pixels.shape
        return {
            "image_size": size,
            "num_channels": channels,
            "vocab_size": len(self.tokenizer),
            "max_text_length": self.training.tokens.shape[1],
        }


def prepare(run: MaskedRun) -> Pairs:
    """Load the images, and train tokenizer and codebook on those to train on.

    Raises:
        ValueError: If the data cannot be used, or patch_size or codebook_size does not fit them.
    """
    training, validation = load_images(run.data, image_size=run.image_size)
    validation = validation.take(range(min(run.eval_pairs, len(validation))))
    size = training.pixels.shape[-1]
    if size % run.patch_size:
        raise ValueError(f"patch_size is {run.patch_size}; it must divide the image size, {size}")
    captions = {str(i): caption for i, caption in enumerate(training.captions)}
    # The mask token is one more entry.
    bpe = train_tokenizer([Domain("captions", captions, {})], vocab_size=run.vocab_size - 1)
    tokens = [[bpe.encode(caption).ids for caption in s.captions] for s in (training, validation)]
    text_length = min(run.text_length, max(map(len, tokens[0])))
    patches = patches_of(in_floats(training.pixels), run.patch_size).flatten(0, 1).numpy()
    codebook = fit_codebook(patches, run.codebook_size, seed=_CODEBOOK_SEED)
    return Pairs(
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
            for images, ids in zip((training, validation), tokens, strict=True)
        ),
    )


def masked_pairs(run: MaskedRun, pairs: Pairs, seed: int) -> tuple[MaskedPairs, MaskedPairs]:
    """What to train on, and every held-out pair `eval_masks` times, masked alike for all models."""
    order = draw(len(pairs.training), run.steps * run.batch_size, np.random.default_rng(seed))
    held_out = np.tile(np.arange(len(pairs.validation)), run.eval_masks)
    training, validation = (
        MaskedPairs(
            part,
            indices,
            mask_token=pairs.tokenizer.mask_token_id,
            mask_text=run.mask_text,
            mask_image=run.mask_image,
            seed=mask_seed,
        )
        for part, indices, mask_seed in (
            (pairs.training, order, seed),
            (pairs.validation, held_out, _EVALUATION_SEED),
        )
    )
    return training, validation


def _visual(pixels: NDArray[np.uint8], patch_size: int, codebook: Tensor) -> NDArray[np.int64]:
    chunks = np.array_split(pixels, -(-len(pixels) // _IMAGES_AT_A_TIME))
    tokens = [visual_tokens(patches_of(in_floats(x), patch_size), codebook) for x in chunks]
    return torch.cat(tokens).numpy()
