"""What is compared with what, and the row that comes out."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwise.results import rows
from headwise.results.rows import Row
from headwise.training.timing import LARGEST_ERROR_RATIO, error_ratio, interleaved

# Ours, plain PyTorch's in the same dtype and the exact ones.
Tensors = tuple[list[Tensor], list[Tensor], list[Tensor]]

# Builds a comparison, tensors and all, when its turn comes.
Builder = Callable[[], "Comparison"]


@dataclass(frozen=True)
class Effort:
    """How long to measure: `quick` takes fewer shapes, and fewer rounds of them.

    Attributes:
        rounds, seconds: At least so many, for at least so long.
        most_seconds: Where so many rounds take longer than this, three do.
    """

    device: torch.device
    rounds: int
    seconds: float
    warmups: int
    quick: bool
    toy: bool = False
    most_seconds: float = math.inf


class LeftOutError(RuntimeError):
    """What there is no time, memory or package for here; the message names the case."""


class Rival(NamedTuple):
    """What a user would pick instead of ours.

    Attributes:
        run: What is timed.
        ideal: The time that the arithmetic left over would take, as a share of the rival's.
        target: The ratio to reach; at toy size there is none.
        limit: Milliseconds that its work takes at least on this machine.
    """

    run: Callable[[], Any]
    ideal: float | None = None
    target: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Ours against its rivals on one shape.

    Attributes:
        case: What is timed.
        shape: Sizes, for people.
        dtype: Of the activations.
        share: Of the heads that are on; 1 where heads have no part in it.
        ours: What is timed; each call may draw other routings, so that nothing fits by chance.
        rivals: By name.
        tensors: Ours, plain PyTorch's in the same dtype and the exact ones, to compare.
        launches: Whether launching counts on a GPU, as in a loop of Python; else kernels alone do.
        limit: Milliseconds that our work takes at least on this machine.
        left_out: Rivals that cannot be timed here, and why.
    """

    case: str
    shape: str
    dtype: torch.dtype
    share: float
    ours: Callable[[], Any]
    rivals: Mapping[str, Rival]
    tensors: Callable[[], Tensors]
    launches: bool = False
    limit: float | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The dtype's name."""
        return str(self.dtype).removeprefix("torch.")


def measure(comparison: Comparison, effort: Effort) -> Iterator[Row]:
    """A row for each rival. Correctness first: where it fails, no time is taken."""
    error = error_ratio(*comparison.tensors())
    passed = error <= LARGEST_ERROR_RATIO
    candidates = {"ours": comparison.ours} | {k: x.run for k, x in comparison.rivals.items()}
    times: Mapping[str, float | None] = dict.fromkeys(candidates)
    if passed:
        times = interleaved(
            candidates, rounds=effort.rounds, seconds=effort.seconds, warmups=effort.warmups,
            device=effort.device, launches=comparison.launches, most_seconds=effort.most_seconds,
        )  # fmt: skip
    for name, (_, ideal, target, limit) in comparison.rivals.items():
        ours, theirs = times["ours"], times[name]
        ratio = _over(ours, theirs)
        yield {
            "case": comparison.case,
            "shape": comparison.shape,
            "dtype": comparison.kind,
            "share": comparison.share,
            "rival": name,
            "ours_ms": _rounded(ours),
            "rival_ms": _rounded(theirs),
            "ratio": _rounded(ratio),
            "ideal": _rounded(ideal),
            "share_of_ideal": _rounded(_over(ideal, ratio)),
            "limit_ms": _rounded(comparison.limit),
            "rival_limit_ms": _rounded(limit),
            "of_limit": _rounded(_over(comparison.limit, ours)),
            "rival_of_limit": _rounded(_over(limit, theirs)),
            "target": None if effort.toy else target,
            "error_ratio": round(error, 2),
            "correct": passed,
            **environment(effort.device),
        }


def runnable(rivals: Mapping[str, Rival]) -> tuple[dict[str, Rival], dict[str, str]]:
    """The rivals that run, each tried once, and why the others do not."""
    runs, left_out = {}, {}
    for name, rival in rivals.items():
        try:
            rival.run()
            runs[name] = rival
        except RuntimeError as error:
            left_out[name] = first_line(error)
    return runs, left_out


def first_line(error: Exception) -> str:
    """What went wrong; torch adds pages to it."""
    return str(error).strip().partition("\n")[0]


def environment(device: torch.device) -> Row:
    """Device and versions, which stand in each row beside the figures."""
    here = rows.environment("", cuda=device.type == "cuda")
    names = ("device", "threads", "torch", "transformers", "headwise", "python")
    return {name: here[name] for name in names}


def _over(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
