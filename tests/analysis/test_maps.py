import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from headwise.analysis import plots
from headwise.analysis.image_records import PatchMap, RoutedImage, to_png
from headwise.analysis.measure import LoadMeter, count_heads
from headwise.analysis.records import HeadLoads
from headwise.analysis.report import render_report
from headwise.ops import HeadRouting

# Two layers of one shared and two routed heads.
LOADS = HeadLoads(
    [[0], [0]],
    {
        "cat": [[1.0, 0.5, 0.25], [1.0, 0.0, 0.75]],
        "dog": [[1.0, 0.0, 1.0], [1.0, 0.5, 0.5]],
        "eel": [[1.0, 0.25, 0.5], [1.0, 0.25, 1.0]],
    },
)


def of_classes(count, layers=2):
    return HeadLoads(
        [[0]] * layers, {f"class {i}": [[1.0, i / count, 0.5]] * layers for i in range(count)}
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


def test_without_a_layer_all_stand_side_by_side():
    # The second layer has all heads shared, so that nothing of it is drawn.
    heads = HeadLoads(
        [[0], [0, 1], [0]],
        {
            "cat": [[1.0, 0.5, 0.25], [1.0, 1.0], [1.0, 0.0]],
            "dog": [[1.0, 0.0, 1.0], [1.0, 1.0], [1.0, 0.75]],
        },
    )
    axes, _ = plots.head_load_map(heads).axes
    assert axes.images[0].get_array().tolist() == [[0.5, 0.25, 0], [0, 1, 0.75]]
    assert axes.get_title("left") == "All layers"
    ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    assert [(x, text.get_text()) for x, text in ticks] == [(0.5, "0"), (2, "2")]
    assert plots.last_routed_layer(heads) == 2
    assert plots.last_routed_layer(HeadLoads([[0], [0, 1]], {"cat": [[1.0, 0.5], [1.0, 1.0]]})) == 0


def test_a_thousand_classes_fit():
    figure = plots.head_load_map(of_classes(1000), 0)
    assert figure.get_figheight() < 10
    figure.draw_without_rendering()
    axes, _ = figure.axes
    assert not list(axes.texts)
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == 50
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_without_routed_heads_there_is_no_map():
    heads = HeadLoads([[0, 1]], {"cat": [[1.0, 1.0]]})
    assert plots.last_routed_layer(heads) is None
    for layer in (0, None):
        with pytest.raises(ValueError, match="no head is routed"):
            plots.head_load_map(heads, layer)


def test_loads_by_class_of_batches_of_mixed_classes():
    # Three images of two patches each, of classes 0, 1, 0; one shared and one routed head.
    gates = torch.tensor([[[1, 1], [1, 0]], [[1, 1], [1, 1]], [[1, 0], [1, 0]]]).float()
    none = torch.zeros(3, 2, 1)
    routing, labels = HeadRouting(gates, none.long(), none, none), torch.tensor([0, 1, 0])
    meter = LoadMeter(count_heads)
    for i, name in enumerate(("cat", "dog")):
        meter.add(name, [routing.with_mask((labels == i)[:, None])])
    assert meter.by_domain() == {"cat": [[1.0, 0.25]], "dog": [[1.0, 1.0]]}


def test_the_report_draws_many_classes_as_maps(record):
    heads = of_classes(plots.MANY_DOMAINS + 1)
    model = replace(record.models[2], heads=heads, texts=[])
    page = render_report(replace(record, models=[model]))
    assert re.findall(r'aria-label="([^"]*): Class against', page) == ["Layer 1", "All layers"]
    assert "data:image/png" in page
    assert not re.search(r"https?://", page)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_maps_of_several_images_have_a_row_a_head():
    grey, coloured = np.full((7, 7), 200, dtype=np.uint8), np.zeros((5, 5, 3), dtype=np.uint8)
    images = [
        RoutedImage("cat", to_png(Image.fromarray(grey)), [PatchMap(1, [1, 2], [[0, 1], [0]])]),
        RoutedImage("eel", to_png(Image.fromarray(coloured)), [PatchMap(1, [1, 2], [[0], [0, 2]])]),
    ]
    (axes,) = plots.patch_maps(images, 0, LOADS).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["cat", "eel"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["image", "1", "2"]
    assert axes.get_title("left") == "Layer 1, 1 × 2 patches"
    drawn = [(tuple(x.get_extent()), x.get_array()) for x in axes.images]
    assert (drawn[0][1] == grey).all()
    # Each image, then with a veil for each of the two heads: 5 pictures of each.
    veils = [drawn[i][1][..., 3].tolist() for i in (2, 4, 7, 9)]
    assert veils == [[[0, 0.85]], [[0.85, 0.85]], [[0.85, 0.85]], [[0.85, 0]]]
    assert drawn[2][0] == drawn[1][0] == pytest.approx((0.04, 0.96, 1.96, 1.04))
    assert drawn[7][0] == drawn[6][0] == pytest.approx((1.04, 1.96, 1.96, 1.04))


# Heads 1 and 3 are always on; head 0 is, too, for one of the classes.
NAMED = HeadLoads([[1, 3]], {"cat": [[0.5, 1.0, 0.25, 1.0]], "dog": [[1.0, 1.0, 0.0, 1.0]]})


def test_named_shared_heads_are_left_out_of_the_charts():
    axes, _ = plots.head_load_map(NAMED, 0).axes
    assert axes.images[0].get_array().tolist() == [[0.5, 0.25], [1, 0]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "2"]
    chart = plots.head_load_chart(NAMED, 0).axes[0]
    assert {tick for tick in chart.get_xticks() if tick in range(4)} == {0, 2}
    image = RoutedImage("cat", to_png(Image.new("L", (2, 1))), [PatchMap(0, [1, 2], [[1, 3], [1]])])
    names = [
        text.get_text() for text in plots.patch_maps([image], 0, NAMED).axes[0].get_yticklabels()
    ]
    assert names == ["image", "0", "2"]
