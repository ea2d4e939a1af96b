"""Images with classes and captions: scikit-learn's digits, files, or Hugging Face datasets."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from headwise.data.pixels import stacked
from headwise.data.sampling import halves_of_classes
from headwise.data.text import held_out, hugging_face_rows, visible_files
from headwise.errors import reading
from headwise.memory import check_memory

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGIT_CAPTIONS = ("a handwritten {}", "the number {} in pen", "a {}", "this is the digit {}")
_CLASS_CAPTIONS = ("{}", "a picture of {}", "this picture shows {}")


@dataclass(frozen=True)
class ImageSet:
    """Square images of one size, and what each shows.

    Attributes:
        pixels: uint8, [N, channels, size, size]; one channel where all images are grey, else RGB.
        captions: What is said of each image; its class in words where the data say no more.
        labels: The class of each image, [N]; None where the data have no classes.
        classes: Names of the classes.
    """

    pixels: NDArray[np.uint8]
    captions: tuple[str, ...]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("captions", "labels"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self):
                raise ValueError(f"{name} has {len(values)} entries; there are {len(self)} images")

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Sequence[int]) -> "ImageSet":
        """Those images, in that order."""
        captions = tuple(self.captions[i] for i in indices)
        labels = None if self.labels is None else self.labels[indices]
        return ImageSet(self.pixels[indices], captions, labels, self.classes)


def load_images(
    data: str | None = None, *, image_size: int | None = None
) -> tuple[ImageSet, ImageSet]:
    """Images to train on, and the tenth that is held out, chosen by a hash of the image's index.

    Args:
        data: None for scikit-learn's 1,797 digits of 8×8 pixels; a Parquet file; a directory of
            directories, each with the images of a class; or the name of a Hugging Face dataset
            ("name" or "name:configuration"). Tables need a column of images, and a column "caption"
            or "text", or one of classes ("label" or of type ClassLabel). Without captions, classes
            are put into words.
        image_size: Side in pixels to which images are cropped (to the middle square) and resized;
            None keeps them as they are.

    Returns:
        Images to train on and those held out, in the order of the data.

    Raises:
        ValueError: If there are no images, or they are broken or of several sizes.
    """
    images = load_all_images(data, image_size=image_size)
    if len(images) < 2:
        raise ValueError(
            f"data {data!r} has {len(images)} images; it takes at least 2: a tenth of them is held "
            "out to measure on"
        )
    left_out = sorted(map(int, held_out(map(str, range(len(images))))))
    training = sorted(set(range(len(images))).difference(left_out))
    return images.take(training), images.take(left_out)


def halve_images(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Held-out images in two halves: to choose models by, and to report.

    Every second image of each class is in each; of images without classes, every second one.

    Raises:
        ValueError: If there are fewer than 2.
    """
    if len(images) < 2:
        raise ValueError(
            f"data holds out {len(images)} image; it takes 2, to choose by and to report, so there "
            "must be at least 20 images"
        )
    classes = np.zeros(len(images), np.int64) if images.labels is None else images.labels
    first, second = halves_of_classes(classes)
    return images.take(first.tolist()), images.take(second.tolist())


def load_all_images(
    data: str | None = None, *, image_size: int | None = None, split: str = "train"
) -> ImageSet:
    """All images of a place, none held out.

    Args:
        data, image_size: As `load_images` takes them.
        split: Of a Hugging Face dataset, which one.

    Returns:
        The images in the order of the data.

    Raises:
        ValueError: If they are broken or of several sizes.
    """
    if data is None:
        return _digits(image_size)
    path = Path(data)
    if path.is_dir():
        return _folders(path, image_size)
    if path.is_file():
        return _table(data, _parquet(path), image_size)
    return _table(data, hugging_face_rows(data, split=split), image_size)


def _digits(image_size: int | None) -> ImageSet:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the digits are scikit-learn's, which is not installed; give other images, or install "
            "the extra vision: `pip install 'headwise[vision]'`"
        ) from None
    digits = load_digits()
    _check_memory(len(digits.images), image_size)
    images = (Image.fromarray(x) for x in (digits.images * (255 / 16)).round().astype(np.uint8))
    labels = digits.target.astype(np.int64)
    named = {f"digit {i}": image for i, image in enumerate(images)}
    captions = _in_words(labels, _DIGITS, _DIGIT_CAPTIONS)
    return ImageSet(stacked(named.items(), image_size), captions, labels, _DIGITS)


def _folders(root: Path, image_size: int | None) -> ImageSet:
    entries = [p for p in sorted(root.iterdir()) if p.name[0] != "."]
    if beside := next((p for p in entries if not p.is_dir()), None):
        raise ValueError(
            f"{beside} is a file; all that {root} holds must be directories, each with images of a "
            "class"
        )
    if not entries:
        raise ValueError(f"{root} is empty; it must hold directories, each with images of a class")
    classes = tuple(p.name for p in entries)
    files = [(label, file) for label, x in enumerate(entries) for file in visible_files(x)]
    _check_memory(len(files), image_size)
    labels = np.array([label for label, _ in files], dtype=np.int64)
    opened = ((str(file), _open(file)) for _, file in files)
    captions = _in_words(labels, classes, _CLASS_CAPTIONS)
    return ImageSet(stacked(opened, image_size), captions, labels, classes)


def _check_memory(count: int, image_size: int | None) -> None:
    check_memory(count * (image_size or 1) ** 2, "the images", image_size=image_size)


def _open(file: Path) -> Image.Image:
    hint = "mend or remove it (only hidden files are passed over)"
    with reading(file, "an image", hint=hint), Image.open(file) as image:
        image.load()
    return image


def _parquet(path: Path) -> Any:
    from datasets import Dataset
    from pyarrow import parquet

    hint = (
        "images come as one, as a directory with a directory for each class, or by the name of a "
        "Hugging Face dataset"
    )
    with reading(path, "a Parquet file", hint=hint):
        return Dataset(parquet.read_table(path))


def _table(name: str, rows: Any, image_size: int | None) -> ImageSet:
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    kinds = rows.features
    of_images = [c for c in kinds if isinstance(kinds[c], ImageFeature) or c in ("image", "img")]
    captions = [c for c in ("caption", "text") if c in kinds]
    classes = [c for c in kinds if isinstance(kinds[c], ClassLabel) or c == "label"]
    if not of_images or not captions + classes:
        raise ValueError(
            f"data {name!r} has columns {rows.column_names}; one must hold images ('image'), and "
            "one their captions ('caption' or 'text') or classes ('label')"
        )
    _check_memory(len(rows), image_size)
    pixels = stacked(_decoded(name, rows, of_images[0]), image_size)
    labels, names = _classes(name, rows, classes[0]) if classes else (None, ())
    if captions:
        texts = tuple(_caption(name, i, text) for i, text in enumerate(rows[captions[0]]))
    elif labels is not None:
        texts = _in_words(labels, names, _CLASS_CAPTIONS)
    return ImageSet(pixels, texts, labels=labels, classes=names)


def _decoded(name: str, rows: Any, column: str) -> Iterable[tuple[str, Image.Image]]:
    from datasets import Image as ImageFeature

    hint = f"it holds {rows.features[column]}; it must hold images"
    with reading(f"column {column!r} of {name!r}", "images", hint=hint):
        images = rows.cast_column(column, ImageFeature())[column]
    for i in range(len(images)):
        where = f"row {i} of {name!r}"
        with reading(where, "an image"):
            image = images[i]
        if image is None:
            raise ValueError(f"{where} has no image")
        yield where, image


def _classes(name: str, rows: Any, column: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    values = rows[column][:]
    for row, value in enumerate(values):
        if not isinstance(value, int | str):
            raise ValueError(
                f"row {row} of {name!r} has label {value!r}; it must be a class: a name or a number"
            )
    names = getattr(rows.features[column], "names", None)
    if names is None:
        known = sorted(set(values))
        names, values = list(map(str, known)), [known.index(value) for value in values]
    labels = np.array(values, dtype=np.int64)
    wrong = (labels < 0) | (labels >= len(names))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"row {row} of {name!r} has label {labels[row]}; it must lie in 0..{len(names) - 1}"
        )
    return labels, tuple(names)


def _caption(name: str, row: int, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"row {row} of {name!r} has caption {text!r}; it must be words")
    return text


def _in_words(
    labels: NDArray[np.int64], classes: Sequence[str], templates: Sequence[str]
) -> tuple[str, ...]:
    words = [name.replace("_", " ") for name in classes]
    return tuple(templates[i % len(templates)].format(words[x]) for i, x in enumerate(labels))
