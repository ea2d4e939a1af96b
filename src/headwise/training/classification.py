"""Training a classifier of images: they are changed at random."""

from typing import Any

from torch import Tensor

from headwise.data.augmentation import Augmentation, in_model_range
from headwise.training.trainer import SafeTrainer


class ImageTrainer(SafeTrainer):
    """Changes images at random, on their device, before the model trains on them."""

    def __init__(self, *args: Any, augmentation: Augmentation, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.augmentation = augmentation

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Of images in uint8 and labels."""
        images, labels = inputs["pixel_values"].float() / 255, inputs["labels"]
        if model.training:
            images, labels = self.augmentation(images, labels)
        changed = {"pixel_values": in_model_range(images), "labels": labels}
        return super().compute_loss(model, changed, *args, **kwargs)
