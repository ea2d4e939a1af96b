"""Images as patches, and patches as entries of a codebook: visual tokens."""

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

_MOST_PATCHES = 1 << 15


def in_floats(pixels: NDArray[np.uint8]) -> Tensor:
    """0..255 → -1..1."""
    return torch.from_numpy(pixels).float() / 127.5 - 1


def patches_of(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] → [B, P, C·patch_size²]: squares, row by row."""
    return rearrange(images, "b c (i p) (j q) -> b (i j) (c p q)", p=patch_size, q=patch_size)


def fit_codebook(patches: NDArray[np.float32], size: int, *, seed: int) -> NDArray[np.float32]:
    """The centres of scikit-learn's k-means: [N, patch] → [size, patch], the same for a seed.

    It sees 32,768 of the patches at most, drawn by the seed.

    Raises:
        ValueError: If scikit-learn is missing, or there are fewer different patches than entries.
    """
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise ValueError(
            "a codebook needs scikit-learn, which is not installed; the extra vision has it: "
            "`pip install 'headwise[vision]'`"
        ) from None
    drawn = np.random.default_rng(seed).permutation(len(patches))[:_MOST_PATCHES]
    different = len(np.unique(patches[drawn], axis=0))
    if not 2 <= size <= different:
        raise ValueError(
            f"codebook_size is {size}; it must lie in 2..{different}, as many different patches as "
            "there are"
        )
    # Several threads add up in the order in which they come.
    with threadpool_limits(1):
        means = KMeans(size, n_init=1, random_state=seed).fit(patches[drawn].astype(np.float64))
    return means.cluster_centers_.astype(np.float32)


def visual_tokens(patches: Tensor, codebook: Tensor) -> Tensor:
    """The nearest entry for each patch, ties to the lowest index: [..., patch] → [...]."""
    # |p - c|² without |p|², which is the same for all entries.
    distances = codebook.square().sum(-1) - 2 * patches @ codebook.T
    return distances.argmin(-1)
