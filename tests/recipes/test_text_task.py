"""A run's text: from files, from a mixture that is streamed, and one domain at a time."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from headwise.data.streams import BlockStream
from headwise.recipes import train
from headwise.recipes.lm import LanguageModelRun, read
from headwise.recipes.text import domain_names
from headwise.results.rows import read_csv
from headwise.training.comparison import Variant
from tiny import LINES, RUN

TINY = RUN | {"steps": 4, "models": ("moh_mh_moe",)}
ALL, SQUARES = (
    Variant(name=n, label=n, train_on=t) for n, t in (("all", ()), ("one", ("squares",)))
)


@pytest.fixture
def mixture(tmp_path: Path) -> str:
    """A file that names two sources of 300 documents each."""
    sources = []
    for name, power in (("squares", 2), ("cubes", 3)):
        rows = [{"text": f"number {i} to the {power} is {i**power}. " * 3} for i in range(300)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = str(tmp_path / f"{name}.jsonl")
        sources.append({"dataset": "json", "data_files": files, "domain": name, "weight": power})
    (tmp_path / "powers.mixture.json").write_text(json.dumps(sources))
    return str(tmp_path / "powers.mixture.json")


def test_a_mixture_is_streamed_and_its_held_out_documents_are_scored(mixture, tmp_path):
    run = LanguageModelRun(output=tmp_path / "run", data=mixture, **TINY)
    train(run)
    row = result(run)
    assert float(row["perplexity_squares"]) > 1 < float(row["perplexity_cubes"])


@pytest.mark.parametrize("streamed", [True, False])
def test_killed_between_the_last_step_and_the_result(mixture, tmp_path, streamed):
    """Nothing is trained any more: a stream has no end at which Trainer would stop by itself."""
    (tmp_path / "text.txt").write_text(LINES)
    data = mixture if streamed else str(tmp_path / "text.txt")
    run = LanguageModelRun(output=tmp_path / "run", data=data, save_every=2, **TINY)
    train(run)
    finished = run.output / "models" / "moh_mh_moe-seed0"
    weights, row = load_file(finished / "model.safetensors"), result(run)
    shutil.rmtree(finished)
    train(dataclasses.replace(run, resume=True))
    assert_close(load_file(finished / "model.safetensors"), weights, rtol=0, atol=0)
    assert result(run) == row | {"per_second": ""}


def result(run: LanguageModelRun) -> dict[str, str]:
    (row,) = read_csv(run.output / "results.csv")
    return row


def test_a_variant_streams_only_the_sources_that_it_trains_on(mixture):
    run = LanguageModelRun(data=mixture, **TINY)
    text = read(run)
    assert list(text.training) == domain_names(mixture) == ["squares", "cubes"]
    both, one = (text.datasets(variant, 0)[0] for variant in (ALL, SQUARES))
    assert isinstance(both, BlockStream)
    written = [text.tokenizer.decode(next(iter(one))["input_ids"]) for _ in range(20)]
    assert not any("to the 3" in block for block in written)


def test_a_variant_draws_only_from_the_domains_that_it_trains_on(tmp_path):
    for name in ("squares", "cubes"):
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {i} " * 30)
    run = LanguageModelRun(data=str(tmp_path), **TINY)
    text = read(run)
    assert set(text.training) == {"squares", "cubes"} == set(domain_names(str(tmp_path)))
    blocks, curve = text.datasets(ALL, 0)
    assert blocks.shares == {"cubes": 0.5, "squares": 0.5}
    assert text.datasets(SQUARES, 0)[0].shares == {"squares": 1.0}
    assert len(curve) == 4  # two files of each are held out


def test_text_is_scored_as_it_is_and_mistyped(tmp_path):
    (tmp_path / "text.txt").write_text(LINES)
    fields = TINY | {"models": ("dense",), "steps": 60, "eval_blocks_per_file": 20}
    data = str(tmp_path / "text.txt")
    run = LanguageModelRun(output=tmp_path / "run", data=data, typos=(0.005, 0.5), **fields)
    train(run)
    row = result(run)
    scored = [key for key in row if key.startswith("perplexity") and not key.endswith(("1", "3"))]
    assert scored == ["perplexity_text" + typos for typos in ("", "_typos_0.5", "_typos_50")]
    clean, few, many = (float(row[key]) for key in scored)
    # Of the four letters in "line" two are wrong, or one in fifty.
    assert clean < few < many


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[", "cannot be read as a list of sources"),
        ('[{"weight": 2}]', "missing 1 required positional argument: 'dataset'"),
        ('[{"dataset": "a", "weight": -1}]', "weight is -1"),
        ("[]", "sources are"),
    ],
)
def test_a_broken_mixture_is_refused(written, message, tmp_path):
    file = tmp_path / "x.mixture.json"
    file.write_text(written)
    with pytest.raises(ValueError, match=message):
        read(dataclasses.replace(LanguageModelRun(**TINY), data=str(file)))


def test_a_mixture_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"nowhere\.mixture\.json cannot be read"):
        domain_names("nowhere.mixture.json")


def test_a_mixture_that_changed_is_not_resumed(mixture, tmp_path):
    run = LanguageModelRun(output=tmp_path / "run", data=mixture, **TINY)
    train(run)
    sources = json.loads(Path(mixture).read_text())
    sources[0]["weight"] = 5
    Path(mixture).write_text(json.dumps(sources))
    with pytest.raises(ValueError, match="the data have changed since the run"):
        train(dataclasses.replace(run, resume=True))
