import re
from dataclasses import replace

import matplotlib
import pytest

from headwise.analysis import plots
from headwise.analysis.records import Curve, ExpertLoads, HeadLoads, RunRecord

FIGURES = {
    "loss": plots.loss_curves,
    "final": plots.final_losses,
    "heads": lambda record: plots.head_load_chart(record.models[2].heads, 0),
    "experts": lambda record: plots.expert_load_chart(record.models[3].experts, 0),
    "effective": plots.effective_chart,
    "unused": lambda record: plots.unused_chart({"MoE": record.models[3].experts}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_says_what_it_shows(record, name):
    figure = FIGURES[name](record)
    (axes,) = figure.axes
    assert axes.get_title("left")
    # Both axes are named; those that count or measure say in what.
    assert axes.get_ylabel()
    assert re.search(r"\(.+\)|Rank among 5 experts", axes.get_xlabel())
    assert figure.legends or axes.get_legend()


@pytest.mark.parametrize("name", FIGURES)
def test_svg_ids_are_the_figures_own_and_repeatable(record, name):
    svg = plots.to_svg(FIGURES[name](record), "mine")
    assert svg == plots.to_svg(FIGURES[name](record), "mine")
    assert svg.startswith('<svg role="img" aria-label="')
    assert svg.endswith("</svg>")
    assert all(id_.startswith("mine-") for id_ in re.findall(r'\bid="([^"]*)"', svg))
    used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg)
    assert {a or b for a, b in used} <= set(re.findall(r'\bid="([^"]*)"', svg))
    assert "http" not in svg


def test_settings_are_as_before(record):
    before = dict(matplotlib.rcParams)
    plots.to_svg(plots.loss_curves(record), "a")
    assert dict(matplotlib.rcParams) == before


def test_dollars_are_no_mathematics(record):
    assert "MoH $x$" in plots.to_svg(plots.loss_curves(record), "a")


def test_seeds_are_averaged_at_common_steps():
    mean = plots.mean_curve([Curve([1, 2, 3], [1.0, 2.0, 3.0]), Curve([2, 3, 4], [4.0, 5.0, 6.0])])
    assert mean == Curve([2, 3], [3.0, 4.0])


def test_thinned():
    curve = Curve([1, 2, 3, 4, 5], [1.0, 3.0, 5.0, 7.0, 8.0])
    assert plots.thinned(curve, 3) == Curve([2, 4, 5], [2.0, 6.0, 8.0])
    assert plots.thinned(curve, 5) is curve
    assert plots.thinned(Curve([], []), 5) == Curve([], [])


def test_final_losses_show_every_run_and_the_mean(record):
    (axes,) = plots.final_losses(record).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[1.5, 1.54], [1.49], [1.9]]
    assert [text.get_text() for text in axes.texts] == ["1.520", "1.490", "1.900"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["Dense", "MoH $x$", "MoE"]


def test_head_loads_leave_the_shared_out_and_mark_the_balance(record):
    (axes,) = plots.head_load_chart(record.models[2].heads, 0).axes
    code, prose, balanced = axes.lines
    assert list(code.get_xdata()) == [1, 2, 3]
    assert list(code.get_ydata()) == [0.5, 0.25, 0.25]
    assert list(prose.get_ydata()) == [0.25, 0.5, 0.25]
    # One of three routed heads is on for each token.
    assert balanced.get_ydata()[0] == pytest.approx(1 / 3)


def test_experts_are_ordered_by_their_mean_load(record):
    (axes,) = plots.expert_load_chart(record.models[3].experts, 0).axes
    code, prose, balanced = axes.lines
    assert list(code.get_ydata()) == [0.5, 0.5, 0, 0, 0]
    assert list(prose.get_ydata()) == [0.5, 0, 0.5, 0, 0]
    assert balanced.get_ydata()[0] == pytest.approx(1 / 5)


def test_unused_experts_are_labelled(record):
    (axes,) = plots.unused_chart({"MoE": record.models[3].experts}).axes
    assert [text.get_text() for text in axes.texts] == ["60%", "60%"]


def test_effective_experts_of_each_layer_over_domains_and_seeds(record):
    def run(name, seed, *loads):
        domains = {"code": list(loads)}
        count, overlap = {"code": [8] * len(loads)}, {"code": [None] * len(loads)}
        experts = ExpertLoads([1, 3], domains, 1, count, overlap)
        return replace(record.models[0], name=name, label=name, seed=seed, experts=experts)

    even, two, one = [0.25] * 4, [0.5, 0.5, 0, 0], [1.0, 0, 0, 0]
    models = [
        record.models[0],
        run("a", 0, even, two),
        run("a", 1, two, one),
        run("b", 0, one, one),
    ]
    (axes,) = plots.effective_chart(replace(record, models=models)).axes
    a, b = axes.lines
    assert list(a.get_xdata()) == [1, 3]
    assert list(a.get_ydata()) == pytest.approx([3 / 4, 3 / 8])
    assert list(b.get_ydata()) == pytest.approx([1 / 4, 1 / 4])
    # As in the chart of the losses, where the dense model is the first.
    assert [line.get_color() for line in (a, b)] == ["#0072b2", "#d55e00"]


@pytest.mark.parametrize("losses", [[], [float("nan")] * 3])
def test_curves_without_a_value_are_drawn(record, losses):
    empty = Curve([10, 20, 30][: len(losses)], losses)
    models = [replace(model, training=empty, validation=empty) for model in record.models]
    bare = RunRecord("t", {}, [], [], [], models)
    assert plots.to_svg(plots.loss_curves(bare), "a")
    assert plots.to_svg(plots.final_losses(bare), "b")


def test_the_legend_of_the_speeds_covers_nothing():
    rows = [
        {"rival": "SDPA", "case": case, "shape": f"T={length}", "dtype": dtype, "ratio": share}
        | {"share": share}
        for case in ("core, causal", "core, full")
        for dtype in ("float32", "bfloat16")
        for length in (512, 1024, 2048, 4096)
        for share in (0.25, 0.5)
    ]
    figure = plots.time_against_share(rows)
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    around = [axes.get_tightbbox() for axes in figure.axes]
    around += [text.get_window_extent() for text in figure.texts]
    assert len(around) == 4 + 2
    assert not any(legend.overlaps(box) for box in around)


def test_many_heads_and_experts_get_room():
    heads = HeadLoads([[]], {"code": [[0.5] * 24]})
    experts = ExpertLoads([0], {"code": [[1 / 44] * 44]}, 1, {"code": [44]}, {"code": [None]})
    wide = plots.head_load_chart(heads, 0).get_figwidth()
    assert wide == plots.expert_load_chart(experts, 0).get_figwidth()
    assert wide > plots.head_load_chart(HeadLoads([[]], {"code": [[0.5] * 8]}), 0).get_figwidth()
