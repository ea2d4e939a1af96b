"""Heads as rows: their loads by domain, and whether these differ beyond chance."""

from dataclasses import replace

from headwise.analysis.heads import head_use


def test_use_of_each_layer_and_head(record):
    heads = record.models[2].heads
    uses = {(use.layer, use.head): use for use in head_use(heads)}
    assert list(uses) == [(layer, head) for layer in (0, 1) for head in range(4)]
    assert [use.shared for use in uses.values()] == [True, False, False, False] * 2
    assert uses[0, 2].loads == {"code": 0.25, "prose": 0.5}
    assert uses[0, 2][4:] == (0.0, 1.0, 0.0001, 0.0001)
    assert uses[1, 3][4:] == (12.5, 0.0001, 0.0001, 0.0001)


def test_what_was_not_tested_has_no_number(record):
    heads = replace(record.models[2].heads, difference=None)
    assert {use[4:] for use in head_use(heads)} == {(None,) * 4}
