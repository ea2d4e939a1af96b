"""The masked recipe: equal cost, a step of every model, resumed, and what it measures."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel, AutoTokenizer

from headwise.analysis.records import from_json
from headwise.data.patches import in_floats, patches_of, visual_tokens
from headwise.parity import measure_flops
from headwise.recipes import train
from headwise.recipes.masked import MaskedRun, MaskedTask, read
from headwise.results.rows import Row, read_csv
from headwise.training.comparison import Variant
from headwise.training.table import comparison

VARIANTS = {variant.name: variant for variant in MaskedRun().variants()}
NAMES = list(VARIANTS)
TINY = {
    "dim": 12, "num_heads": 2, "num_layers": 2, "mlp_dim": 24, "codebook_size": 7,
    "vocab_size": 300, "num_experts": 3, "batch_size": 3, "steps": 4, "warmup_steps": 1,
    "log_every": 1, "eval_every": 2, "save_every": 2, "eval_pairs": 5, "eval_masks": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """Forty noisy squares in two classes."""
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (4, 4), np.uint8)) for _ in range(40)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["one", "two"])})
    file = tmp_path_factory.mktemp("images") / "noise.parquet"
    rows = {"image": pictures, "label": [i % 2 for i in range(40)]}
    Dataset.from_dict(rows, features=features).to_parquet(file)
    return str(file)


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> MaskedRun:
    output = tmp_path_factory.mktemp("runs") / "masked"
    run = MaskedRun(output=output, data=images, seeds=(0, 1), **TINY)
    train(run)
    return run


def variants(run: MaskedRun) -> dict[str, Variant]:
    return {variant.name: variant for variant in run.variants()}


def perplexities(pairs: MaskedTask, model: torch.nn.Module) -> tuple[float, float]:
    columns = pairs.score(model).columns
    return columns["perplexity_text"], columns["perplexity_patches"]


def rows(run: MaskedRun) -> list[Row]:
    return read_csv(run.output / "results.csv")


def test_a_row_for_every_model_and_seed(finished):
    table = rows(finished)
    assert [(row["model"], row["seed"]) for row in table] == [(n, s) for n in NAMES for s in "01"]
    for row in table:
        assert 1 < float(row["perplexity_patches"]) < 14
        assert 1 < float(row["perplexity_text"]) < 600
        assert row["seen"] == str(4 * 3 * (4 + 4))  # 4 patches, "this picture shows one"
    compared = comparison(table)
    columns, cells = compared.columns, compared.printed()
    assert [line[0] for line in cells] == ["dense", "sparse MoE", "X-MoE", "MH-MoE"]
    text = columns.index("PPL text ↓")
    values = [float(row["perplexity_text"]) for row in table[:2]]
    deviation = abs(values[0] - values[1]) / 2**0.5
    assert cells[0][text] == f"{sum(values) / 2:.1f} ± {deviation:.1f}"


def test_the_page_tells_tokens_from_patches(finished):
    record = from_json((finished.output / "record.json").read_text())
    assert "text" in record.facts["Perplexity of guesses by frequency"]
    for model in record.models:
        assert (model.experts is None) == (model.name == "dense")
        if model.experts:
            assert list(model.experts.by_domain) == ["text", "patches"]
            # 4 patches, 2 pairs to score masked 3 times; each goes to one expert, or to 2 twice.
            choices = 4 if model.name == "mh_moe" else 1
            assert model.experts.assignments["patches"] == [24 * choices]


def test_a_finished_model_is_what_was_measured(finished):
    pairs = read(finished)
    _, curve = pairs.datasets(VARIANTS["dense"], seed=1)
    assert len(curve) == 2 * 3  # half of a tenth of forty, three times
    assert not {x.tobytes() for x in pairs.validation.pixels} & {
        x.tobytes() for x in pairs.test.pixels
    }
    for row in rows(finished):
        assert row["scored_pairs"] == "2"
        directory = finished.output / "models" / f"{row['model']}-seed{row['seed']}"
        model = AutoModel.from_pretrained(directory)
        want = (float(row["perplexity_text"]), float(row["perplexity_patches"]))
        assert perplexities(pairs, model) == pytest.approx(want, abs=1e-3)
        patches = patches_of(in_floats(pairs.training.pixels), finished.patch_size)
        want = torch.from_numpy(pairs.training.visual)
        assert torch.equal(visual_tokens(patches, model.codebook), want)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(pairs.training.tokens[0][: pairs.training.lengths[0]]) in (
        "one", "two", "a picture of one", "a picture of two", "this picture shows one",
        "this picture shows two",
    )  # fmt: skip
    assert model.config.vocab_size == len(tokenizer) == tokenizer.mask_token_id + 1


def test_resumed_equals_never_stopped(finished, tmp_path, capsys):
    """Cut back to what a kill after the first checkpoint of the second model leaves."""
    output = tmp_path / "cut"
    shutil.copytree(finished.output, output)
    (output / "results.csv").unlink()
    for name in NAMES[1:]:
        for seed in (0, 1):
            shutil.rmtree(output / "models" / f"{name}-seed{seed}")
            shutil.rmtree(output / "checkpoints" / f"{name}-seed{seed}" / "checkpoint-4")
    capsys.readouterr()
    train(dataclasses.replace(finished, output=output, resume=True))
    assert "step 2/4" not in capsys.readouterr().out
    for name in NAMES:
        for seed in (0, 1):
            file = f"models/{name}-seed{seed}/model.safetensors"
            got, want = load_file(output / file), load_file(finished.output / file)
            assert_close(got, want, rtol=0, atol=0)
    again = rows(dataclasses.replace(finished, output=output))
    for key in ("perplexity_text", "perplexity_patches"):
        assert [row[key] for row in rows(finished)] == [row[key] for row in again]


def test_perplexity_is_that_of_all_masked_tokens_together(finished):
    """Whatever the batches, and a model that knows nothing has that of its vocabulary."""
    pairs = read(finished)
    model = pairs.model(variants(finished)["mh_moe"], seed=0)
    one, twelve = (
        dataclasses.replace(pairs, run=dataclasses.replace(finished, batch_size=n)) for n in (1, 12)
    )
    assert perplexities(twelve, model) == pytest.approx(perplexities(one, model))
    with torch.no_grad():
        for head in (model.text_head, model.image_head):
            head.weight.zero_()
    vocabularies = (len(pairs.tokenizer), finished.codebook_size)
    assert perplexities(pairs, model) == pytest.approx(vocabularies)


def test_default_models_cost_what_dense_does(images):
    run = dataclasses.replace(MaskedRun(), data=images, codebook_size=16)
    pairs = read(run)
    costs = [pairs.flops(pairs.model(variant, seed=0)) for variant in run.variants()]
    assert costs == pytest.approx([costs[0]] * 4, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_flops_by_formula_are_those_counted(finished, name):
    pairs = read(finished)
    model = pairs.model(variants(finished)[name], seed=0).eval()
    with torch.no_grad():
        counted = measure_flops(lambda: model(**pairs.example(model)))
    assert pairs.flops(model) * pairs.length == pytest.approx(counted)


def test_mixtures_have_the_first_papers_parity():
    sparse, cosine, split = (VARIANTS[name].mlp for name in NAMES[1:])
    assert (sparse.num_experts, sparse.top_k, sparse.expert_dim) == (8, 1, 256)
    assert dataclasses.replace(cosine, router="linear") == sparse
    assert cosine.router == "cosine"
    # f = (256 - 64) / 2 = 96;  E = (2·64·256·8 - 2·64²) · 2 / (2·64·96) = 41.3 → 41
    assert (split.num_heads, split.top_k, split.expert_dim, split.num_experts) == (2, 2, 96, 41)
    assert {(m.glu, m.activation) for m in (sparse, cosine, split)} == {(False, "gelu")}
    assert VARIANTS["dense"].mlp is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": ("moh",)}, "models is 'moh'; it must be one of dense, moe, x_moe, mh_moe"),
        ({"seeds": (1, 1)}, "seeds is (1, 1); each entry may occur once"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"image_size": 0}, "image_size is 0; it must be at least 1"),
        ({"vocab_size": 257}, "vocab_size is 257; it must be at least 258"),
        ({"mask_text": 0.0}, "mask_text is 0.0; it must lie between 0 and 1"),
        ({"mask_image": 1.0}, "mask_image is 1.0; it must lie between 0 and 1"),
        ({"num_heads": 3}, "num_heads is 3; it must divide dim = 64"),
        ({"mlp_dim": 64}, "expert_dim is 64; head and merge layer alone cost as much"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be above 0"),
        ({"resume": True, "overwrite": True}, "resume and overwrite are both set"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MaskedRun(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 3}, "patch_size is 3; it must divide the image size, 4"),
        ({"codebook_size": 500}, "codebook_size is 500; it must lie in 2..144"),
        ({"mask_image": 0.1}, "mask_image is 0.1; of 4 patches"),
        ({"mask_text": 1e-9}, "no token of the 2 captions of half of what is held out"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_is_written(
    images, tmp_path, fields, message
):
    run = MaskedRun(**TINY | {"output": tmp_path / "run", "data": images} | fields)
    with pytest.raises(ValueError, match=re.escape(message)):
        train(run)
    assert not run.output.exists()
