import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from headwise.analysis.image_records import PatchMap, from_png, to_png
from headwise.analysis.records import (
    Curve,
    ExpertLoads,
    HeadLoads,
    ModelRecord,
    RoutedText,
    RunRecord,
    from_json,
    to_json,
)
from headwise.results.table import Table


def test_round_trip(record):
    assert from_json(to_json(record)) == record


def test_a_bare_record_round_trips():
    bare = RunRecord("t", {}, [], [], [], [])
    assert from_json(to_json(bare)) == bare


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"models": [{}]}', '{"models": [], "x": 1}'])
def test_what_is_no_record_is_refused(text):
    with pytest.raises(ValueError, match=r"RunRecord|Expecting"):
        from_json(text)


def places(value, path=()):
    """Paths to all that a value holds, of a list's entries the first."""
    yield path
    entries = value.items() if isinstance(value, dict) else ()
    for key, entry in list(enumerate(value))[:1] if isinstance(value, list) else entries:
        yield from places(entry, (*path, key))


def swapped(value, path, other):
    if not path:
        return other
    copied = value.copy()
    copied[path[0]] = swapped(value[path[0]], path[1:], other)
    return copied


@pytest.mark.parametrize(
    "other", [None, [], {}, 3, -1, 10**400, math.nan, "x", True, [[]]], ids=str
)
def test_a_value_of_another_kind_is_refused_anywhere_in_a_record(record, pictures, other):
    models = [*record.models[1:], pictures.models[1]]
    raw = json.loads(to_json(replace(record, models=models)))
    every = [
        ("models", i, *path) for i, model in enumerate(raw["models"]) for path in places(model)
    ]
    refused = 0
    for path in [*places(raw), *every]:
        text = json.dumps(swapped(raw, path, other))
        try:
            from_json(text)
        except ValueError as error:
            refused += "RunRecord" in str(error)
    assert refused > 30


def test_unknown_fields_are_refused(record):
    raw = json.loads(to_json(record))
    raw["models"][0]["colour"] = "blue"
    with pytest.raises(ValueError, match="colour"):
        from_json(json.dumps(raw))


def test_routed_loads_leave_the_shared_out(record):
    assert record.models[2].heads.routed("code", 0) == [0.5, 0.25, 0.25]


def test_variants_group_seeds(record):
    seeds = {name: [run.seed for run in runs] for name, runs in record.variants().items()}
    assert seeds == {"dense": [0, 1], "moh": [0], "moe": [0]}


def test_what_does_not_fit_is_refused():
    empty = Curve([], [])
    heads = HeadLoads([[0]], {"code": [[1.0, 0.5]]})
    text = RoutedText("code", ["a"], [[[0]]])
    with pytest.raises(ValueError, match="steps has 2 entries, losses 1"):
        Curve([1, 2], [0.5])
    with pytest.raises(ValueError, match="differ in layers or candidates"):
        HeadLoads([[0]], {"code": [[1.0]], "prose": [[1.0, 0.5]]})
    loads, counted, overlap = {"code": [[1.0]]}, {"code": [7]}, {"code": [None]}
    with pytest.raises(ValueError, match=r"by_domain\['code'\] has 1 layers; layers names 2"):
        ExpertLoads([1, 3], loads, 1, counted, overlap)
    with pytest.raises(ValueError, match=r"overlap\['code'\] has 2 layers; layers names 1"):
        ExpertLoads([1], loads, 1, counted, {"code": [0.5, 0.5]})
    with pytest.raises(ValueError, match=r"assignments has the domains \['prose'\]"):
        ExpertLoads([1], loads, 1, {"prose": [7]}, overlap)
    with pytest.raises(ValueError, match=r"assignments\['code'\] is \[0\]; .* at least 1"):
        ExpertLoads([1], loads, 1, {"code": [0]}, overlap)
    with pytest.raises(ValueError, match=r"heads_on\[1\] has 0 tokens; the text has 1"):
        RoutedText("code", ["a"], [[[0]], []])
    with pytest.raises(ValueError, match="heads is None"):
        ModelRecord("moh", "MoH", 0, empty, empty, texts=[text])
    with pytest.raises(ValueError, match=r"differ in layers: \[1, 2\]"):
        ModelRecord("moh", "MoH", 0, empty, empty, heads, texts=[RoutedText("c", [], [[], []])])
    with pytest.raises(ValueError, match=r"table_rows\[0\] has 1 cells; there are 2 columns"):
        RunRecord("t", {}, ["a", "b"], [["1"]], [], [])


def test_shared_heads_are_counted_for_each_layer():
    heads = HeadLoads([[0], [0, 1]], {"cat": [[1.0, 0.5, 0.5], [1.0, 1.0, 0.25]]})
    assert [heads.routed("cat", layer) for layer in (0, 1)] == [[0.5, 0.5], [0.25]]
    with pytest.raises(ValueError, match="shared_heads has 1 entries; there are 2 layers"):
        HeadLoads([[0]], {"cat": [[1.0], [1.0]]})


def test_shared_heads_may_be_any():
    loads = {"cat": [[0.5, 1.0, 0.25, 1.0], [1.0, 0.5, 0.5, 0.0]]}
    heads = HeadLoads([[1, 3], [0]], loads)
    assert [heads.routed_heads(layer) for layer in (0, 1)] == [[0, 2], [1, 2, 3]]
    assert [heads.routed("cat", layer) for layer in (0, 1)] == [[0.5, 0.25], [0.5, 0.5, 0.0]]
    with pytest.raises(ValueError, match=r"shared_heads\[0\] is \[1, 4\]; the layer has 4 heads"):
        HeadLoads([[1, 4], [0]], loads)


def test_records_of_earlier_versions_count_the_first_heads(record):
    raw = json.loads(to_json(record))
    assert raw["models"][2]["heads"]["shared_heads"] == [[0], [0]]
    raw["models"][2]["heads"]["shared_heads"] = [1, 1]
    assert from_json(json.dumps(raw)) == record


def test_records_of_earlier_versions_compare_no_domains(record):
    raw = json.loads(to_json(record))
    for model, part in ((2, "heads"), (3, "experts")):
        assert raw["models"][model][part].pop("difference")
    read = from_json(json.dumps(raw))
    assert read.models[2].heads == replace(record.models[2].heads, difference=None)
    assert read.models[3].experts == replace(record.models[3].experts, difference=None)


def test_differences_that_do_not_fit_are_refused(record):
    heads = record.models[2].heads
    found = heads.difference
    with pytest.raises(ValueError, match=r"groups \['code'\]; by_domain has \['code', 'prose'\]"):
        replace(heads, difference=replace(found, documents={"code": 3}))
    with pytest.raises(ValueError, match=r"\[4\] candidates by layer; by_domain has \[4, 4\]"):
        replace(heads, difference=replace(found, layers=found.layers[:1]))
    with pytest.raises(ValueError, match="effects has 4 entries, p_values 1"):
        replace(found.layers[0], p_values=[0.5])


def test_numbers_of_earlier_versions_are_text(record):
    raw = json.loads(to_json(record))
    cells = [["2 heads", "−0.5", "1,200 ± 30"], ["moh", "1.49 (1–{2)", "900 a day"]]
    cells.append(["moe", "407.3 ± 26.9 (380–428)", "–"])
    read = from_json(json.dumps(raw | {"table_rows": cells}))
    table = Table(read.table_columns, read.table_rows)
    assert table.printed() == cells
    (_, _, speed), (_, _, slower), (name, loss, missing) = table.rows
    assert (speed.value, speed.spread, slower.value, slower.spread) == (1200, 30, 900, 0)
    assert (name, loss.value, loss.spread, missing) == ("moe", 407.3, 26.9, "–")
    assert table.best() == {(0, 2)}


def test_pictures_round_trip(pictures):
    assert from_json(to_json(pictures)) == pictures


def test_records_of_earlier_versions_have_no_pictures(record):
    raw = json.loads(to_json(record))
    for model in raw["models"]:
        del model["images"], model["samples"]
    assert from_json(json.dumps(raw)) == record


def test_pictures_that_do_not_fit_are_refused(pictures):
    model = pictures.models[1]
    with pytest.raises(ValueError, match=r"grid is \[2, 2\]; heads_on has 3 patches"):
        PatchMap(0, [2, 2], [[0]] * 3)
    with pytest.raises(ValueError, match="moh has images but heads is None"):
        replace(model, heads=None)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 3)])
def test_pixels_survive_base64(shape):
    pixels = np.arange(math.prod(shape), dtype=np.uint8).reshape(shape)
    assert (from_png(to_png(Image.fromarray(pixels))) == pixels).all()
