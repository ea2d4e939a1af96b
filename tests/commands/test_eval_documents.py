"""Documents out of local files: the fields, the text as it was, what is refused."""

import json
from pathlib import Path

import pytest

from headwise.commands.eval.documents import SOURCES, read_documents, source_of
from headwise.errors import UnreadableError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def write(path, *entries):
    entries = [{"instruction": text, "answer": answer} for text, answer in entries]
    path.write_text(json.dumps(entries))


def read(task, *directories):
    return read_documents(source_of(task), directories)


def test_numbered_choices_keep_their_spaces(tmp_path):
    text = (
        "Please choose: Why? Say: a\n\nSolution1: one \n\nSolution2: two\n\n"
        "Answer format: solution1/solution2"
    )
    write(tmp_path / "piqa.json", (text, "solution2"))
    assert read("piqa", tmp_path) == [
        {"goal": "Why? Say: a", "sol1": "one ", "sol2": "two", "label": 1}
    ]


def test_choices_on_one_line(tmp_path):
    text = "Choose: Who?\n\nAnswer1: a b. Answer2: c Answer3: d\n\nAnswer format: answer1/…"
    for task in ("arc_easy", "openbookqa"):
        write(tmp_path / f"{task}.json", (text, "answer3"))
        (document,) = read(task, tmp_path)
        assert document["choices"] == {"text": ["a b.", "c", "d"], "label": ["0", "1", "2"]}
        assert document["answerKey"] == "2"
        assert document["question" if task == "arc_easy" else "question_stem"] == "Who?"


def test_a_blank_to_fill(tmp_path):
    text = "Choose: The _ is.\n\nOption1: cat Option2: dog Answer format: option1/option2"
    write(tmp_path / "winogrande.json", (text, "option2"))
    want = {"sentence": "The _ is.", "option1": "cat", "option2": "dog", "answer": "2"}
    assert read("winogrande", tmp_path) == [want]


def test_true_or_false(tmp_path):
    text = "Answer with true or false, question: is it so?\n\nAnswer format: true/false"
    write(tmp_path / "boolq.json", (text, "true"), (text, "false"))
    got = read("boolq_no_passage", tmp_path)
    assert got == [{"question": "is it so", "label": 1}, {"question": "is it so", "label": 0}]


def test_minimal_pairs_out_of_the_first_directory_that_has_them(tmp_path):
    (tmp_path / "empty").mkdir()
    pairs = [{"sentence_good": good, "sentence_bad": "c", "UID": "x"} for good in "ab"]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert read("blimp_some", tmp_path / "empty", tmp_path) == pairs


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tasks names 'boolq', .*boolq_no_passage"):
        source_of("boolq")
    with pytest.raises(ValueError, match=r"data is .*, where there is no piqa\.json"):
        read("piqa", tmp_path)
    (tmp_path / "piqa.json").write_text("not json")
    with pytest.raises(ValueError, match=r"piqa\.json cannot be read as entries in JSON: "):
        read("piqa", tmp_path)
    choices = "Q: q\n\nSolution1: one\n\nSolution2: two\n\nAnswer format: a/b"
    write(tmp_path / "piqa.json", (choices, "solution1"), ("Q: no choices", "solution1"))
    message = r"piqa\.json, entry 2, cannot be read: its instruction is no question"
    with pytest.raises(ValueError, match=message):
        read("piqa", tmp_path)
    write(tmp_path / "piqa.json", (choices, "solution3"))
    message = r"entry 1, cannot be read: its answer is 'solution3' of 2"
    with pytest.raises(ValueError, match=message):
        read("piqa", tmp_path)
    write(tmp_path / "boolq.json", ("Say, question: so?\n\nAnswer format: true/false", "maybe"))
    with pytest.raises(ValueError, match=r"boolq\.json, entry 1, cannot be read: "):
        read("boolq_no_passage", tmp_path)


@pytest.mark.parametrize(
    ("task", "content", "reason"),
    [
        ("piqa", '[{"goal": "q", "sol1": "a", "sol2": "b"}]', "it has no 'instruction'"),
        ("boolq_no_passage", "[{}]", "it has no 'instruction'"),
        ("blimp_some", '{"sentence_good": "a"}', "it has no 'sentence_bad'"),
        ("piqa", '["data"]', "it is 'data' and has no fields"),
        ("piqa", '[{"instruction": 3, "answer": "a"}]', "TypeError: "),
        ("blimp_some", '{"sentence_good": "a", "sentence_bad": 3}', "its sentence_bad is 3"),
    ],
)
def test_what_an_entry_should_look_like_is_said_and_is_read(tmp_path, task, content, reason):
    source = source_of(task)
    (tmp_path / source.file).write_text(content)
    message = f"entry 1, cannot be read: {reason}.*; an entry looks like "
    with pytest.raises(ValueError, match=message) as refused:
        read(task, tmp_path)
    form = str(refused.value).partition("looks like ")[2]
    (tmp_path / source.file).write_text(form if source.file.endswith("l") else f"[{form}]")
    assert len(read(task, tmp_path)) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[]", "holds no documents; an entry looks like"),
        (b"{}", "it is a dict and must be a list"),
        (b"null", "it is a NoneType and must be a list"),
        (b"[" * 100_000, "RecursionError"),
        (b"\xff", "can't decode byte 0xff"),
    ],
)
def test_files_that_hold_no_list_of_documents_are_named(tmp_path, content, reason):
    (tmp_path / "piqa.json").write_bytes(content)
    with pytest.raises(UnreadableError, match=rf"^{tmp_path}/piqa\.json .*{reason}"):
        read("piqa", tmp_path)


@pytest.mark.parametrize("task", [*SOURCES, "blimp_anaphor_number_agreement"])
def test_real_files_are_read_whole(task):
    source = source_of(task)
    directories = [SHARED / "eval", SHARED / "blimp"]
    if not any((directory / source.file).exists() for directory in directories):
        pytest.skip(f"{SHARED} has no {source.file}")
    documents = read_documents(source, directories)
    assert len(documents) >= 500
    for document in documents:
        for value in document.values():
            assert "Answer format" not in str(value)
