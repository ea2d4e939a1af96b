"""The language-model recipe: equal cost, checked fields, and a step of every model."""

import dataclasses
import re

import pytest
import torch

from headwise.analysis.records import from_json
from headwise.hf.auto import Routed
from headwise.parity import count_flops
from headwise.recipes import RECIPES, recipe_run, train
from headwise.recipes.decoders import TextRun, build_model
from headwise.recipes.lm import LanguageModelRun
from headwise.recipes.multilingual import MultilingualRun, read
from headwise.results.rows import read_csv
from tiny import ONE_STEP, RUN

VARIANTS = {variant.name: variant for variant in LanguageModelRun().variants()}
ON_TEXT = [name for name in RECIPES if issubclass(recipe_run(name), TextRun)]
TINY = RUN | ONE_STEP | {"speed_contexts": ()}


def build(run: LanguageModelRun, name: str, vocab_size: int = 31, seed: int = 0):
    (variant,) = (variant for variant in run.variants() if variant.name == name)
    return build_model(run, variant, vocab_size=vocab_size, seed=seed)


@pytest.mark.parametrize("recipe", ON_TEXT)
def test_recipe_makes_a_step_of_every_model(recipe, numbers, tmp_path):
    run = recipe_run(recipe)(output=tmp_path / "run", data=numbers, **TINY)
    train(run)
    rows = read_csv(run.output / "results.csv")
    assert [row["model"] for row in rows] == [variant.name for variant in run.variants()]
    record = from_json((run.output / "record.json").read_text())
    assert [model.label for model in record.models] == [row["label"] for row in rows]


@pytest.mark.parametrize("prompt", ["", "ZYXWVUTSRQPON&{}~!"])
def test_a_prompt_that_leaves_nothing_to_write_is_refused_before_training(
    numbers, tmp_path, prompt
):
    fields = {"output": tmp_path / "run", "data": numbers, "sample_prompt": prompt} | TINY
    with pytest.raises(ValueError, match=r"sample_prompt has \d+ tokens; .* sequence_length = 16"):
        train(dataclasses.replace(LanguageModelRun(), **fields))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("deviation", [0.0, -1.0, 3.0, float("nan")])
def test_a_deviation_that_no_model_takes_is_refused(deviation):
    with pytest.raises(ValueError, match=r"initializer_range is .*; it must lie in 0..1, above 0"):
        LanguageModelRun(initializer_range=deviation)


def test_languages_come_from_a_directory(tmp_path):
    with pytest.raises(ValueError, match=r"data is None; .*docs/multilingual.sh"):
        train(MultilingualRun())
    (tmp_path / "page.txt").write_text("one language")
    with pytest.raises(ValueError, match="has no directories for languages"):
        read(MultilingualRun(data=str(tmp_path)))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_moves_every_parameter(name):
    run = LanguageModelRun(**TINY)
    model = build(run, name).train()
    assert isinstance(model, Routed) == (name != "dense")
    ids = torch.randint(0, 31, (8, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("name", VARIANTS)
def test_default_models_cost_what_dense_does(name):
    def flops(name: str) -> float:
        model = build(LanguageModelRun(), name, vocab_size=LanguageModelRun().vocab_size)
        return sum(count_flops(model, sequence_length=LanguageModelRun().sequence_length).values())

    assert flops(name) == pytest.approx(flops("dense"), rel=0.005)


def test_build_follows_the_seed_alone():
    run = LanguageModelRun(**TINY)
    states = []
    for seed in (1, 1, 2):
        torch.rand(7)
        states.append(build(run, "moh_mh_moe", seed=seed).state_dict())
    first, same, other = states
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(*(s["model.embed_tokens.weight"] for s in (first, other)))


def test_mixtures_have_the_papers_parity():
    sparse, split = VARIANTS["moe"].mlp, VARIANTS["mh_moe"].mlp
    assert (sparse.num_experts, sparse.top_k, sparse.expert_dim) == (8, 1, 344)
    # f = (344 - 2·128/3) / 2 = 129.3 → 128;  E = (344·8 - 2·128/3) · 2 / 128 = 41.7 → 42
    assert (split.num_heads, split.top_k, split.expert_dim, split.num_experts) == (2, 2, 128, 42)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": ()}, "seeds must hold at least one entry"),
        ({"workers": 0}, "workers is 0; it must be at least 1"),
        ({"dim": 0}, "dim is 0; it must be at least 1"),
        ({"steps": -3}, "steps is -3; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"save_every": 0}, "save_every is 0; it must be at least 1"),
        ({"every": 0}, "every is 0; it must be at least 1"),
        ({"sequence_length": 1}, "sequence_length is 1; it must be at least 2"),
        ({"vocab_size": 256}, "vocab_size is 256; it must be at least 257"),
        ({"warmup_steps": -1}, "warmup_steps is -1; it must be at least 0"),
        ({"num_heads": 3}, "num_heads is 3; it must divide dim = 128"),
        ({"num_heads": 128}, "num_heads is 128; dim = 128 must be an even multiple of it"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be above 0"),
        ({"domain_exponent": 1.5}, "domain_exponent is 1.5; it must lie in 0..1"),
        ({"typos": (0.1, 1.0)}, "typos is 1.0; it must lie in 0..1, both left out"),
        ({"resume": True, "overwrite": True}, "resume and overwrite are both set"),
        ({"shared_heads": 9}, "shared_heads is 9; it must lie in 0..8"),
        ({"shared_heads": 4, "active_heads": 4}, "shared_heads equals active_heads = 4"),
        ({"top_k": 9}, "top_k is 9; it must lie in 1..8"),
        ({"mlp_dim": 85}, "expert_dim is 85; head and merge layer alone cost as much"),
        ({"mh_heads": 3}, "heads is 3; it must divide dim = 128"),
        ({"balance_coefficient": -1.0}, "balance_coefficient is -1.0; it must be at least 0"),
        ({"models": ("moh",), "balance_coefficient": -1.0}, "balance_coefficient is -1.0"),
        ({"models": ("moh", "moh")}, "models is ('moh', 'moh'); each entry may occur once"),
        ({"seeds": (0, 0)}, "seeds is (0, 0); each entry may occur once"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"models": ("mohh",)}, "models is 'mohh'; it must be one of dense, moh, moe"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LanguageModelRun(**fields)
