"""Streamed mixtures: packing, shares, order, places to go on from, what is held out and refused."""

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader

from headwise.data.mixtures import MOH_LLM, RED_PAJAMA
from headwise.data.sources import Source, sample_domains
from headwise.data.streams import BlockStream
from headwise.data.text import Domain

END = 0


@pytest.fixture(scope="module")
def numbers() -> Tokenizer:
    """The text "3 14" is the tokens 3, 14."""
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(5000)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def write(path: Path, texts: list[str], column: str = "text") -> str:
    rows = datasets.Dataset.from_dict({"id": range(len(texts)), column: texts})
    rows.to_parquet(path) if path.suffix == ".parquet" else rows.to_json(path)
    return str(path)


def source(path: Path, texts: list[str], files: int = 1, **fields) -> Source:
    """The texts in that many files, of the kind that the path's ending names."""
    each = -(-len(texts) // files)
    for i in range(files):
        write(path.with_stem(f"{path.stem}{i}"), texts[i * each : (i + 1) * each])
    builder = "parquet" if path.suffix == ".parquet" else "json"
    pattern = str(path.with_stem(f"{path.stem}*"))
    return Source(builder, data_files=pattern, **{"domain": path.stem} | fields)


def ranges(first: int, last: int, length: int) -> list[str]:
    """Documents of `length` numbers each, which count on from `first`."""
    return [" ".join(map(str, range(i, i + length))) for i in range(first, last, length)]


def stream(sources: list[Source], tokenizer: Tokenizer, **arguments) -> BlockStream:
    defaults = {"sequence_length": 5, "seed": 0, "end": END, "buffer": 7}
    return BlockStream(sources, tokenizer, **defaults | arguments)


def take(blocks: BlockStream | Iterator, count: int) -> list[tuple[int, ...]]:
    return [tuple(block["input_ids"].tolist()) for block in islice(blocks, count)]


def test_documents_are_packed_without_a_gap(tmp_path, numbers):
    texts = ["1 2 3", "4 5", "6 7 8 9 10 11"]
    blocks = stream([source(tmp_path / "a.jsonl", texts)], numbers)
    # Two buffers of 64 documents each: 14 tokens a round, 64 = 21 rounds and 1 document.
    row = list(chain.from_iterable([[*map(int, text.split()), END] for text in texts] * 43))
    first, both = (21 * 14 + 4) // 5, (42 * 14 + 7) // 5
    cut = [tuple(row[i * 5 : i * 5 + 5]) for i in range(both)]
    taken = take(blocks, both)
    assert Counter(taken[:first]) == Counter(cut[:first])
    assert Counter(taken[first:]) == Counter(cut[first:])
    assert taken != cut, "blocks of a buffer are shuffled"


def test_labels_are_the_tokens_and_no_end_is_added_where_there_is_none(tmp_path, numbers):
    blocks = stream([source(tmp_path / "a.jsonl", ["1 2 3"])], numbers, end=None)
    block = next(iter(blocks))
    assert block["labels"].tolist() == block["input_ids"].tolist()
    assert block["labels"] is not block["input_ids"]
    assert set(chain(*take(blocks, 9))) == {1, 2, 3}


def test_weights_are_shares_of_tokens_not_of_documents(tmp_path, numbers):
    books = source(tmp_path / "books.jsonl", ranges(1, 2000, 199), weight=1)
    posts = source(tmp_path / "posts.jsonl", ranges(2001, 2600, 3), weight=3)
    blocks = take(stream([books, posts], numbers), 2000)
    of_books = [any(0 < token <= 2000 for token in block) for block in blocks]
    assert sum(of_books) / len(blocks) == pytest.approx(0.25, abs=0.03)
    of_posts = [any(token > 2000 for token in block) for block in blocks]
    assert [a ^ b for a, b in zip(of_books, of_posts, strict=True)] == [True] * len(blocks)


def test_a_seed_repeats_and_another_has_another_order(tmp_path, numbers):
    sources = [source(tmp_path / "a.parquet", ranges(1, 4000, 3), files=11)]
    again = stream(sources, numbers)
    first = take(again, 100)
    assert take(again, 100) == first == take(stream(sources, numbers), 100)
    orders = {seed: take(stream(sources, numbers, seed=seed), 30) for seed in range(5)}
    # The first blocks come from the first file, which the seed chooses.
    files = {max(chain(*blocks)) // (4000 // 11) for blocks in orders.values()}
    assert len(files) > 1


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("taken", [0, 1, 37, 400])
def test_goes_on_from_its_state_as_if_never_stopped(tmp_path, numbers, ending, taken):
    sources = [
        source(tmp_path / f"a.{ending}", ranges(1, 3000, 7), files=3, weight=2),
        source(tmp_path / f"b.{ending}", ranges(3001, 3100, 11)),
    ]
    never_stopped = iter(stream(sources, numbers))
    take(never_stopped, taken)
    stopped = stream(sources, numbers)
    take(stopped, taken)
    resumed = stream(sources, numbers)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert resumed.state_dict() == stopped.state_dict()
    rest = iter(resumed)
    assert take(rest, 150) == take(never_stopped, 150)
    twice = stream(sources, numbers)
    twice.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    assert take(twice, 150) == take(never_stopped, 150)


def test_resuming_reads_one_buffer_again_and_not_all(tmp_path, numbers):
    texts = ranges(1, 4000, 3)
    stopped = stream([source(tmp_path / "a.jsonl", texts)], numbers)
    take(stopped, 700)
    place = stopped.state_dict()["sources"]["a"]
    assert place["buffers"] > 5
    assert place["taken"] <= 64 * 4 // 5 + 1


def test_a_state_of_other_sources_is_refused(tmp_path, numbers):
    a, b = (stream([source(tmp_path / f"{n}.jsonl", ["1 2"])], numbers) for n in "ab")
    with pytest.raises(ValueError, match=r"state is of sources \['a'\], not \['b'\]"):
        b.load_state_dict(a.state_dict())


def test_one_worker_reads_the_same_and_two_are_refused(tmp_path, numbers):
    sources = [
        source(tmp_path / "a.jsonl", ranges(1, 3000, 7), files=3, weight=2),
        source(tmp_path / "b.parquet", ranges(3001, 3100, 11)),
    ]
    blocks = stream(sources, numbers)
    first = take(blocks, 60)
    assert take(pickle.loads(pickle.dumps(blocks)), 60) == first
    one, two = (DataLoader(blocks, batch_size=None, num_workers=n, timeout=60) for n in (1, 2))
    assert take(iter(one), 60) == first
    with pytest.raises(ValueError, match="dataloader_num_workers is 2"):
        next(iter(two))


def test_first_documents_are_held_out_and_the_next_train_a_tokenizer(tmp_path):
    texts = ["a", " \n", "b", "c", "a", "d", "e", "f"]
    sources = [source(tmp_path / "x.jsonl", texts), source(tmp_path / "y.parquet", texts[::-1])]
    x, y = sample_domains(sources, held_out=2, training=4)
    assert (x.name, list(x.held_out.values())) == ("x", ["a", "b"])
    assert list(x.training.values()) == ["c", "d", "e"], "a is held out wherever it stands"
    assert (y.name, list(y.held_out.values())) == ("y", ["f", "e"])
    assert list(y.training.values()) == ["d", "a", "c", "b"]
    assert not x.training.keys() & x.held_out.keys()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_what_is_held_out_is_never_trained_on(tmp_path, numbers, ending):
    texts = ranges(1, 1000, 9)
    sources = [
        source(tmp_path / f"a.{ending}", [*texts, texts[3]], files=7),
        source(tmp_path / f"b.{ending}", [texts[5], "2000 2001"]),
    ]
    held_out = sample_domains(sources[:1], held_out=13, training=1)
    blocks = take(stream(sources, numbers, held_out=held_out), 2000)
    assert set(chain(*blocks)) == {END, 2000, 2001, *range(13 * 9 + 1, 1000)}


def test_a_repository_is_asked_for_as_its_source_says(monkeypatch, tmp_path):
    asked: list[dict] = []
    local = write(tmp_path / "a.jsonl", ["1", "2"], column="body")
    load = datasets.load_dataset

    def load_dataset(*names: object, **fields: object) -> datasets.IterableDataset:
        asked.append({"names": names} | fields)
        return load("json", split="train", data_files=local, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = Source(
        "owner/rows", "part", split="test", column="body", data_files=("x", "y"), revision="v1"
    )
    (domain,) = sample_domains([hub], held_out=1, training=1)
    assert domain == Domain("owner/rows:part", {"1": "2"}, {"0": "1"})
    assert asked == [
        {
            "names": ("owner/rows", "part"), "split": "test", "data_files": ["x", "y"],
            "revision": "v1", "streaming": True,
        }
    ]  # fmt: skip


@pytest.fixture
def _offline(monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("_offline")
def test_a_source_that_cannot_be_used_is_named(tmp_path, numbers):
    good = source(tmp_path / "good.jsonl", ["1 2"])
    no_column = source(tmp_path / "plain.jsonl", ["1 2"], column="body")
    write(tmp_path / "none.parquet", [])
    empty = Source("parquet", data_files=str(tmp_path / "none.parquet"), domain="none")
    counts = Source("parquet", data_files=write(tmp_path / "n.parquet", ["1"]), column="id")
    cases = {
        r"'owner/none:en' cannot be read.*owner/none": Source("owner/none", "en"),
        r"'json' cannot be read.*no\.jsonl": Source("json", data_files=str(tmp_path / "no.jsonl")),
        r"'plain' has columns \['id', 'text'\]; column is 'body'": no_column,
        "'none' is empty": empty,
        "'parquet' has a int in column 'id'": counts,
        "'blank' has no text but": source(tmp_path / "blank.jsonl", [" ", "\n"]),
    }
    for message, bad in cases.items():
        with pytest.raises(ValueError, match=message):
            stream([good, bad], numbers)


def test_a_source_with_nothing_but_what_is_held_out_is_refused(tmp_path, numbers):
    sources = [source(tmp_path / "a.jsonl", ["1", "2", "1"])]
    with pytest.raises(ValueError, match=r"'a' has 2 documents with text; held_out = 2"):
        sample_domains([source(tmp_path / "a.jsonl", ["1", "2"])], held_out=2, training=9)
    held_out = [Domain("a", {}, {"0": "1", "1": "2"})]
    with pytest.raises(ValueError, match="'a' has no text but what is held out"):
        stream(sources, numbers, held_out=held_out)


def test_arguments_out_of_range_are_refused(tmp_path, numbers):
    one = source(tmp_path / "a.jsonl", ["1 2"])
    with pytest.raises(ValueError, match=r"sources are \['a', 'a'\]"):
        stream([one, one], numbers)
    with pytest.raises(ValueError, match=r"sources are \[\]"):
        sample_domains([], held_out=1, training=1)
    for name in ("sequence_length", "buffer"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            stream([one], numbers, **{name: 0})
    for name in ("held_out", "training"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            sample_domains([one], **{"held_out": 1, "training": 1} | {name: 0})
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"weight is .* for 'a'"):
            Source("json", domain="a", weight=weight)


@pytest.mark.parametrize(("mixture", "total"), [(MOH_LLM, 100), (RED_PAJAMA, 1210)])
def test_the_papers_mixtures_add_up(mixture, total):
    assert sum(source.weight for source in mixture) == pytest.approx(total)
    assert len({source.name for source in mixture}) == len(mixture) == 7
    assert all(source.dataset.count("/") == 1 for source in mixture)
