"""Image classifiers on labelled images: top-1, top-5, and how many of their heads are on."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from headwise.commands.eval.run import EvalRun
from headwise.data.images import ImageSet, load_all_images, load_images
from headwise.data.sampling import spread
from headwise.errors import reason
from headwise.hf import record_routing
from headwise.hf.reading import load_strictly, reading_model
from headwise.loading import load_config
from headwise.progress import followed
from headwise.results.rows import Row, environment
from headwise.training.evaluation import RoutingStatistics, count_hits

_DIGITS, _HELD_OUT, _TEST = "digits", "held-out", "test"


class _Classifier(NamedTuple):
    """A model, what prepares images for it, and its numbers for the classes of the images."""

    path: str
    model: Any
    processor: Any
    numbers: NDArray[np.int64]


def score_on_images(run: EvalRun, console: Console) -> list[Row]:
    """Score every model on the images, which its own image processor prepares.

    Returns:
        One row a model and metric. The standard error of a share p of n images is
        √(p (1 - p) / (n - 1)); the share of heads that are on has none.

    Raises:
        ValueError: If the images cannot be used, or a model is not there, no image classifier,
            lacks its processor, or takes other images or classes; no model has run on them then.
        OSError: If images or weights cannot be fetched.
    """
    images, part = _images(run)
    classifiers = [_load(run, path, images) for path in run.models]
    console.print(f"{len(images):,} images: {part} of {run.images}")
    rows = []
    for classifier in classifiers:
        console.print(classifier.path)
        rows += _rows(run, classifier, images)
    return rows


def _images(run: EvalRun) -> tuple[ImageSet, str]:
    """What is scored, and which part of the data that is, in words."""
    assert run.images is not None  # or EvalRun had refused it
    try:
        images, part = _chosen(run.images, run.split, run.image_size)
    except ValueError as error:
        raise ValueError(f"images names {run.images}, which cannot be used: {error}") from error
    if images.labels is None or not len(images):
        lacking = "images" if images.labels is not None else "classes (a column 'label')"
        raise ValueError(f"images names {run.images}, which has no {lacking}")
    return images.take(spread(len(images), run.limit or len(images)).tolist()), part


def _chosen(name: str, split: str | None, size: int | None) -> tuple[ImageSet, str]:
    is_digits, is_here = name == _DIGITS, Path(name).exists()
    if split == _HELD_OUT or (is_digits and split is None):
        _, held_out = load_images(None if is_digits else name, image_size=size)
        return held_out, "the held-out tenth"
    if split is not None and (is_digits or is_here):
        raise ValueError(f"split is {split!r}; here it must be {_HELD_OUT!r}, or not be given")
    if is_here:
        return load_all_images(name, image_size=size), "all"
    split = split or _TEST
    return load_all_images(name, image_size=size, split=split), f"split {split}"


def _load(run: EvalRun, path: str, images: ImageSet) -> _Classifier:
    """A model that takes the images, as one of them shows."""
    config = load_config(path, "image classifier")
    numbers = class_numbers(path, config, images.classes)
    with reading_model(path, "has no image processor that can be read; save one beside the model"):
        processor = AutoImageProcessor.from_pretrained(path)
    load = AutoModelForImageClassification.from_pretrained
    model, _ = load_strictly(load, path, surplus_allowed=True, dtype=run.dtype)
    classifier = _Classifier(path, model.eval(), processor, numbers)
    try:
        _logits(classifier, images.pixels[:1])
    except (ValueError, RuntimeError) as error:
        _, channels, size, _ = images.pixels.shape
        takes = getattr(config, "num_channels", "other")
        raise ValueError(
            f"models names {path}, which takes {takes} channels; images of {channels} channels and "
            f"{size} × {size} pixels it does not take: {reason(error)}"
        ) from error
    return classifier


def class_numbers(
    path: str, config: PreTrainedConfig, classes: tuple[str, ...]
) -> NDArray[np.int64]:
    """For each class of some images its number in a model, [classes].

    By name where both have names, and then the images may lack classes. Otherwise by number, and
    then the images must have as many classes as the model.

    Args:
        path: Of the model, for errors.
        config: Of the model, whose `id2label` names its classes ("LABEL_0": it does not).
        classes: Names of the images' classes; numbers are no names.

    Raises:
        ValueError: If the classes do not agree.
    """
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    known = {name: i for i, name in enumerate(names)}
    if all(name in known for name in classes):
        return np.array([known[name] for name in classes])
    has_names = names != [f"LABEL_{i}" for i in range(len(names))]
    are_numbers = all(name.isdecimal() for name in classes)
    if has_names and not are_numbers:
        unknown = [name for name in classes if name not in known]
        raise ValueError(
            f"models names {path}, which knows no class {_some(unknown)}; it knows {_some(names)}"
        )
    numbers = [int(name) for name in classes] if are_numbers else list(range(len(classes)))
    if sorted(numbers) != list(range(len(names))):
        raise ValueError(
            f"models names {path}, which has {len(names)} classes, 0..{len(names) - 1}; the images "
            f"have {len(classes)}: {_some(classes)}"
        )
    return np.array(numbers)


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _logits(classifier: _Classifier, pixels: NDArray[np.uint8]) -> Tensor:
    """Of images [N, C, S, S], as people have them."""
    model = classifier.model
    pictures = [
        Image.fromarray(image[0] if len(image) == 1 else rearrange(image, "c h w -> h w c"))
        for image in pixels
    ]
    inputs = classifier.processor(pictures, return_tensors="pt").to(model.device, model.dtype)
    with torch.no_grad():
        return model(**inputs).logits.float()


def _rows(run: EvalRun, classifier: _Classifier, images: ImageSet) -> list[Row]:
    model = classifier.model.to("cuda" if torch.cuda.is_available() else "cpu")
    statistics = RoutingStatistics(model)
    labels = torch.from_numpy(classifier.numbers[images.labels])
    hits = torch.zeros(2, dtype=torch.int64)
    with record_routing(model) as routings:
        starts = range(0, len(images), run.batch_size)
        for start in followed(starts, "images", total=len(starts)):
            part = slice(start, start + run.batch_size)
            logits = _logits(classifier, images.pixels[part])
            hits += count_hits(logits, labels[part].to(logits.device))
            statistics.add("images", routings)
    heads = statistics.head_loads()
    model.to("cpu")
    top1, top5 = (hits.double() / len(images)).tolist()
    metrics = [("top-1", top1), ("top-5", top5)]
    rows = [(name, p, _standard_error(p, len(images))) for name, p in metrics]
    rows.append(("heads on", 1.0 if heads is None else heads.share_on(), None))
    assert run.images is not None
    return [
        {
            "model": classifier.path,
            "task": Path(run.images).name,
            "group": "",
            "metric": metric,
            "value": value,
            "standard_error": error,
            "documents": len(images),
            "images": run.images,
            "split": run.split,
            "image_size": run.image_size,
            "batch_size": run.batch_size,
            **environment(run.precision),
        }
        for metric, value, error in rows
    ]


def _standard_error(share: float, count: int) -> float | None:
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
