"""The masked recipe: equal cost, a step of every model, resumed, and what it measures."""

import csv
import dataclasses
import re
import shutil
from typing import get_args

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel, AutoTokenizer

from headwise.data.patches import in_floats, patches_of, visual_tokens
from headwise.recipes import MaskedRun, carry_out, masked
from headwise.recipes.masked import LABELS, MaskedName, build_model, flops_per_token
from headwise.recipes.masked_data import masked_pairs, prepare
from headwise.recipes.masked_table import comparison
from headwise.recipes.masked_training import perplexities

NAMES = get_args(MaskedName)
TINY = {
    "dim": 12, "num_heads": 2, "num_layers": 2, "mlp_dim": 24, "codebook_size": 7,
    "vocab_size": 300, "num_experts": 3, "batch_size": 3, "steps": 4, "warmup_steps": 1,
    "log_every": 1, "eval_every": 2, "save_every": 2, "eval_pairs": 5, "eval_masks": 3,
}  # fmt: skip
SIZES = {"image_size": 8, "num_channels": 1, "vocab_size": 31, "max_text_length": 5}


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
    carry_out(run)
    return run


def rows(run: MaskedRun) -> list[dict[str, str]]:
    with (run.output / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_row_for_every_model_and_seed(finished):
    table = rows(finished)
    assert [(row["model"], row["seed"]) for row in table] == [(n, s) for n in NAMES for s in "01"]
    for row in table:
        assert 1 < float(row["perplexity_patches"]) < 14
        assert 1 < float(row["perplexity_text"]) < 600
        assert 1 < float(row["guess_patches"]) <= 7
        assert row["tokens"] == str(4 * 3 * (4 + 4))  # 4 patches, "this picture shows one"
    columns, cells = comparison(table)
    assert [line[0] for line in cells] == ["guess", *LABELS.values()]
    text = columns.index("PPL text ↓")
    values = [float(row["perplexity_text"]) for row in table[:2]]
    deviation = abs(values[0] - values[1]) / 2**0.5
    assert cells[1][text] == f"{sum(values) / 2:.3f} ± {deviation:.3f}"


def test_a_finished_model_is_what_was_measured(finished):
    pairs = prepare(finished)
    _, held_out = masked_pairs(finished, pairs, seed=1)
    assert len(held_out) == 4 * 3  # a tenth of forty, three times
    for row in rows(finished):
        directory = finished.output / "models" / f"{row['model']}-seed{row['seed']}"
        model = AutoModel.from_pretrained(directory)
        want = (float(row["perplexity_text"]), float(row["perplexity_patches"]))
        assert perplexities(model, held_out, batch_size=5) == pytest.approx(want, abs=1e-3)
        patches = patches_of(in_floats(pairs.training.pixels), finished.patch_size)
        assert torch.equal(
            visual_tokens(patches, model.codebook), torch.from_numpy(pairs.training.visual)
        )
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
    carry_out(dataclasses.replace(finished, output=output, resume=True))
    assert "step 2/4" not in capsys.readouterr().out
    for name in NAMES:
        weights = (f"models/{name}-seed{seed}/model.safetensors" for seed in (0, 1))
        for file in weights:
            assert_close(
                load_file(output / file), load_file(finished.output / file), rtol=0, atol=0
            )
    for key in ("perplexity_text", "perplexity_patches"):
        assert [row[key] for row in rows(finished)] == [
            row[key] for row in rows(dataclasses.replace(finished, output=output))
        ]


def test_perplexity_is_that_of_all_masked_tokens_together(finished):
    """Whatever the batches, and a model that knows nothing has that of its vocabulary."""
    pairs = prepare(finished)
    _, held_out = masked_pairs(finished, pairs, seed=0)
    model = build_model(finished, "mh_moe", sizes=pairs.sizes(), codebook=pairs.codebook, seed=0)
    want = perplexities(model, held_out, batch_size=1)
    assert perplexities(model, held_out, batch_size=12) == pytest.approx(want)
    with torch.no_grad():
        for head in (model.text_head, model.image_head):
            head.weight.zero_()
    assert perplexities(model, held_out, batch_size=5) == pytest.approx(
        (len(pairs.tokenizer), finished.codebook_size)
    )


@pytest.mark.parametrize("name", NAMES)
def test_default_models_cost_what_dense_does(name):
    def flops(name: str) -> float:
        codebook = torch.zeros(64, 4)
        return flops_per_token(build_model(masked(), name, sizes=SIZES, codebook=codebook, seed=0))

    assert flops(name) == pytest.approx(flops("dense"), rel=0.01)


def test_mixtures_have_the_first_papers_parity():
    run = masked()
    sparse, cosine, split = (run.mixture(name) for name in NAMES[1:])
    assert (sparse.num_experts, sparse.top_k, sparse.expert_dim) == (8, 1, 256)
    assert dataclasses.replace(cosine, router="linear") == sparse
    assert cosine.router == "cosine"
    # f = (256 - 64) / 2 = 96;  E = (2·64·256·8 - 2·64²) · 2 / (2·64·96) = 41.3 → 41
    assert (split.num_heads, split.top_k, split.expert_dim, split.num_experts) == (2, 2, 96, 41)
    assert {(m.glu, m.activation) for m in (sparse, cosine, split)} == {(False, "gelu")}
    assert run.mixture("dense") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": ()}, "models is ()"),
        ({"models": ("moh",)}, "models is 'moh'"),
        ({"seeds": (1, 1)}, "seeds is (1, 1); it takes one entry or more, each once"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
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
        ({"mask_text": 1e-9}, "no token of the 4 held-out captions is masked in 3 tries"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_is_written(
    images, tmp_path, fields, message
):
    run = MaskedRun(**TINY | {"output": tmp_path / "run", "data": images} | fields)
    with pytest.raises(ValueError, match=re.escape(message)):
        carry_out(run)
    assert not run.output.exists()
