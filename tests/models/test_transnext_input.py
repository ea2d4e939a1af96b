"""What TransNeXt refuses: images, labels, sizes and presets that do not fit."""

import math
import re

import pytest
import torch
from test_transnext import ROUTED, TINY
from transformers import ViTConfig

from headwise.models import DiT, DiTConfig, TransNeXtConfig, TransNeXtForImageClassification

SIZES = TINY | ROUTED


def model() -> TransNeXtForImageClassification:
    return TransNeXtForImageClassification(TransNeXtConfig(**SIZES))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 20, 20), "has shape [2, 1, 20, 20]; it must be [B, 3, height, width]"),
        ((3, 20, 20), "has shape [3, 20, 20]"),
        ((2, 3, 20, 4), "size of pixel_values is 20 × 4; with patch_size 2 and sr_ratios "
                        "[3, 2, 1] no side may be below 5"),
    ],
)  # fmt: skip
def test_images_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model().eval()(torch.zeros(shape))


def test_images_in_bytes_are_refused():
    with pytest.raises(ValueError, match=r"pixel_values is torch\.uint8; it must be floating"):
        model().eval()(torch.zeros(2, 3, 20, 20, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 7, 1]), r"labels has 7; classes are 0\.\.6 \(num_labels\)"),
        (torch.tensor([0, -1, 1]), r"labels has -1"),
        (torch.tensor([0, 1]), r"labels has shape \[2\]; it must be \[3\], or \[3, 7\]"),
        (torch.ones(3, 5), r"labels has shape \[3, 5\]"),
        (torch.tensor([0, 1, 1]).int(), "labels has dtype torch.int32; it must be int64"),
        ([0, 1, 1], "labels is list; it must be a tensor on cpu"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        model()(torch.zeros(3, 3, 20, 20), labels=labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 2)}, "depths has 2 entries and hidden_sizes 3"),
        ({"depths": 2}, r"depths is 2; it must be a tuple \(each an int"),
        ({"hidden_sizes": ()}, r"hidden_sizes is \(\); it must have an entry"),
        ({"sr_ratios": (3, 0, 1)}, r"sr_ratios\[1\] is 0; it must be at least 1"),
        ({"depths": (1, 2, 2.5)}, r"depths\[2\] is 2\.5; it must be an int of at least 1"),
        ({"num_labels": 0}, "num_labels is 0; it must be at least 1"),
        ({"num_heads": (2, 4, 5)}, r"num_heads\[1\] is 4; it must divide hidden_sizes\[1\] = 18"),
        ({"window_size": 4}, "window_size is 4; it must be odd"),
        ({"patch_size": 0}, "patch_size is 0; it must be at least 1"),
        ({"image_size": 4}, "image_size is 4; .* no side may be below 5"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate is 1\.0; it must be at least 0 and below 1"),
        ({"balance_coefficient": -1}, "balance_coefficient is -1; it must be at least 0"),
        (
            {"initializer_range": math.nan},
            "initializer_range is nan; it must be a number of at least 0",
        ),
        ({"active_heads": None}, r"active_heads is None; give both, or neither"),
        ({"active_heads": (2, 1)}, "active_heads has 2 entries and hidden_sizes 3"),
        ({"active_heads": (2, 4, 3)}, r"active_heads\[1\] is 4; it must lie in 1\.\.3"),
        ({"shared_heads": (2, 0, 4)}, r"shared_heads\[2\] is 4, more than active_heads\[2\] = 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TransNeXtConfig(**SIZES | changes)


def test_an_unknown_preset_has_a_neighbour():
    near = r"unknown preset 'moh-vit-b75'; did you mean 'moh-vit-b-75'\? There are .*, moh-test$"
    with pytest.raises(ValueError, match=near):
        TransNeXtConfig.preset("moh-vit-b75")
    with pytest.raises(ValueError, match=r"unknown preset '%'; there are [^;]*, moh-test$"):
        TransNeXtConfig.preset("%")
    for ours, other, name in (
        (TransNeXtConfig, DiTConfig, "dit-s"), (DiTConfig, TransNeXtConfig, "moh-test"),
    ):  # fmt: skip
        known = f"^{ours.__name__} has no preset '{name}'; {other.__name__} has one$"
        with pytest.raises(ValueError, match=known):
            ours.preset(name)
    with pytest.raises(ValueError, match="unknown field 'patch_sise'; did you mean 'patch_size'"):
        TransNeXtConfig.preset("test", patch_sise=3)
    assert TransNeXtConfig.preset("test", num_labels=3).num_labels == 3
    assert TransNeXtConfig.preset("test", id2label={0: "a", 1: "b"}).num_labels == 2
    assert TransNeXtConfig.preset("moh-vit-s-75").num_labels == 1000


def test_another_models_directory_is_refused_without_a_warning(tmp_path, caplog):
    classes = (DiT, TransNeXtForImageClassification)
    for kind, preset in zip(classes, ("dit-test", "test"), strict=True):
        kind(kind.config_class.preset(preset)).save_pretrained(tmp_path / kind.__name__)
    ViTConfig().save_pretrained(tmp_path / "ViT")
    types = {"DiT": "headwise_dit", "TransNeXtForImageClassification": "headwise_transnext"}
    for kind in classes:
        own = types[kind.__name__]
        assert type(kind.from_pretrained(tmp_path / kind.__name__)) is kind
        for name, found in (types | {"ViT": "vit"}).items():
            if name != kind.__name__:
                message = f"{name} holds a model of model_type '{found}', not '{own}'$"
                with pytest.raises(ValueError, match=message):
                    kind.from_pretrained(tmp_path / name)
    assert caplog.records == []
