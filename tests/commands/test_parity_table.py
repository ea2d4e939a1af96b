"""The table of `headwise parity`: the paper's rows, what is impossible, what was rounded."""

import shlex

import pytest

from headwise.cli import main
from headwise.commands.parity import ParityRun, comparison

PAPER = {"dim": 768, "num_experts": 8, "top_k": 1, "expert_dim": 2048}
SIZES = shlex.split("--dim 768 --num-experts 8 --top-k 1 --expert-dim 2048")


def test_the_papers_rows():
    table, notes = comparison(ParityRun(**PAPER, heads=(2, 3), experts_multiple_of=8))
    assert table.printed() == [
        ["sparse", "768", "1", "2048", "8", "9.437", "1.000", "37.749", "1.000"],
        ["2", "384", "2", "768", "41.33 → 40", "9.437", "1.000", "36.569", "0.969"],
        ["3", "256", "3", "512", "93.00 → 96", "9.437", "1.000", "38.928", "1.031"],
    ]
    assert all(len(line) == len(table.columns) for line in table.rows)
    assert notes == [
        "2 heads: num_experts 41.3333 rounded to 40, the nearest multiple of 8",
        "3 heads: num_experts 93 rounded to 96, the nearest multiple of 8",
    ]


def test_rounding_that_ends_far_from_parity_is_said():
    _, notes = comparison(ParityRun(**PAPER, heads=(2,), experts_multiple_of=1000))
    assert notes[1].startswith("2 heads: 23.47 times the sparse MoE's parameters is no parity")


def test_options_reach_the_solver():
    run = ParityRun(**PAPER, heads=(1,), top_k_mh=4, glu=False, multiple_of=100)
    table, notes = comparison(run)
    _, line = table.printed()
    # f = (2048 - 768) / 4;  E = (2048·8 - 768) / 300
    assert line[1:5] == ["768", "4", "320.00 → 300", "52.05 → 52"]
    assert notes[0] == "1 head: expert_dim 320 rounded to 300, the nearest multiple of 100"


def test_impossible_heads_say_why_and_the_others_stand():
    table, notes = comparison(ParityRun(**PAPER, heads=(5, 3, 0)))
    assert [line[3] for line in table.printed()] == ["2048", "impossible", "512", "impossible"]
    assert {len(line) for line in table.rows} == {len(table.columns)}
    assert notes == [
        "5 heads: heads is 5; it must divide dim = 768",
        "0 heads: heads is 0; it must be at least 1",
    ]


def test_nothing_possible_is_an_error_with_every_reason_once():
    message = r"^heads is 5; it must .* 768; heads is 7; it must .* 768$"
    with pytest.raises(ValueError, match=message):
        comparison(ParityRun(**PAPER, heads=(5, 7, 5)))
    with pytest.raises(ValueError, match=r"^expert_dim is 512; .* it must exceed 512$"):
        comparison(ParityRun(**PAPER | {"expert_dim": 512}, heads=(1, 2, 3)))


def test_command_prints_table_legend_and_notes(capsys):
    main(["parity", *SIZES, "--heads", "2", "3", "5", "--experts-multiple-of", "8"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 384 2 768 41.33 → 40 9.437 1.000 36.569 0.969" in printed
    assert "sparse: the sparse MoE; s: width of a sub-token" in printed
    assert printed.endswith("5 heads: heads is 5; it must divide dim = 768")


@pytest.mark.parametrize(
    ("heads", "message"), [(["5"], "heads is 5; it must divide dim = 768"), ([], "heads is empty")]
)
def test_command_ends_with_status_2_where_nothing_is_possible(fails, heads, message):
    assert message in fails(2, "parity", *SIZES, "--heads", *heads)
