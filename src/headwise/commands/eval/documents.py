"""Documents of a benchmark out of local files, in the fields of the harness's own task for it."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headwise.errors import UnreadableError, reading

Document = dict[str, Any]

BLIMP = "blimp_"
_INSTRUCTION = re.compile(
    r"[^:]*: (?P<question>.*?)\n\n(?:Answer|Solution|Option)1: (?P<choices>.*)"
    r"(?:\n\n| )Answer format: \S+",
    re.DOTALL,
)
_NEXT_CHOICE = re.compile(r"(?:\n\n| )(?:Answer|Solution|Option)[2-9]: ")
_TRUE_OR_FALSE = re.compile(
    r"[^:]*question: (?P<question>.*?)\?*\n\nAnswer format: true/false", re.DOTALL
)


class Source(NamedTuple):
    """A local form of a task: whose prompt and scoring it has, its file, how to read an entry.

    Forms are those of LLM-Adapters (arXiv 2304.01933) and of BLiMP (arXiv 1912.00582).
    """

    task: str
    file: str
    form: str
    read: Callable[[Document], Document]
    changes: Document


_FORM = (
    '{"instruction": "Choose: QUESTION\\n\\nSolution1: …\\n\\nSolution2: …\\n\\n'
    'Answer format: solution1/solution2", "answer": "solution1"}'
)
_TRUE_OR_FALSE_FORM = (
    '{"instruction": "Answer the question: QUESTION?\\n\\nAnswer format: true/false", '
    '"answer": "true"}'
)
_PAIR_FORM = '{"sentence_good": "…", "sentence_bad": "…"}'


def _piqa(entry: Document) -> Document:
    goal, choices, label = _choices(entry)
    return {"goal": goal, "sol1": choices[0], "sol2": choices[1], "label": label}


def _arc(entry: Document) -> Document:
    question, choices, answer = _choices(entry)
    labels = [str(index) for index in range(len(choices))]
    return {
        "question": question,
        "choices": {"text": choices, "label": labels},
        "answerKey": labels[answer],
    }


def _openbookqa(entry: Document) -> Document:
    document = _arc(entry)
    return document | {"question_stem": document["question"]}


def _winogrande(entry: Document) -> Document:
    sentence, (one, two), answer = _choices(entry)
    return {"sentence": sentence, "option1": one, "option2": two, "answer": str(answer + 1)}


def _boolq(entry: Document) -> Document:
    match = _TRUE_OR_FALSE.fullmatch(entry["instruction"])
    if match is None:
        raise ValueError("its instruction is no question with true or false")
    return {"question": match["question"], "label": ("false", "true").index(entry["answer"])}


def _choices(entry: Document) -> tuple[str, list[str], int]:
    """Question, choices and the place of the right one, of an instruction that lists them."""
    match = _INSTRUCTION.fullmatch(entry["instruction"])
    if match is None:
        raise ValueError("its instruction is no question with numbered choices")
    choices = _NEXT_CHOICE.split(match["choices"])
    answer = int(entry["answer"][-1]) - 1
    if not 0 <= answer < len(choices):
        raise ValueError(f"its answer is {entry['answer']!r} of {len(choices)}")
    return match["question"], choices, answer


def _minimal_pair(entry: Document) -> Document:
    for field in ("sentence_good", "sentence_bad"):
        if not isinstance(entry[field], str):
            raise ValueError(f"its {field} is {entry[field]!r} and must be text")
    return entry


# The files keep no passages, so this is another task than boolq, and has another name.
_NO_PASSAGE = {"doc_to_text": "Question: {{question}}?\nAnswer:"}
SOURCES = {
    "arc_easy": Source("arc_easy", "arc_easy.json", _FORM, _arc, {}),
    "boolq_no_passage": Source("boolq", "boolq.json", _TRUE_OR_FALSE_FORM, _boolq, _NO_PASSAGE),
    "openbookqa": Source("openbookqa", "openbookqa.json", _FORM, _openbookqa, {}),
    "piqa": Source("piqa", "piqa.json", _FORM, _piqa, {}),
    "winogrande": Source("winogrande", "winogrande.json", _FORM, _winogrande, {}),
}


def source_of(task: str) -> Source:
    """The local form of a task.

    Raises:
        ValueError: If it has none.
    """
    if task.startswith(BLIMP):
        return Source(task, f"{task.removeprefix(BLIMP)}.jsonl", _PAIR_FORM, _minimal_pair, {})
    if task not in SOURCES:
        known = ", ".join((*SOURCES, f"{BLIMP}…"))
        raise ValueError(f"tasks names {task!r}, which data has no form of; there are {known}")
    return SOURCES[task]


def read_documents(source: Source, directories: Sequence[Path]) -> list[Document]:
    """The documents of the first directory that has the file.

    Raises:
        ValueError: If none has it, or an entry is of another form.
    """
    paths = [path for directory in directories if (path := directory / source.file).is_file()]
    if not paths:
        where = " or ".join(map(str, directories))
        raise ValueError(f"data is {where}, where there is no {source.file}")
    documents = []
    for number, entry in enumerate(_entries(paths[0]), start=1):
        with reading(f"{paths[0]}, entry {number},", hint=f"an entry looks like {source.form}"):
            documents.append(source.read(_fields(entry)))
    if not documents:
        raise UnreadableError(f"{paths[0]} holds no documents; an entry looks like {source.form}")
    return documents


def _entries(path: Path) -> list[Any]:
    with reading(path, "entries in JSON"):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.removesuffix("\n").split("\n")]
        if not isinstance(entries := json.loads(text), list):
            raise ValueError(f"it is a {type(entries).__name__} and must be a list")
        return entries


def _fields(entry: Any) -> Document:
    if not isinstance(entry, dict):
        raise ValueError(f"it is {entry!r} and has no fields")
    return entry
