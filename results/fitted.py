"""Write results/fitted.csv: what SmolLM2 loses by routers fitted to a text, before any tuning.

Perplexity with every head on, by query norm and by fitted routers, at 7 to 3 of 9 heads, fitted to
one kind of text and to four; each on four kinds of text that nothing was fitted to. Two minutes a
conversion on 2 cores; what is in the file already is kept.

usage: results/fitted.py MODEL WIKITEXT_VALID WIKITEXT_TEST DRAMA, the model as docs/convert.md
makes it and three text files; code and reference prose are those of the Python that runs it
"""

import os
import pydoc_data.topics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import headwise
from headwise.commands.calibration import perplexity, twin
from headwise.results.rows import Row, environment, read_csv, write_csv

LENGTH = 512
TO_FIT, TO_MEASURE = 16_384, 8_192  # tokens
_NUM_FIT = TO_FIT // LENGTH
KINDS = ("encyclopedia", "reference prose", "drama", "code")
OUTPUT = Path(__file__).parent / "fitted.csv"


class Case(NamedTuple):
    """A conversion: of how many heads of 9 on average, by which router, fitted to what and how.

    By query norm, active - 2 heads are always on: those that the loss's gradient says.
    """

    active: int
    router: str
    fitted_to: str = ""
    allocate: str = ""


CASES = [
    Case(9, "none"),
    *(
        case
        for active in (7, 6, 5, 4, 3)
        for case in (
            Case(active, "query_norm", "encyclopedia"),
            Case(active, "fitted", "encyclopedia", "loss"),
            Case(active, "fitted", "four kinds", "loss"),
        )
    ),
    *(Case(active, "fitted", "encyclopedia", "alike") for active in (7, 6)),
]


def main(path: str, valid: str, test: str, drama: str) -> None:
    """Measure the cases that are missing."""
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    to_fit, to_measure = texts(tokenizer, *map(Path, (valid, test, drama)))
    rows: list[Row] = read_csv(OUTPUT) if OUTPUT.exists() else []
    done = {Case(int(r["active"]), r["router"], r["fitted_to"], r["allocate"]) for r in rows}
    for case in CASES:
        if case not in done:
            rows += measured(model, case, to_fit, to_measure)
            write_csv(OUTPUT, rows)


def texts(
    tokenizer: Any, valid: Path, test: Path, drama: Path
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """By kind the pieces to fit to, and those to measure on, none of them in both."""

    def pieces(text: str) -> list[Tensor]:
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
        return list(ids.split(LENGTH, dim=1))[:-1]

    topics = pydoc_data.topics.topics
    library = sorted(Path(os.__file__).parent.glob("*.py"))[20:80]
    whole = {
        "reference prose": "\n\n".join(topics[name] for name in sorted(topics)),
        "drama": drama.read_text(),
        "code": "\n\n".join(file.read_text(errors="replace") for file in library),
    }
    fits = {"encyclopedia": pieces(valid.read_text())}
    measures = {"encyclopedia": pieces(test.read_text())}
    for kind, text in whole.items():
        found = pieces(text)
        fits[kind], measures[kind] = found[:_NUM_FIT], found[_NUM_FIT:]
    return fits, {kind: found[: TO_MEASURE // LENGTH] for kind, found in measures.items()}


def measured(
    model: Any, case: Case, to_fit: dict[str, list[Tensor]], to_measure: dict[str, list[Tensor]]
) -> Iterator[Row]:
    """A row for each kind of text."""
    start = time.perf_counter()
    converted = model
    kinds = KINDS if case.fitted_to == "four kinds" else (case.fitted_to,)
    each = _NUM_FIT // len(kinds)
    ids = [piece for kind in kinds for piece in to_fit.get(kind, [])[:each]]
    batches = [{"input_ids": piece, "labels": piece} for piece in ids]
    if case.router == "query_norm":
        config = headwise.MoHConfig(shared=case.active - 2, active=case.active)
        heads: Any = headwise.calibrate(model, batches, config)
        converted = headwise.convert(twin(model), attention=heads)
    elif case.router == "fitted":
        config = headwise.MoHConfig(router="fitted", active=case.active)
        heads = headwise.fit(model, batches, config, allocate=case.allocate)  # type: ignore[arg-type]
        converted = headwise.convert(twin(model), attention=heads)
    seconds = round(time.perf_counter() - start, 1)
    for row in of_each_kind(converted, f"{case.active} heads", to_measure):
        yield {**case._asdict(), "seconds": seconds, **row}


def of_each_kind(model: Any, title: str, to_measure: dict[str, list[Tensor]]) -> Iterator[Row]:
    """The perplexity of each kind of text, and what it was measured on."""
    for kind, found in to_measure.items():
        batches = [{"input_ids": piece, "labels": piece} for piece in found]
        yield {
            "text": kind,
            "perplexity": round(perplexity(model, f"{title}, {kind}", batches), 4),
            "tokens": len(found) * LENGTH,
            **environment("fp32"),
        }


if __name__ == "__main__":
    main(*sys.argv[1:])
