from dataclasses import replace

import pytest

from headwise.analysis.records import Curve, HeadLoads, ModelRecord, RunRecord
from headwise.analysis.summary import differences, head_distance, headline, tiles


def run(name, seed, loss):
    return ModelRecord(name, name, seed, Curve([], []), Curve([1], [loss]))


def page(*models):
    return RunRecord("t", {}, [], [], [], list(models))


def test_an_order_within_the_seeds_is_no_finding():
    text = headline(
        page(run("a", 0, 1.50), run("a", 1, 1.54), run("b", 0, 1.55), run("b", 1, 1.53))
    )
    assert "between 1.520 (a) and 1.540 (b) nats per token" in text
    assert text.endswith("their order is not a finding.")


def test_an_order_beyond_the_seeds_is_told():
    text = headline(
        page(run("a", 0, 1.50), run("a", 1, 1.52), run("b", 0, 1.60), run("b", 1, 1.62))
    )
    assert text.endswith("the lead over b is 0.100, seeds differ by up to 0.020.")


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_seed_is_no_finding(seeds):
    text = headline(page(*[run("a", seed, 1.0) for seed in range(seeds)], run("b", 0, 9.0)))
    assert text.endswith("not a finding.")


def test_headline_of_few():
    assert headline(page()) == "0 runs, none with a validation loss."
    assert (
        headline(page(run("a", 0, 1.5))) == "a ends at a validation loss of 1.500 nats per token."
    )


def test_diverged_runs_are_told():
    text = headline(page(run("a", 0, 1.5), run("a", 1, float("nan")), run("b", 0, float("inf"))))
    assert text == "a ends at a validation loss of 1.500 nats per token. 2 runs diverged."


def test_tiles(record):
    found = {tile.caption: tile.value for tile in tiles(record)}
    assert found == {
        "runs of 3 variants": "4",
        "heads on per token, MoH $x$": "2 of 4",
        # Layer 0: ½(¼ + ¼ + 0) = ¼ of the routed choices, layer 1: none.
        "of routed head choices differ between code and prose, MoH $x$": "12%",
        "experts of all layers and models never used": "2 of 5",
    }


def test_heads_on_of_layers_that_differ_are_a_share():
    loads = HeadLoads([[0], [0]], {"code": [[1.0, 0.5, 0.5], [1.0, 0.5, 0.5, 0.5, 0.5]]})
    model = replace(run("a", 0, 1.0), heads=loads)
    assert tiles(page(model))[1].value == "62%"


def test_heads_need_two_domains_to_differ():
    assert head_distance(HeadLoads([[]], {"code": [[0.5, 0.5]]})) is None
    assert head_distance(HeadLoads([[0]], {"code": [[1.0]], "prose": [[1.0]]})) is None
    assert head_distance(None) is None


def test_facts_of_other_units(record):
    assert "nats per image" in headline(replace(record, loss_unit="nats per image"))


def test_differences_in_sentences(record):
    heads = record.models[2].heads.difference
    other = replace(heads, over_all=replace(heads.over_all, p_value=0.04321))
    found = differences([heads, other, other], [3, 5], candidate="head", unit="image")
    assert found == [
        "The heads differ between the domains beyond chance, over all layers p = 0.0001: 40.0 % of "
        "the variance of loads between images lies between the domains (0.04 of 0.1), 10.0 % by "
        "chance.",
        "By layer: 3 p = 0.0001, 5 p = 0.0001.",
        "Differ by themselves, at p ≤ 0.05 corrected: 2 of 8 heads, most of all head 3 of layer 5, "
        "by 12.5 percentage points.",
        "Other seeds, over all layers: p = 0.043, p = 0.043.",
        "p: how often chance does as much, by 9,999 permutations of the domains of whole images "
        "(code 23, prose 7); that of a layer is not corrected for the number of layers, that of "
        "one head is for the number of heads.",
    ]
    assert differences([], [3, 5], candidate="head", unit="image") == []


def test_differences_that_are_none(record):
    experts = record.models[3].experts.difference
    found = differences([experts], [1], candidate="expert", unit="document")
    assert found[0].startswith("No difference of the experts between the domains is found")
    assert found[2].endswith(": 0 of 5 experts.")
    fixed = replace(experts, over_all=replace(experts.over_all, statistic=0.0, total=0.0))
    found = differences([fixed], [1], candidate="expert", unit="document")
    assert found[0].endswith(": their loads are the same in all documents.")
