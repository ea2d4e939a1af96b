"""Images and captions with parts masked, to train and to evaluate masked models."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from headwise.data.patches import in_floats

IGNORED = -100  # the label of what is not masked


class CaptionedPatches:
    """Images with what a model is to say of them: captions as tokens, patches as visual tokens.

    Attributes:
        pixels: [N, channels, size, size], uint8.
        tokens: [N, T], padded on the right.
        lengths: Tokens of each caption, [N].
        visual: Visual tokens, [N, P].
    """

    def __init__(
        self,
        pixels: NDArray[np.uint8],
        captions: Sequence[Sequence[int]],
        visual: NDArray[np.int64],
        *,
        text_length: int,
    ):
        self.pixels, self.visual = pixels, visual
        self.tokens = np.zeros((len(captions), text_length), dtype=np.int64)
        self.lengths = np.array([min(len(ids), text_length) for ids in captions])
        for row, ids in zip(self.tokens, captions, strict=True):
            kept = ids[:text_length]
            row[: len(kept)] = kept

    def __len__(self) -> int:
        return len(self.pixels)


class MaskedPairs(Dataset[dict[str, Tensor]]):
    """What `MaskedModel` takes: item i shows pair `order[i]`, masked by (seed, i) alone.

    A share `mask_image` of an image's patches is masked, drawn anew each time, and each token of
    its caption with probability `mask_text`.

    **Source**: BEiT-3, arXiv 2208.10442, section 2.2 (40 % of the patches). **Deviates**: patches
    are drawn one by one, not in blocks.

    Args:
        pairs: Images and captions.
        order: Which pair an item shows.
        mask_token: Stands for masked text.
        mask_text: Probability, 0..1.
        mask_image: Share, 0..1, rounded to whole patches.
        seed: Of the masks.

    Raises:
        ValueError: If no patch is masked, or all are.
    """

    def __init__(
        self,
        pairs: CaptionedPatches,
        order: NDArray[np.int64],
        *,
        mask_token: int,
        mask_text: float,
        mask_image: float,
        seed: int,
    ):
        self.pairs, self.order, self.mask_token, self.seed = pairs, order, mask_token, seed
        self.mask_text = mask_text
        patches = pairs.visual.shape[1]
        self.masked_patches = round(mask_image * patches)
        if not 0 < self.masked_patches < patches:
            raise ValueError(
                f"mask_image is {mask_image}; of {patches} patches it must mask at least one and "
                "leave one"
            )

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = np.random.default_rng([self.seed, index])
        pair = self.order[index]
        tokens, visual = self.pairs.tokens[pair], self.pairs.visual[pair]
        real = np.arange(len(tokens)) < self.pairs.lengths[pair]
        masked_text = real & (generator.random(len(tokens)) < self.mask_text)
        masked_patches = np.zeros(len(visual), dtype=bool)
        masked_patches[generator.permutation(len(visual))[: self.masked_patches]] = True
        image_labels = np.where(masked_patches, visual, IGNORED)
        text_labels = np.where(masked_text, tokens, IGNORED)
        return {
            "pixel_values": in_floats(self.pairs.pixels[pair]),
            "input_ids": torch.from_numpy(np.where(masked_text, self.mask_token, tokens)),
            "masked_patches": torch.from_numpy(masked_patches),
            "attention_mask": torch.from_numpy(np.r_[np.ones_like(visual), real]),
            "labels": torch.from_numpy(np.r_[image_labels, text_labels]),
        }
