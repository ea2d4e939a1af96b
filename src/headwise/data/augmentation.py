"""Images and labels as vision transformers are trained on them: changed at random, by kornia."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot


class Augmentation(nn.Module):
    """Changes a batch of images at random, and turns its labels into probabilities.

    In this order: flips, RandAugment, Random Erasing, then Mixup or CutMix, at last label
    smoothing. Everything runs on the images' device and draws from torch's generator.

    **Source**: the recipe of DeiT (arXiv 2012.12877), which TransNeXt and MoH-ViT follow.
    **Deviates**: kornia's operations, of RandAugment with its magnitudes; Mixup's share is uniform.

    Args:
        num_classes: Classes.
        flip: Probability that an image is mirrored.
        rand_augment: Magnitude of RandAugment's two operations, 0 to 30; 0 leaves it out.
        erase: Probability that a part of an image is erased.
        mixup: Probability that a batch's images are mixed with one another.
        cutmix: Probability that pieces of a batch's images are put into one another.
        smoothing: Share of a label that goes to all classes.

    Raises:
        ValueError: If a number is out of range, or kornia is not installed.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        flip: float,
        rand_augment: int,
        erase: float,
        mixup: float,
        cutmix: float,
        smoothing: float,
    ):
        super().__init__()
        check_augmentation(flip, rand_augment, erase, mixup, cutmix, smoothing)
        self.num_classes, self.smoothing = num_classes, smoothing
        self.mixup, self.cutmix = mixup, cutmix
        try:
            import kornia.augmentation as kornia
        except ImportError:
            raise ValueError(
                "images are changed at random by kornia, which is not installed; the extra vision "
                "has it: `pip install 'headwise[vision]'`"
            ) from None
        policy = kornia.auto.RandAugment(n=2, m=rand_augment) if rand_augment else None
        self.rand_augment = policy
        self.flip = kornia.RandomHorizontalFlip(p=flip) if flip else None
        self.erase = kornia.RandomErasing(p=erase) if erase else None
        keys = ["input", "class"]
        self.mix = kornia.RandomMixUpV2(data_keys=keys) if mixup else None
        self.cut = (
            kornia.RandomCutMixV2(data_keys=keys, use_correct_lambda=True) if cutmix else None
        )

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "B C S S"], labels: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B C S S"], Float[Tensor, "B K"]]:
        """Images in 0..1 and their classes, to images in 0..1 and probabilities of classes."""
        if self.flip is not None:
            images = self.flip(images)
        if self.rand_augment is not None:
            images = _in_colour(self.rand_augment, images)
        if self.erase is not None:
            images = self.erase(images)
        images, targets = self._mixed(images, labels)
        return images, targets * (1 - self.smoothing) + self.smoothing / self.num_classes

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        drawn = torch.rand(()).item()
        if self.mix is not None and drawn < self.mixup:
            mixed, parts = self.mix(images, labels)
            share = parts[:, 2:]
        elif self.cut is not None and self.mixup <= drawn < self.mixup + self.cutmix:
            mixed, (parts,) = self.cut(images, labels)
            share = 1 - parts[:, 2:]  # kornia's is that of the image with the hole
        else:
            return images, one_hot(labels, self.num_classes).to(images.dtype)
        first, second = (one_hot(parts[:, i].long(), self.num_classes) for i in (0, 1))
        return mixed, first * (1 - share) + second * share


def check_augmentation(
    flip: float, rand_augment: int, erase: float, mixup: float, cutmix: float, smoothing: float
) -> None:
    """Refuse what `Augmentation` cannot do.

    Raises:
        ValueError: Naming the field.
    """
    shares = {"flip": flip, "erase": erase, "mixup": mixup, "cutmix": cutmix}
    for name, value in (shares | {"smoothing": smoothing}).items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must lie in 0..1")
    if mixup + cutmix > 1:
        raise ValueError(
            f"mixup is {mixup} and cutmix is {cutmix}; a batch gets one of them, so together they "
            "must be at most 1"
        )
    if not 0 <= rand_augment <= 30:
        raise ValueError(f"rand_augment is {rand_augment}; it must lie in 0..30")


def _in_colour(change: Any, images: Tensor) -> Tensor:
    """What the change, of RGB, makes of the images; grey ones stay grey."""
    if images.shape[1] == 3:
        return change(images)
    return change(images.expand(-1, 3, -1, -1)).mean(1, keepdim=True)


def in_model_range(images: Tensor) -> Tensor:
    """0..1 → -1..1, as the image processor does."""
    return 2 * images - 1
