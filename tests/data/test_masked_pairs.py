"""Visual tokens worked by hand, and what is masked of pairs of images and captions."""

import numpy as np
import pytest
import torch

from headwise.data.masked_pairs import IGNORED, CaptionedPatches, MaskedPairs
from headwise.data.patches import fit_codebook, visual_tokens

N, P, T, MASK = 7, 10, 5, 99


def test_codebook_finds_the_centres():
    centres = np.array([[0, 0], [0, 9], [9, 0]], dtype=np.float32)
    noise = np.random.default_rng(0).normal(0, 0.1, (3, 101, 2)).astype(np.float32)
    patches = (centres[:, None] + noise).reshape(-1, 2)
    codebook = fit_codebook(patches, 3, seed=0)
    assert codebook.dtype == np.float32
    order = visual_tokens(torch.from_numpy(centres), torch.from_numpy(codebook)).numpy()
    np.testing.assert_allclose(codebook[order], (centres[:, None] + noise).mean(1), atol=1e-5)
    assert np.array_equal(fit_codebook(patches, 3, seed=0), codebook)


def test_visual_tokens_are_the_nearest_entries():
    codebook = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    patches = torch.tensor([[[1.0, 1.0], [3.0, 1.0]], [[2.0, 0.0], [1.0, 9.0]]])
    # (2, 0) is as far from entry 0 as from entry 1: the lower index.
    assert visual_tokens(patches, codebook).tolist() == [[0, 1], [0, 2]]


@pytest.mark.parametrize("size", [1, 4])
def test_codebook_needs_as_many_different_patches(size):
    patches = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0)
    with pytest.raises(ValueError, match=rf"codebook_size is {size}; it must lie in 2\.\.3"):
        fit_codebook(patches, size, seed=0)


def test_codebook_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(ValueError, match=r"pip install 'headwise\[vision\]'"):
        fit_codebook(np.eye(3, dtype=np.float32), 2, seed=0)


@pytest.fixture
def pairs() -> CaptionedPatches:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (N, 1, 2, 5), dtype=np.uint8)
    captions = [list(range(i + 1)) for i in range(N)]  # the last two are longer than T
    return CaptionedPatches(pixels, captions, generator.integers(0, 50, (N, P)), text_length=T)


def masked(pairs, *, seed=3, count=500, mask_text=0.15, mask_image=0.4) -> MaskedPairs:
    order = np.arange(count) % N
    return MaskedPairs(
        pairs, order, mask_token=MASK, mask_text=mask_text, mask_image=mask_image, seed=seed
    )


def test_captions_are_cut_and_padded(pairs):
    assert pairs.lengths.tolist() == [1, 2, 3, 4, 5, 5, 5]
    assert pairs.tokens[1].tolist() == [0, 1, 0, 0, 0]
    assert pairs.tokens[6].tolist() == [0, 1, 2, 3, 4]


def test_labels_are_what_is_masked_and_nothing_else(pairs):
    for i, item in enumerate(masked(pairs)):
        pair = i % N
        image_labels, text_labels = item["labels"].split([P, T])
        hidden, text_hidden = item["masked_patches"], item["input_ids"] == MASK
        assert hidden.sum() == 4
        assert torch.equal(image_labels != IGNORED, hidden)
        assert torch.equal(image_labels[hidden], torch.from_numpy(pairs.visual[pair])[hidden])
        tokens = torch.from_numpy(pairs.tokens[pair])
        assert torch.equal(torch.where(text_hidden, text_labels, item["input_ids"]), tokens)
        assert (text_labels[~text_hidden] == IGNORED).all()
        length = pairs.lengths[pair]
        assert item["attention_mask"].tolist() == [1] * (P + length) + [0] * (T - length)
        assert not text_hidden[length:].any()
        assert item["pixel_values"].min() >= -1
        assert item["pixel_values"].max() <= 1


def test_shares_are_as_asked(pairs):
    items = list(masked(pairs, count=2100))
    hidden = torch.stack([item["masked_patches"] for item in items]).double().mean(0)
    assert hidden.tolist() == pytest.approx([0.4] * P, abs=0.05)
    masks = sum(int((item["input_ids"] == MASK).sum()) for item in items)
    assert masks / (300 * pairs.lengths.sum()) == pytest.approx(0.15, abs=0.02)


def test_masks_follow_from_seed_and_index_alone(pairs):
    def patches(dataset, index):
        return dataset[index]["masked_patches"].tolist()

    first, same, other = masked(pairs), masked(pairs, count=21), masked(pairs, seed=4)
    assert patches(first, 20) == patches(same, 20)
    assert [patches(first, i) for i in range(20)] != [patches(other, i) for i in range(20)]
    assert patches(first, 0) != patches(first, N)


@pytest.mark.parametrize("share", [0.04, 0.97])
def test_some_patches_must_be_masked_and_some_seen(pairs, share):
    with pytest.raises(ValueError, match=rf"mask_image is {share}; of 10 patches"):
        masked(pairs, mask_image=share)
