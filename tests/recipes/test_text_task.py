"""A run's text: from files, from a mixture that is streamed, and one domain at a time."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from headwise.data.streams import BlockStream
from headwise.data.text import held_out
from headwise.recipes import train
from headwise.recipes.lm import LanguageModelRun, read
from headwise.recipes.scales import tiny
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
    # Of 200 documents that are held out; one block of each counts, whose first token does not.
    counts = [int(row[f"scored_{what}_squares"]) for what in ("files", "tokens")]
    assert 0 < counts[0] < 200
    assert counts[1] == counts[0] * (RUN["sequence_length"] - 1)


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
    # Two files of each are held out, of which one is validated on and one scored.
    assert {len(files) for half in (text.validation, text.test) for files in half.values()} == {1}
    lengths = [len(x) for files in text.validation.values() for x in files.values()]
    assert len(curve) == sum(length // 16 for length in lengths)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> str:
    """Two hundred documents, each of numbers that are in no other."""
    folder = tmp_path_factory.mktemp("pages")
    for i in range(200):
        numbers = " ".join(map(str, range(1000 * i, 1000 * i + 40 + i)))
        (folder / f"{i}.txt").write_text(numbers)
    return str(folder)


def test_halves_of_what_is_held_out_have_no_file_in_common(pages):
    text = read(LanguageModelRun(data=pages, **TINY))
    (validation,), (test,) = text.validation.values(), text.test.values()
    assert len(validation.keys() | test.keys()) == 20
    assert not validation.keys() & test.keys()
    sizes = [sum(map(len, half.values())) for half in (validation, test)]
    assert abs(sizes[0] - sizes[1]) < max(map(len, test.values()))
    facts = text.facts()
    found = [facts[f"Held out, for the {what}"] for what in ("validation curve", "scores")]
    (domain,) = text.test
    assert found == [
        f"{domain} {len(half)} files, {size:,} tokens"
        for half, size in zip((validation, test), sizes, strict=True)
    ]


def test_the_curve_is_64_blocks_over_all_of_the_validation_half_for_every_model(pages):
    text = read(LanguageModelRun(data=pages, **TINY))
    (files,) = text.validation.values()
    whole = [x[i : i + 16] for x in files.values() for i in range(0, len(x) - 15, 16)]
    assert len(whole) > 64
    curve, other = (text.datasets(v, s)[1] for v, s in ((ALL, 0), (text.run.variants()[1], 5)))
    assert [x["input_ids"].tolist() for x in curve] == [x["input_ids"].tolist() for x in other]
    assert len(curve) == 64
    picks = np.linspace(0, len(whole) - 1, 64).round().astype(int)
    assert [x["labels"].tolist() for x in curve] == [whole[i].tolist() for i in picks]


def test_the_test_half_is_scored_and_the_other_is_not(pages):
    text = read(LanguageModelRun(data=pages, **TINY | {"eval_blocks_per_file": 2}))
    (domain,), (files,) = text.test, text.test.values()
    model = text.model(ALL, 0)
    columns = text.score(model).columns
    assert columns[f"scored_files_{domain}"] == len(files)
    # The first and the last block of each file, less the first token of each.
    tokens = [16 + ((len(x) - 1) % 16 + 1) - 2 for x in files.values()]
    assert columns[f"scored_tokens_{domain}"] == sum(tokens)
    # Worked out again, a file at a time.
    nats = 0.0
    for x in files.values():
        for block in (x[:16], x[(len(x) - 1) // 16 * 16 :]):
            ids = torch.from_numpy(block.astype(np.int64))[None]
            nats += model(ids, labels=ids).loss.item() * (len(block) - 1)
    assert columns[f"perplexity_{domain}"] == pytest.approx(np.exp(nats / sum(tokens)), rel=1e-4)


def test_a_run_of_other_halves_is_not_resumed(pages):
    text = read(LanguageModelRun(data=pages, **TINY))
    swapped = dataclasses.replace(text, validation=text.test, test=text.validation)
    assert swapped.fingerprint() != text.fingerprint()


def test_a_single_file_too_short_to_halve_is_refused(tmp_path):
    """A letter and the end of the text: one token for each half, whose loss would be of none."""
    data, names = tmp_path / "data", {"first", "second"}
    for domain in ("long", "short"):
        (data / domain).mkdir(parents=True)
        for name in names:
            (data / domain / name).write_text(LINES)
    (short,) = held_out(names)
    (data / "short" / short).write_text("l")
    run = LanguageModelRun(output=tmp_path / "run", data=str(data), **TINY)
    with pytest.raises(ValueError, match=r"too little of domain 'short': one file of 2 tokens"):
        train(run)
    assert not run.output.exists()


def test_the_studies_score_20_000_tokens_of_prose():
    """Of the text that this Python carries, by a tokenizer trained as the studies train it."""
    run = dataclasses.replace(tiny("moh-budget"), dim=16, num_layers=1, mlp_dim=16)
    text = read(run)
    prose = dataclasses.replace(text, test={"prose": text.test["prose"]})
    columns = prose.score(prose.model(run.variants()[0], 0)).columns
    assert columns["scored_tokens_prose"] >= 20_000
    assert columns["scored_files_prose"] == len(text.test["prose"]) >= 10


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
