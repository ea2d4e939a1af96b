"""Images changed at random: labels follow what was mixed."""

import pytest
import torch

from headwise.data.augmentation import Augmentation

pytest.importorskip("kornia", reason="kornia is not installed")
NONE = {"flip": 0.0, "rand_augment": 0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}
CLASSES = 7


def augmentation(**changes):
    torch.manual_seed(0)
    return Augmentation(CLASSES, **NONE | changes)


@pytest.fixture
def shades():
    """An image of each class, all of its shade: a mean pixel tells what was mixed."""
    labels = torch.arange(CLASSES)
    return (labels / CLASSES)[:, None, None, None].expand(-1, 1, 16, 16).clone(), labels


def test_without_changes_labels_become_certainties(shades):
    images, targets = augmentation()(*shades)
    torch.testing.assert_close(images, shades[0])
    torch.testing.assert_close(targets, torch.eye(CLASSES))


def test_smoothing_by_hand(shades):
    _, targets = augmentation(smoothing=0.14)(*shades)
    torch.testing.assert_close(targets, 0.86 * torch.eye(CLASSES) + 0.02)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_mixed_as_the_pixels_are(shades, kind):
    images, targets = augmentation(**{kind: 1.0})(*shades)
    expected = (targets * torch.arange(CLASSES) / CLASSES).sum(1)
    torch.testing.assert_close(images.mean((1, 2, 3)), expected)
    torch.testing.assert_close(targets.sum(1), torch.ones(CLASSES))
    assert (targets.max(1).values < 1).any()


def test_about_half_of_the_batches_are_mixed(shades):
    augment = augmentation(mixup=0.3, cutmix=0.2)
    mixed = sum(bool((augment(*shades)[1].max(1).values < 1).any()) for _ in range(200))
    assert 75 < mixed < 125


@pytest.mark.parametrize("channels", [1, 3])
def test_everything_at_once_stays_in_range(channels):
    augment = augmentation(flip=0.5, rand_augment=9, erase=0.25, mixup=0.5, cutmix=0.5)
    for _ in range(5):
        images, targets = augment(torch.rand(5, channels, 11, 11), torch.arange(5))
        assert images.shape == (5, channels, 11, 11)
        assert 0 <= images.min() < images.max() <= 1
        torch.testing.assert_close(targets.sum(1), torch.ones(5))


def test_a_seed_repeats_it(shades):
    wild = {"flip": 0.5, "rand_augment": 9, "erase": 0.25, "cutmix": 1.0}
    once, again = (augmentation(**wild)(*shades) for _ in range(2))
    for first, second in zip(once, again, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": 1.5}, "flip is 1.5; it must lie in 0..1"),
        ({"rand_augment": 31}, "rand_augment is 31; it must lie in 0..30"),
        ({"mixup": 0.6, "cutmix": 0.5}, "together they must be at most 1"),
    ],
)
def test_what_cannot_be_done_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        augmentation(**changes)
