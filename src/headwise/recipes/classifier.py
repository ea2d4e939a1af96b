"""A small classifier of a run's images: what drawn images are recognised and compared by."""

import tempfile
from pathlib import Path

import numpy as np
from transformers import default_data_collator

from headwise.data.images import ImageSet
from headwise.data.sampling import draw
from headwise.hf.reading import load_strictly
from headwise.loading import described, kind_of, load_config
from headwise.models import TransNeXtConfig, TransNeXtForImageClassification
from headwise.recipes.images import LabelledImages, labels_of
from headwise.recipes.vit import VisionRun, VisionTask

_STEPS, _BATCH = 200, 64


def train_classifier(images: ImageSet, *, steps: int = _STEPS) -> TransNeXtForImageClassification:
    """A dense TransNeXt of size "test", trained on the images: half a minute on 8 × 8 pixels."""
    # Imported here: help works without what trains.
    from transformers import TrainingArguments

    run = VisionRun(steps=steps, cutmix=0.0, smoothing=0.0)
    task = VisionTask(run, images, images, images)
    model = task.model(run.variants()[0], seed=0)
    order = draw(len(images), steps * _BATCH, np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as directory:
        trainer = task.trainer(
            model=model,
            args=TrainingArguments(
                output_dir=directory,
                max_steps=steps,
                per_device_train_batch_size=_BATCH,
                learning_rate=run.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=steps // 10,
                weight_decay=run.weight_decay,
                save_strategy="no",
                logging_steps=steps,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=LabelledImages(images.pixels, labels_of(images), order),
            data_collator=default_data_collator,
            title="A classifier to measure with",
            per_step=_BATCH,
            unit="image",
        )
        trainer.train()
    return model.eval()


def load_classifier(path: Path, images: ImageSet) -> TransNeXtForImageClassification:
    """The classifier in a directory, if it is one of these images.

    Raises:
        ValueError: If there is none, or it knows other classes or takes other images.
    """
    try:
        config = load_config(path)
    except ValueError as error:
        raise ValueError(f"classifier: {error}") from error
    if not isinstance(config, TransNeXtConfig) or kind_of(config) != "image classifier":
        raise ValueError(
            f"classifier {path} holds {described(config)}; it must be a TransNeXt that classifies "
            "images, as `headwise train vit` makes one"
        )
    model, _ = load_strictly(TransNeXtForImageClassification.from_pretrained, path)
    classes = tuple(config.id2label[i] for i in range(config.num_labels))
    if classes != images.classes:
        raise ValueError(
            f"classifier {path} knows the classes {_first(classes)}; the images have "
            f"{_first(images.classes)}, and both must be the same in the same order"
        )
    _, channels, size, _ = images.pixels.shape
    if (config.num_channels, config.image_size) != (channels, size):
        raise ValueError(
            f"classifier {path} takes images of {config.num_channels} channels and side "
            f"{config.image_size}; these have {channels} channels and side {size}"
        )
    return model.eval()


def _first(names: tuple[str, ...], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
