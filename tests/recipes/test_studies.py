"""The studies: what they compare, at what cost, and that every model of theirs can be trained."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from headwise.data.images import halve_images, load_images
from headwise.data.text import load_text
from headwise.loading import load_causal_lm
from headwise.parity import count_flops, count_parameters
from headwise.recipes import train
from headwise.recipes.decoders import build_model
from headwise.recipes.dit import DiffusionTask
from headwise.recipes.scales import SCALES, StudyRun, TextStudyRun, tiny
from headwise.recipes.studies import STUDIES
from headwise.recipes.text import domain_names
from headwise.recipes.vit import VisionTask
from headwise.results.published import PUBLISHED
from headwise.results.rows import read_csv
from tiny import LINES, ONE_STEP, RUN

V = 211
ROUTER = "attention.router"
TEXT = [name for name, study in STUDIES.items() if study.subject == "text"]
IMAGES = [name for name in STUDIES if name not in TEXT]
MODELS = [(study, variant.name) for study in TEXT for variant in tiny(study).variants()]


def flops(run: StudyRun, model: torch.nn.Module) -> float:
    return sum(count_flops(model, sequence_length=run.sequence_length).values())


def built(study: str) -> dict[str, torch.nn.Module]:
    run = tiny(study)
    return {v.name: build_model(run, v, vocab_size=V, seed=0) for v in run.variants()}


@pytest.mark.parametrize("study", STUDIES)
def test_names_are_each_once(study):
    for variants in (SCALES[scale](study).variants() for scale in SCALES):
        assert len({v.name for v in variants}) == len({v.label for v in variants}) == len(variants)


@pytest.mark.parametrize(("study", "name"), MODELS)
def test_every_model_learns(study, name):
    run = dataclasses.replace(tiny(study), num_layers=2)
    (variant,) = (v for v in run.variants() if v.name == name)
    model = build_model(run, variant, vocab_size=V, seed=0).train()
    torch.manual_seed(0)
    ids = torch.randint(0, V, (2, 24))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert 4 < loss.item() < 7  # ln 211 is 5.35
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("study", IMAGES)
def test_studies_of_images_switch_off_ever_more_heads(study):
    run, (training, held_out) = tiny(study), load_images()
    digits = (training, *halve_images(held_out))
    drawn = tuple(x.pixels.astype("float32") for x in digits)
    tasks = {
        "vit": lambda: VisionTask(run, *digits),
        "dit": lambda: DiffusionTask(run, *digits, drawn, None, None),
    }
    task = tasks[STUDIES[study].subject]()
    costs = {v.name: task.flops(task.model(v, 0)) for v in run.variants()}
    if study == "dit-budget":
        # At the same cost: only its routers start otherwise.
        assert costs.pop("moh_75_small_routers") == costs["moh_75"]
    assert [*costs] == ["dense", "moh_90", "moh_75", "moh_50"]
    routed = [costs[name] for name in costs if name != "dense"]
    assert routed == sorted(routed, reverse=True)
    assert routed[-1] < costs["dense"] < 1.1 * routed[-1]


@pytest.mark.parametrize("study", [name for name in TEXT if STUDIES[name].equal_cost])
def test_models_of_a_study_cost_the_same(study):
    run = tiny(study)
    costs = {name: flops(run, model) for name, model in built(study).items()}
    target = costs[run.variants()[0].name]
    assert {name: cost for name, cost in costs.items() if abs(cost / target - 1) > 0.005} == {}


def test_mixtures_of_a_study_have_the_same_parameters():
    models = built("mhmoe-main")
    names = [name for name in models if name not in ("dense", "mh_moe_2_static")]
    totals = [count_parameters(models[name])[0] for name in names]
    # Routers differ, and the dense MLPs that pay for them.
    assert max(totals) / min(totals) < 1.03


def test_switching_heads_off_makes_a_model_cheaper():
    run = tiny("moh-budget")
    models = built("moh-budget")
    for kind in ("moh", "static"):
        costs = [flops(run, model) for name, model in models.items() if name.startswith(kind)]
        assert costs == sorted(costs, reverse=True)
    positions = [100, 75, 50, 25]
    assert [v.position for v in run.variants()] == [None, *positions, *positions[1:]]


def test_heads_of_two_widths_have_as_many_channels_in_all():
    models = built("moh-heads-of-two-widths")
    assert [*models] == ["dense", "dense_two_widths", "moh", "moh_two_widths"]
    totals = {name: count_parameters(model) for name, model in models.items()}
    assert totals["dense"] == totals["dense_two_widths"]
    assert totals["moh"] == totals["moh_two_widths"]
    for name, model in models.items():
        config = model.config
        assert config.head_dims == ((16, 8) * 4 if "two" in name else (12,) * 8)
        assert (config.rotary_dim, config.num_hidden_layers) == (8, 4)
    (router,) = (m for n, m in models["moh_two_widths"].layers[0].named_modules() if n == ROUTER)
    assert (router.budget.shared_heads, router.budget.active_heads) == (3, 6)


def test_heads_of_two_widths_are_trained_scored_and_not_timed(numbers, tmp_path):
    """Timing reads a cache, which these models do not have."""
    fields = RUN | ONE_STEP | {"dim": 24, "data": numbers, "protocol": "plain", "seeds": (0,)}
    study = dataclasses.replace(tiny("moh-heads-of-two-widths"), workers=1, **fields)
    run = dataclasses.replace(study, output=tmp_path / "run", speed_contexts=(17,))
    train(run)
    rows = {row["model"]: row for row in read_csv(run.output / "results.csv")}
    assert [*rows] == ["dense", "dense_two_widths", "moh", "moh_two_widths"]
    assert [float(row["active_heads"]) for row in rows.values()] == [1, 1, 0.75, 0.75]
    assert {row["mlp_dim"] for row in rows.values()} == {"64"}
    loads = read_csv(run.output / "heads.csv")
    routed = [(row["model"], row["layer"], row["head"]) for row in loads]
    assert len(routed) == len(set(routed)) == 2 * 2 * 4
    assert "Speed at long contexts" not in (run.output / "report.html").read_text()
    model = load_causal_lm(run.output / "models" / "moh_two_widths-seed0")
    assert model.config.head_dims == (8, 4, 8, 4)


@pytest.mark.parametrize(("dim", "heads"), [(64, 8), (90, 5)])
def test_heads_that_two_widths_cannot_be_made_of_are_refused(dim, heads):
    wanted = f"num_heads is {heads}; it must be even, and the width of a head, dim / num_heads = "
    with pytest.raises(ValueError, match=re.escape(f"{wanted}{dim // heads}, a multiple of 3")):
        dataclasses.replace(tiny("moh-heads-of-two-widths"), dim=dim, num_heads=heads)


def test_shared_shares_are_those_of_the_paper_as_far_as_heads_allow():
    assert [round(v.position) for v in tiny("moh-shared-share").variants()] == [17, 33, 50, 67]


@pytest.mark.parametrize("study", PUBLISHED)
def test_published_figures_are_of_models_that_the_study_has(study):
    published, names = PUBLISHED[study], {v.name for v in tiny(study).variants()}
    assert set(published.rows) <= names
    assert {len(row) for row in published.rows.values()} <= {len(published.columns)}


@pytest.mark.parametrize("scale", SCALES)
def test_noise_scores_mistyped_text_at_every_scale(scale):
    run = SCALES[scale]("noise")
    assert run.typos == (0.01, 0.05, 0.1)
    assert [v.name for v in run.variants()] == ["dense", "moh", "moe", "mh_moe"]
    assert SCALES[scale]("combined").typos == ()


def test_domains_are_trained_on_one_by_one():
    variants = tiny("domains").variants()
    assert {v.train_on for v in variants} == {("code",), ("prose",)}
    assert variants[0].name == "dense_code"


def test_domains_of_a_single_one_are_refused(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a\nb\n")
    with pytest.raises(ValueError, match="one domain; the study takes a directory"):
        dataclasses.replace(tiny("domains"), data=str(file))


@pytest.mark.parametrize("layout", ["file", "directory", "domains"])
def test_domains_have_the_names_that_loading_gives_them(layout, tmp_path):
    places = {"file": "a.txt", "directory": "b/a.txt", "domains": "b/c/a.txt"}
    data = {"file": "a.txt", "directory": "b", "domains": "b"}
    path = tmp_path / places[layout]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("one\ntwo\nthree\n")
    name = str(tmp_path / data[layout])
    assert domain_names(name) == [domain.name for domain in load_text(name)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"study": "moh"}, "study is 'moh'; it must be one of mhmoe-main"),
        ({"study": "combined", "scale": "huge"}, "scale is 'huge'; it must be one of"),
        ({"study": "combined", "models": ("h2",)}, "models is 'h2'; it must be one of dense, moh"),
        ({"study": "mhmoe-main", "dim": 128}, "heads is 3; it must divide dim = 128"),
    ],
)
def test_impossible_studies_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TextStudyRun(output=Path("run"), **fields)


def test_models_that_cannot_be_built_are_found_before_anything_is_trained(tmp_path):
    (tmp_path / "text.txt").write_text(LINES)
    run = dataclasses.replace(
        tiny("combined"), data=str(tmp_path / "text.txt"), output=tmp_path / "run", every=1
    )
    with pytest.raises(ValueError, match=r"every is 1, which leaves no dense MLP in mo.* least 2"):
        train(run)
    assert not run.output.exists()
    with pytest.raises(ValueError, match="every is 9, but the model has 4 layers"):
        train(dataclasses.replace(run, every=9))


def test_few_heads_leave_each_model_one_to_route():
    run = dataclasses.replace(tiny("moh-budget"), num_heads=4)
    for variant in run.variants():
        build_model(run, variant, vocab_size=V, seed=0)
