"""Speeds as a table and in words, and in records with and without them."""

import json

from headwise.analysis.records import RunRecord, Speed, from_json, to_json
from headwise.analysis.tables import speed_table, verdict

SPEEDS = [Speed("next token", 4096, 2.0, 2.1), Speed("prompt", 16384, 4000.0, 3000.0)]


def record(**fields) -> RunRecord:
    return RunRecord("A run", {}, [], [], [], [], **fields)


def test_table():
    table = speed_table(SPEEDS)
    assert table.columns == ["", "dense (ms)", "MoH (ms)", "MoH / dense"]
    assert table.printed() == [
        ["next token at 4,096 tokens", "2.00", "2.10", "1.05"],
        ["prompt at 16,384 tokens", "4,000", "3,000", "0.75"],
    ]


def test_the_slower_is_named_too():
    assert verdict(SPEEDS) == (
        "MoH is faster: prompt at 16,384 tokens (0.75). "
        "MoH is slower or equal: next token at 4,096 tokens (1.05)."
    )
    assert verdict([Speed("prompt", 7, 1.0, 0.999)]).startswith("MoH is slower or equal")


def test_records_keep_speeds_and_older_ones_have_none():
    kept = record(speeds=SPEEDS, speed_note="on one thread")
    assert from_json(to_json(kept)) == kept
    older = json.loads(to_json(record()))
    del older["speeds"], older["speed_note"]
    assert from_json(json.dumps(older)).speeds == []
