import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from headwise.analysis import HeadLoads, LoadMeter, count_heads, plots
from headwise.analysis.report import render_report
from headwise.ops import Routing

# Two layers of one shared and two routed heads.
LOADS = HeadLoads(
    [1, 1],
    {
        "cat": [[1.0, 0.5, 0.25], [1.0, 0.0, 0.75]],
        "dog": [[1.0, 0.0, 1.0], [1.0, 0.5, 0.5]],
        "eel": [[1.0, 0.25, 0.5], [1.0, 0.25, 1.0]],
    },
)


def of_classes(count, layers=2):
    return HeadLoads(
        [1] * layers, {f"class {i}": [[1.0, i / count, 0.5]] * layers for i in range(count)}
    )


def test_a_row_is_a_class_and_a_column_a_routed_head():
    axes, bar = plots.head_load_map(LOADS, -1).axes
    assert axes.images[0].get_array().tolist() == [[0, 0.75], [0.5, 0.5], [0.25, 1]]
    assert axes.images[0].get_clim() == (0, 1)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["cat", "dog", "eel"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2"]
    assert [text.get_text() for text in axes.texts] == ["0", "75", "50", "50", "25", "100"]
    assert axes.get_title("left") == "Layer 1"
    assert axes.get_xlabel() == "Routed head (index)"
    assert bar.get_ylabel() == "On for (% of tokens)"


def test_without_a_layer_the_mean_over_all_is_drawn():
    axes, _ = plots.head_load_map(LOADS).axes
    assert axes.images[0].get_array().tolist() == [[0.25, 0.5], [0.25, 0.75], [0.25, 0.75]]
    assert axes.get_title("left") == "All layers"


def test_a_thousand_classes_fit():
    figure = plots.head_load_map(of_classes(1000), 0)
    assert figure.get_figheight() < 10
    figure.draw_without_rendering()
    axes, _ = figure.axes
    assert not list(axes.texts)
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == 50
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_layers_that_differ_in_heads_have_no_mean():
    heads = HeadLoads([1, 1], {"cat": [[1.0, 0.5], [1.0, 0.5, 0.5]]})
    assert not plots.same_heads(heads)
    with pytest.raises(ValueError, match="layer is None, but the layers differ in heads"):
        plots.head_load_map(heads)
    assert plots.head_load_map(heads, 1).axes
    with pytest.raises(ValueError, match="no head is routed"):
        plots.head_load_map(HeadLoads([2], {"cat": [[1.0, 1.0]]}), 0)


def test_loads_by_class_of_batches_of_mixed_classes():
    # Three images of two patches each, of classes 0, 1, 0; one shared and one routed head.
    gates = torch.tensor([[[1, 1], [1, 0]], [[1, 1], [1, 1]], [[1, 0], [1, 0]]]).float()
    none = torch.zeros(3, 2, 1)
    routing, labels = Routing(gates, none.long(), none, none), torch.tensor([0, 1, 0])
    meter = LoadMeter(count_heads)
    for i, name in enumerate(("cat", "dog")):
        meter.add(name, [routing.with_mask((labels == i)[:, None])])
    assert meter.by_domain() == {"cat": [[1.0, 0.25]], "dog": [[1.0, 1.0]]}


@pytest.mark.parametrize("same", [True, False], ids=["mean", "layers that differ"])
def test_the_report_draws_many_classes_as_maps(record, same):
    heads = of_classes(plots.MANY_DOMAINS + 1)
    if not same:
        layers = [[1.0, 0.5], [1.0, 0.5, 0.5]]
        heads = HeadLoads([1, 1], dict.fromkeys(heads.by_domain, layers))
    model = replace(record.models[2], heads=heads, texts=[])
    page = render_report(replace(record, models=[model]))
    labels = re.findall(r'aria-label="([^"]*): Class against Routed head', page)
    assert labels == (["Layer 1", "All layers"] if same else ["Layer 1"])
    assert "data:image/png" in page
    assert not re.search(r"https?://", page)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_that_leave_a_head_off_are_veiled(channels):
    weights = torch.tensor([[1, 0.5, 0], [1, 0, 0], [1, 0.2, 0], [1, 0, 0.3], [1, 0, 0], [1, 1, 0]])
    image = np.full((7, 11, channels), 200, dtype=np.uint8)
    first, second = plots.patch_map(image, weights, (2, 3), shared_heads=1).axes
    assert first.get_title("left") == "Head 1: 50%"
    assert second.get_title("left") == "Head 2: 17%"
    picture, veil = first.images
    # Both cover the same pixels, whatever the patch's size.
    assert tuple(picture.get_extent()) == tuple(veil.get_extent())
    assert (veil.get_array()[..., 3] == 0).tolist() == [[True, False, True], [False, False, True]]


def test_many_heads_take_several_lines():
    figure = plots.patch_map(np.zeros((4, 4, 3)), torch.ones(4, 13), (2, 2))
    assert len(figure.axes) == 13
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


IMAGE, WEIGHTS = np.zeros((4, 6, 3)), torch.ones(6, 5)


@pytest.mark.parametrize(
    ("image", "weights", "shared", "message"),
    [
        (IMAGE[..., :2], WEIGHTS, 0, r"image is \[4, 6, 2\]"),
        (IMAGE + 2, WEIGHTS, 0, r"image is float64 in 2.0..2.0"),
        (IMAGE, torch.ones(7, 5), 0, r"weights are \[7, 5\]; .* T = 2·3 patches"),
        (IMAGE, WEIGHTS, 5, "shared_heads is 5; it must be less than 5"),
    ],
)
def test_bad_patch_maps(image, weights, shared, message):
    with pytest.raises(ValueError, match=message):
        plots.patch_map(image, weights, (2, 3), shared_heads=shared)
