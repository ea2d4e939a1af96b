"""A small classifier of a run's images: what drawn images are recognised and compared by."""

import tempfile
from pathlib import Path

import numpy as np
from transformers import AutoModelForImageClassification, TrainingArguments, default_data_collator

from headwise.data.images import ImageSet
from headwise.data.text import draw
from headwise.hf.auto import load_strictly
from headwise.models import TransNeXtForImageClassification
from headwise.recipes.loading import check_holds_model
from headwise.recipes.vit import VisionRun
from headwise.recipes.vit_task import LabelledImages, VisionTask, labels_of

_STEPS, _BATCH = 200, 64


def train_classifier(images: ImageSet, *, steps: int = _STEPS) -> TransNeXtForImageClassification:
    """A dense TransNeXt of size "test", trained on the images: half a minute on 8 × 8 pixels."""
    run = VisionRun(steps=steps, cutmix=0.0, smoothing=0.0)
    task = VisionTask(run, images, images)
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
        check_holds_model(path)
        model, _ = load_strictly(AutoModelForImageClassification.from_pretrained, path)
    except Exception as error:  # a directory can be wrong in as many ways as there are models
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"classifier {path} holds no classifier: {reason}") from error
    if not isinstance(model, TransNeXtForImageClassification):
        raise ValueError(
            f"classifier {path} holds a {type(model).__name__}; it must be a "
            "TransNeXtForImageClassification, as `headwise train vit` makes one"
        )
    classes = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    if classes != images.classes:
        raise ValueError(
            f"classifier {path} knows the classes {_first(classes)}; the images have "
            f"{_first(images.classes)}, and both must be the same in the same order"
        )
    config, (_, channels, size, _) = model.config, images.pixels.shape
    if (config.num_channels, config.image_size) != (channels, size):
        raise ValueError(
            f"classifier {path} takes images of {config.num_channels} channels and side "
            f"{config.image_size}; these have {channels} channels and side {size}"
        )
    return model.eval()


def _first(names: tuple[str, ...], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
