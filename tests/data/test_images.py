"""Images from every place they may come from, their classes and captions, and what is refused."""

import sys

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from pyarrow import parquet

from headwise.data.images import ImageSet, halve_images, load_images
from headwise.data.patches import in_floats, patches_of
from headwise.data.pixels import stacked


def picture(value: int, size: tuple[int, int] = (5, 5), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, value if mode != "RGB" else (value, value + 1, value + 2))


def table(**columns) -> Dataset:
    features = {
        "image": ImageFeature(),
        "label": ClassLabel(names=["cat", "fire_truck"]),
        "caption": Value("string"),
        "kind": Value("string"),
    }
    return Dataset.from_dict(columns, features=Features({name: features[name] for name in columns}))


def both(parts: tuple[ImageSet, ImageSet]) -> list[tuple[int, str]]:
    """First value of every image with its caption."""
    shown = [(x, c) for part in parts for x, c in zip(part.pixels, part.captions, strict=True)]
    return sorted((int(pixels[0, 0, 0]), caption) for pixels, caption in shown)


def test_digits_are_the_default():
    training, validation = load_images()
    assert (len(training), len(validation)) == (1618, 179)
    assert training.pixels.shape[1:] == (1, 8, 8)
    assert training.pixels.dtype == np.uint8
    assert (training.pixels.min(), training.pixels.max()) == (0, 255)
    for part in (training, validation):
        assert set(part.labels.tolist()) == set(range(10))
        for label, caption in zip(part.labels, part.captions, strict=True):
            assert part.classes[label] in caption.split()
    assert len({c.replace(d, "") for c in training.captions for d in training.classes}) >= 4


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"digits are scikit-learn's, .* 'headwise\[vision\]'"):
        load_images()


def test_one_image_in_ten_is_held_out_by_its_index(tmp_path):
    def write(offset: int) -> str:
        images = [picture(i + offset) for i in range(40)]
        table(image=images, caption=[f"number {i}" for i in range(40)]).to_parquet(
            tmp_path / f"{offset}.parquet"
        )
        return str(tmp_path / f"{offset}.parquet")

    first, second = load_images(write(0)), load_images(write(100))
    assert [len(part) for part in first] == [36, 4]
    assert both(first) == [(i, f"number {i}") for i in range(40)]
    assert first[1].captions == second[1].captions


def test_held_out_images_are_halved_class_by_class():
    """Of 5 cats and 2 dogs, 3 and 1 are for the second half."""
    pixels = np.arange(7, dtype=np.uint8).reshape(7, 1, 1, 1)
    labels = np.array([0, 0, 0, 1, 0, 1, 0])
    images = ImageSet(pixels, tuple("abcdefg"), labels, ("cat", "dog"))
    validation, test = halve_images(images)
    assert (validation.captions, test.captions) == (("b", "d", "e"), ("a", "c", "f", "g"))
    assert validation.labels.tolist() == [0, 1, 0]
    assert test.pixels.ravel().tolist() == [0, 2, 5, 6]
    without_classes = halve_images(ImageSet(pixels, tuple("abcdefg")))
    assert [half.captions for half in without_classes] == [tuple("bdf"), tuple("aceg")]
    with pytest.raises(ValueError, match=r"data holds out 1 image; it takes 2"):
        halve_images(images.take([3]))


def test_parquet_with_classes_says_them_in_words(tmp_path):
    file = tmp_path / "images.parquet"
    table(image=[picture(i) for i in range(6)], label=[0, 1, 0, 1, 1, 0]).to_parquet(file)
    parts = load_images(str(file))
    assert both(parts) == [
        (0, "cat"), (1, "a picture of fire truck"), (2, "this picture shows cat"),
        (3, "fire truck"), (4, "a picture of fire truck"), (5, "this picture shows cat"),
    ]  # fmt: skip
    assert {part.classes for part in parts} == {("cat", "fire_truck")}
    labels = {int(x[0, 0, 0]): y for s in parts for x, y in zip(s.pixels, s.labels, strict=True)}
    assert labels == {0: 0, 1: 1, 2: 0, 3: 1, 4: 1, 5: 0}


def test_captions_go_before_classes_and_keep_them(tmp_path):
    file = tmp_path / "images.parquet"
    images = [picture(i) for i in range(3)]
    table(image=images, label=[0, 1, 0], caption=["a", "b", "c"]).to_parquet(file)
    parts = load_images(str(file))
    assert both(parts) == [(0, "a"), (1, "b"), (2, "c")]
    assert sorted(x for part in parts for x in part.labels) == [0, 0, 1]


def test_parquet_without_features_holds_encoded_images(tmp_path):
    """As other tools write it: bytes, and labels of any kind."""
    import io

    rows = []
    for i in range(3):
        picture(i).save(file := io.BytesIO(), "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": "zyx"[i]})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "plain.parquet")
    parts = load_images(str(tmp_path / "plain.parquet"))
    assert both(parts) == [(0, "z"), (1, "a picture of y"), (2, "this picture shows x")]
    assert parts[0].classes == ("x", "y", "z")
    assert parts[0].labels is not None


def test_directories_are_classes(tmp_path):
    for i, name in enumerate(["b/1.png", "a/2.png", "a/deep/1.bmp", "b/.hidden"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if "hidden" not in name:
            picture(i).save(tmp_path / name)
    (tmp_path / "b/.hidden").write_text("no image")
    parts = load_images(str(tmp_path))
    assert both(parts) == [(0, "this picture shows b"), (1, "a"), (2, "a picture of a")]
    assert parts[0].classes == ("a", "b")


def test_dataset_by_name(monkeypatch):
    """Stands for the Hub: load_dataset returns a real dataset."""
    calls = []

    def load_dataset(*args: object, split: str) -> Dataset:
        calls.append((*args, split))
        return table(image=[picture(i) for i in range(3)], label=[0, 0, 1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [x for x, _ in both(load_images("owner/pictures:small"))] == [0, 1, 2]
    assert calls == [("owner/pictures", "small", "train")]


def test_image_size_crops_to_the_middle_and_resizes(tmp_path):
    wide = Image.new("RGB", (8, 4), "white")
    wide.paste(picture(7, (4, 4)), (2, 0))
    file = tmp_path / "images.parquet"
    table(image=[wide, picture(7, (2, 2))], caption=["wide", "small"]).to_parquet(file)
    for part in load_images(str(file), image_size=4):
        assert part.pixels.shape == (1, 3, 4, 4)
        assert (part.pixels[0, 0] == 7).all()


def test_grey_stays_grey_and_other_modes_become_rgb():
    grey, rgb = picture(7, mode="L"), picture(7)
    clear = Image.new("RGBA", (5, 5), (1, 2, 3, 0))
    assert stacked([("x", grey), ("y", picture(1, mode="1"))], None).shape == (2, 1, 5, 5)
    pixels = stacked([("x", grey), ("y", rgb), ("z", clear)], None)
    assert pixels[:, :, 0, 0].tolist() == [[7, 7, 7], [7, 8, 9], [255, 255, 255]]


def test_patches_go_row_by_row():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patches_of(images, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4], images[1, :, 2:4, 2:4].flatten())


def test_floats_lie_between_minus_one_and_one():
    assert in_floats(np.array([0, 51, 255], dtype=np.uint8)).tolist() == pytest.approx(
        [-1, -0.6, 1]
    )


def broken(tmp_path, **columns) -> str:
    table(**columns).to_parquet(tmp_path / "broken.parquet")
    return str(tmp_path / "broken.parquet")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [picture(1)], "caption": ["x"]}, "has 1 images; it takes at least 2"),
        ({"image": [picture(1)] * 2, "kind": ["x"] * 2}, r"columns \['image', 'kind'\]; one must"),
        ({"label": [0, 1]}, r"columns \['label'\]; one must hold images"),
        ({"image": [picture(1), None], "label": [0, 1]}, "row 1 of .* has no image"),
        ({"image": [picture(1)] * 2, "caption": ["x", " "]}, "row 1 of .* has caption ' '"),
        ({"image": [picture(1)] * 2, "label": [0, None]}, "row 1 of .* has label None"),
        (
            {"image": [picture(1), picture(1, (5, 4))], "caption": ["x", "y"]},
            r"has 5×4 pixels; .* wide as the first image, 5×5; image_size \(--image-size\) makes",
        ),
        (
            {"image": [picture(1, mode="F")] * 2, "caption": ["x", "y"]},
            "row 0 of .* has pixels of mode 'F'; convert it to 8 bits",
        ),
    ],
)
def test_tables_that_do_not_do_are_refused(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        load_images(broken(tmp_path, **columns))


def test_files_that_are_no_images_are_named(tmp_path):
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(
        ValueError, match=r"parquet cannot be read as a Parquet file: .*; images come"
    ):
        load_images(str(tmp_path / "text.parquet"))
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "notes.txt").write_text("no image")
    with pytest.raises(
        ValueError, match=r"notes\.txt cannot be read as an image.*; mend or remove"
    ):
        load_images(str(folder))
    (folder / "a" / "notes.txt").rename(folder / "a" / ".notes.txt")
    picture(1, (5, 4)).save(folder / "a" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has 5×4 pixels; all must be squares"):
        load_images(str(folder))
    picture(1).save(folder / "beside.png")
    with pytest.raises(ValueError, match=r"beside\.png is a file; .* must be directories, each"):
        load_images(str(folder))


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"'no/such\.parquet'; there is no such file"):
        load_images("no/such.parquet")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        # As a table may say that was never checked against the names it carries.
        ([0, 2], r"row 1 of .* has label 2; it must lie in 0\.\.1"),
        ([-1, 0], r"row 0 of .* has label -1; it must lie in 0\.\.1"),
        ([0.5, 1.0], r"row 0 of .* has label 0\.5; it must be a class: a name or a number"),
        ([[0, 1], [1]], r"row 0 of .* has label \[0, 1\]; it must be a class"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, message):
    named = table(image=[picture(1), picture(2)], label=[0, 1]).data.table
    given = named.set_column(1, "label", pyarrow.array(labels))
    # Only where they are whole can the names be kept.
    metadata = named.schema.metadata if isinstance(labels[0], int) else None
    parquet.write_table(given.replace_schema_metadata(metadata), tmp_path / "broken.parquet")
    with pytest.raises(ValueError, match=message):
        load_images(str(tmp_path / "broken.parquet"))


def test_a_column_of_something_else_is_refused(tmp_path):
    numbers = pyarrow.table({"image": [3, 4], "label": [0, 1]})
    parquet.write_table(numbers, tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match=r"column 'image' of .* holds .*int64.*; it must hold im"):
        load_images(str(tmp_path / "numbers.parquet"))


def png_of_16_bits(file):
    Image.fromarray(np.full((5, 5), 999, dtype=np.uint16)).save(file)


def png_of_a_broken_chunk(file):
    picture(1).save(file)
    content = bytearray(file.read_bytes())
    content[content.index(b"IHDR") - 4 :] = b"\xff\xff\xff\xffIDAT"
    file.write_bytes(content)


def ppm_of_no_number(file):
    file.write_bytes(b"P6 {0 5 255\n")


def bmp_that_bursts(file):
    picture(1).save(file, "BMP")
    content = bytearray(file.read_bytes())
    content[18:26] = b"\xff\xff\xff\x00" * 2
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (png_of_16_bits, "has pixels of mode 'I;16'; convert it to 8 bits"),
        (png_of_a_broken_chunk, "cannot be read as an image: "),
        (ppm_of_no_number, "cannot be read as an image: "),
        (bmp_that_bursts, "cannot be read as an image: .*decompression bomb"),
    ],
)
@pytest.mark.parametrize("place", ["directory", "table"])
def test_images_that_cannot_be_read_are_named(tmp_path, write, message, place):
    (tmp_path / "class").mkdir()
    picture(1).save(tmp_path / "class" / "a.png")
    write(tmp_path / "class" / "b.png")
    if place == "directory":
        data, named = tmp_path, "b.png"
    else:
        data, named = tmp_path / "images.parquet", "row 1 of "
        contents = [{"bytes": (tmp_path / "class" / f"{x}.png").read_bytes()} for x in "ab"]
        parquet.write_table(pyarrow.table({"image": contents, "label": [0, 1]}), data)
    with pytest.raises(ValueError, match=f"{named}.*{message}"):
        load_images(str(data))


def test_images_of_all_other_modes_make_one_set(tmp_path):
    (tmp_path / "class").mkdir()
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
        image = Image.new("RGB", (5, 5), (255, 255, 255)).convert(mode)
        image.save(tmp_path / "class" / f"{mode}.tiff")
    pixels = np.concatenate([part.pixels for part in load_images(str(tmp_path))])
    assert pixels.shape == (7, 3, 5, 5)
    assert (pixels == 255).all()
