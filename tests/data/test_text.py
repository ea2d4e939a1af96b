"""Text from every place it may come from, the tokenizer, and what is refused."""

import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer

from headwise.data.text import (
    END_OF_TEXT,
    Domain,
    halve,
    load_text,
    some_blocks,
    tokenize,
    train_tokenizer,
)


def names(domains: list[Domain]) -> dict[str, list[str]]:
    return {d.name: sorted(d.training | d.held_out) for d in domains}


@pytest.fixture(scope="module")
def embedded() -> list[Domain]:
    return load_text()


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    words = Domain("words", {"a": "the cat and the hat\n" * 20}, {"b": "zebra" * 99})
    return train_tokenizer([words], vocab_size=265)


def test_embedded_text_is_code_and_prose(embedded):
    code, prose = embedded
    assert (code.name, prose.name) == ("code", "prose")
    assert 5e6 < sum(map(len, code.training.values())) < 50e6
    assert 2e5 < sum(map(len, prose.training.values())) < 5e6
    assert "argparse.py" in code.training | code.held_out
    assert "def " in "".join(code.held_out.values())


def test_embedded_text_leaves_out_tests_and_installed_packages(embedded):
    code = embedded[0].training | embedded[0].held_out
    assert not {"test", "tests", "site-packages"} & {
        part for name in code for part in name.split("/")
    }


def test_one_document_in_ten_is_held_out_of_prose_in_three_and_never_trained_on(embedded):
    for domain, one_in in zip(embedded, (10, 3), strict=True):
        held_out, total = len(domain.held_out), len(domain.training | domain.held_out)
        assert held_out == total // one_in
        assert not domain.training.keys() & domain.held_out.keys()


def tokens(*sizes: int) -> dict[str, np.ndarray]:
    """Files of so many tokens, none of which occurs twice."""
    ends = np.cumsum(sizes)
    return {f"{n} tokens": np.arange(end - n, end) for n, end in zip(sizes, ends, strict=True)}


def test_files_are_halved_whole():
    files = tokens(3, 13, 5, 7)
    validation, test = halve(files)
    # 13 to the test half; 7, then 5, to the other; 3 there, too: 12 are fewer than 13.
    assert list(validation) == ["3 tokens", "5 tokens", "7 tokens"]
    assert list(test) == ["13 tokens"]
    assert all((validation | test)[name] is files[name] for name in files)


def test_a_single_file_is_cut_in_its_middle():
    validation, test = halve(tokens(7))
    assert [list(half) for half in (validation, test)] == [["7 tokens"]] * 2
    assert [half["7 tokens"].tolist() for half in (validation, test)] == [[0, 1, 2], [3, 4, 5, 6]]


def test_blocks_are_spread_over_the_whole_ones_of_all_files():
    files = tokens(7, 2, 3, 11).values()  # begin at 0, 7, 9 and 12; have 2, 0, 1 and 3 blocks
    starts = [block[0] for block in some_blocks(files, 3, most=99)]
    assert starts == [0, 3, 9, 12, 15, 18]
    assert [block.tolist() for block in some_blocks(files, 3, most=2)] == [[0, 1, 2], [18, 19, 20]]
    assert some_blocks(files, 13, most=2) == []


def test_split_depends_on_names_alone(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    first = load_text(str(tmp_path))[0].held_out.keys()
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"another {i}")
    assert load_text(str(tmp_path))[0].held_out.keys() == first


def test_single_file_becomes_runs_of_whole_lines(tmp_path):
    lines = [f"line {i}\n" for i in range(120)]
    file = tmp_path / "notes.txt"
    file.write_text("".join(lines))
    (domain,) = load_text(str(file))
    pieces = domain.training | domain.held_out
    assert domain.name == "notes"
    assert (len(pieces), len(domain.held_out)) == (40, 4)
    assert sorted("".join(pieces.values()).splitlines(keepends=True)) == sorted(lines)


def test_directory_is_one_domain_of_files(tmp_path):
    for name in ("a.txt", "b.md", ".hidden"):
        (tmp_path / name).write_text("text")
    assert names(load_text(str(tmp_path))) == {tmp_path.name: ["a.txt", "b.md"]}


def test_subdirectories_are_domains(tmp_path):
    for name in ("x/a", "x/b", "x/.git/c", "y/a", "y/deep/b", ".cache/a", ".cache/b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    assert names(load_text(str(tmp_path))) == {"x": ["a", "b"], "y": ["a", "deep/b"]}


def test_files_beside_subdirectories_are_refused(tmp_path):
    for name in ("x/a", "x/b", "beside.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=rf"{tmp_path}/beside\.txt lies beside"):
        load_text(str(tmp_path))


def test_files_without_text_do_not_count(tmp_path):
    for name, text in {"a": "text", "b": "text", "blank": " \n"}.items():
        (tmp_path / name).write_text(text)
    assert names(load_text(str(tmp_path)))[tmp_path.name] == ["a", "b"]


@pytest.mark.parametrize("files", [{}, {"a": b""}, {"a": b"text"}, {"a": b"text", "b": b" "}])
def test_too_little_text_is_refused(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*at least 2"):
        load_text(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"one line"])
def test_too_short_file_is_refused(tmp_path, content):
    (tmp_path / "short.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"short.*at least 2"):
        load_text(str(tmp_path / "short.txt"))


def test_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "good").write_text("text")
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    for data in (tmp_path, tmp_path / "latin"):
        with pytest.raises(ValueError, match=rf"{tmp_path}/latin is not UTF-8"):
            load_text(str(data))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
def test_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "good").write_text("text")
    (tmp_path / "unreadable").symlink_to("/proc/self/mem")
    with pytest.raises(ValueError, match=rf"{tmp_path}/unreadable cannot be read"):
        load_text(str(tmp_path))


@pytest.mark.parametrize(("text", "documents"), [("one line", "only one document"), ("", "no doc")])
def test_too_little_text_is_named_as_it_was_typed(tmp_path, text, documents):
    (tmp_path / "short.txt").write_text(text)
    for data in (tmp_path, tmp_path / "short.txt"):
        with pytest.raises(ValueError, match=rf"data is .*short\.txt, which holds {documents}"):
            load_text(str(data))


@pytest.mark.parametrize("data", ["/no/such", "./no", "~/no/such", "no/such/file", "no.txt"])
def test_missing_path_is_refused_at_once(data):
    began = time.perf_counter()
    with pytest.raises(ValueError, match=rf"'{data}'; there is no such file"):
        load_text(data)
    assert time.perf_counter() - began < 1


@pytest.fixture
def hub(monkeypatch) -> list[tuple]:
    """Stands for the Hub: load_dataset returns a real dataset; the calls are listed."""
    calls: list[tuple] = []
    rows = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(10)], "n": range(10)})

    def load_dataset(*args: object, split: str) -> datasets.Dataset:
        calls.append((*args, split))
        return rows.remove_columns("text") if args[0] == "numbers" else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_dataset_by_name(hub):
    (domain,) = load_text("owner/rows")
    assert domain.name == "owner/rows"
    assert sorted((domain.training | domain.held_out).values()) == [f"row {i}" for i in range(10)]
    load_text("owner/rows:part")
    assert hub == [("owner/rows", None, "train"), ("owner/rows", "part", "train")]


def test_dataset_without_text_is_refused(hub):
    with pytest.raises(ValueError, match=r"'numbers' has columns \['n'\]; one must be 'text'"):
        load_text("numbers")


def test_dataset_that_cannot_be_loaded_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'owner/none'.*no Hugging Face dataset"):
        load_text("owner/none")
    assert "asking the Hugging Face hub" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["", "the cat", " \t\n\n  x", "naïve Ω 漢字 🙂 \u200f\u0000", END_OF_TEXT[:-1], "é\u0301"],
)
def test_tokenizer_gives_any_text_back(bpe, text):
    assert bpe.decode(bpe.encode(text).ids) == text


def test_tokenizer_has_every_byte_and_learned_words(bpe):
    assert bpe.get_vocab_size() == 265
    assert bpe.token_to_id(END_OF_TEXT) == 0
    assert len(bpe.encode("the cat").ids) < 7


def test_every_document_ends_with_the_end_of_text(bpe):
    tokens = tokenize(bpe, ["the", "", "cat"], end=0)
    the, cat = (bpe.encode(word).ids for word in ("the", "cat"))
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [*the, 0, 0, *cat, 0]


def test_more_documents_than_a_batch(bpe):
    documents = [f"{i}" for i in range(1000)]
    assert bpe.decode(tokenize(bpe, documents, end=0).tolist()) == "".join(documents)


def test_a_subdirectory_with_one_file_is_cut_into_runs_of_lines(tmp_path):
    for name in ("x/a", "x/b", "y/only"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(f"line {i}\n" for i in range(60)))
    x, y = load_text(str(tmp_path))
    assert (x.name, y.name) == ("x", "y")
    assert len(y.training) > 20
    assert y.held_out
