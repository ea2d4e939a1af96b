"""What models are compared by: which columns of their rows say how good they are."""

import math
from typing import Any, NamedTuple


class Measure(NamedTuple):
    """A column of a row that tells good models from bad.

    Attributes:
        key: Of the row.
        column: Head of its column in tables; its arrow says which way is better.
        subject: What it was measured on; empty where that is everything.
        quantity: What it is, for the axis of a figure.
        minor: Whether a narrow table does without it.
    """

    key: str
    column: str
    subject: str
    quantity: str
    minor: bool = False

    @property
    def sign(self) -> int:
        """1 where less is better, -1 where more is."""
        return 1 if self.column.endswith("↓") else -1


_PERPLEXITY = "perplexity_"
_TYPOS = "_typos_"  # between a domain and how many of a hundred of its letters are mistyped
_QUARTILES = ("_q1", "_q3")
# Of image models.
_IMAGES = [
    Measure("top1", "top-1 (%) ↑", "", "Top-1 accuracy (%)"),
    Measure("top5", "top-5 (%) ↑", "", "Top-5 accuracy (%)"),
    Measure("recognised", "recognised (%) ↑", "", "Samples recognised (%)"),
    Measure("fid", "FID ↓", "", "Fréchet distance of features"),
    Measure("sfid", "sFID ↓", "", "Fréchet distance of spatial features", minor=True),
    Measure("inception_score", "IS ↑", "", "Inception Score"),
    Measure("precision_of_samples", "precision ↑", "", "Precision", minor=True),
    Measure("recall_of_samples", "recall ↑", "", "Recall", minor=True),
]


def measures(row: dict[str, Any]) -> list[Measure]:
    """Those that a row has: a perplexity for each domain, or what image models are measured by."""
    domains = [
        key.removeprefix(_PERPLEXITY)
        for key in row
        if key.startswith(_PERPLEXITY) and not key.endswith(_QUARTILES)
    ]
    of_text = [
        Measure(_PERPLEXITY + x, f"PPL {_text(x)} ↓", _text(x), "Perplexity") for x in domains
    ]
    return of_text + [measure for measure in _IMAGES if measure.key in row]


def early(key: str) -> str:
    """Of the column that has a measure as it was on the way."""
    return f"early_{key}"


def mistyped(row: dict[str, Any]) -> bool:
    """Whether a row has measures of mistyped text."""
    return any(_TYPOS in measure.key for measure in measures(row))


def _text(domain: str) -> str:
    """A domain as people read it: "code", "code, 5 % typos"."""
    name, typos, share = domain.partition(_TYPOS)
    return f"{name}, {share} % typos" if typos else name


def demerit(row: dict[str, Any]) -> float:
    """Mean logarithm of the measures, turned so that less is better: for choosing the best row."""
    found = measures(row)
    # A measure may be 0 %.
    logs = [m.sign * math.log(max(float(row[m.key]), 1e-9)) for m in found]
    return sum(logs) / len(logs)
