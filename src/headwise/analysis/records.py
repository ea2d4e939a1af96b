"""What a comparison of models leaves behind: everything the report shows, as plain data."""

import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from headwise.analysis.image_records import RoutedImage, SampleGrid
from headwise.analysis.permutation import GroupDifference
from headwise.analysis.plain_data import from_plain
from headwise.results.table import Cell

Layers = list[list[float]]
_MOST_HEADS = 1024  # that a count in a record may mean


@dataclass(frozen=True)
class Curve:
    """A loss over training: one value for each of the optimizer steps, ascending."""

    steps: list[int]
    losses: list[float]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.losses):
            raise ValueError(f"steps has {len(self.steps)} entries, losses {len(self.losses)}")


@dataclass(frozen=True)
class HeadLoads:
    """How often each head is on.

    Attributes:
        shared_heads: Of each layer, which heads are always on, ascending.
        by_domain: For each domain [layer][head], share of the tokens in 0..1.
        difference: Whether the domains differ beyond chance, with all heads of each layer; None
            where that was not tested.
    """

    shared_heads: list[list[int]]
    by_domain: dict[str, Layers]
    difference: GroupDifference | None = None

    def __post_init__(self) -> None:
        _check_same_shape("by_domain", self.by_domain)
        _check_difference(self.difference, self.by_domain)
        for layers in self.by_domain.values():
            if len(layers) != len(self.shared_heads):
                raise ValueError(
                    f"shared_heads has {len(self.shared_heads)} entries; there are {len(layers)} "
                    "layers"
                )
            for layer, (loads, shared) in enumerate(zip(layers, self.shared_heads, strict=True)):
                if not set(range(len(loads))).issuperset(shared):
                    raise ValueError(
                        f"shared_heads[{layer}] is {shared}; the layer has {len(loads)} heads"
                    )

    @staticmethod
    def of_earlier(fields: dict[str, Any]) -> dict[str, Any]:
        """A count n of shared heads, as it was written once, is the first n."""
        shared = fields.get("shared_heads")
        if not isinstance(shared, list):
            return fields
        counts = range(_MOST_HEADS + 1)
        named = [list(range(x)) if type(x) is int and x in counts else x for x in shared]
        return fields | {"shared_heads": named}

    def share_on(self) -> float:
        """Heads on over all heads, mean over domains and layers, in 0..1."""
        layers = [layer for loads in self.by_domain.values() for layer in loads]
        return sum(sum(layer) / len(layer) for layer in layers) / len(layers)

    def routed_heads(self, layer: int) -> list[int]:
        """Which heads of one layer are routed, ascending."""
        (loads, *_) = self.by_domain.values()
        return [head for head in range(len(loads[layer])) if head not in self.shared_heads[layer]]

    def routed(self, domain: str, layer: int) -> list[float]:
        """The loads of the routed heads of one layer."""
        loads = self.by_domain[domain][layer]
        return [loads[head] for head in self.routed_heads(layer)]


@dataclass(frozen=True)
class ExpertLoads:
    """How much of the work each expert gets, and how alike a token's sub-tokens choose.

    Attributes:
        layers: Indices of the layers that have experts.
        by_domain: For each domain [layer with experts][expert], share of the assignments in 0..1.
        top_k: Experts that a token or sub-token goes to.
        assignments: For each domain [layer with experts], how many were counted.
        overlap: For each domain [layer with experts], see `count_overlap`; None where tokens are
            not split.
        difference: Whether the domains differ beyond chance; None where that was not tested.
    """

    layers: list[int]
    by_domain: dict[str, Layers]
    top_k: int
    assignments: dict[str, list[int]]
    overlap: dict[str, list[float | None]]
    difference: GroupDifference | None = None

    def __post_init__(self) -> None:
        _check_same_shape("by_domain", self.by_domain)
        _check_difference(self.difference, self.by_domain)
        for name in ("by_domain", "assignments", "overlap"):
            values: dict[str, list] = getattr(self, name)
            if values.keys() != self.by_domain.keys():
                raise ValueError(
                    f"{name} has the domains {list(values)}; by_domain has {list(self.by_domain)}"
                )
            for domain, of_layers in values.items():
                if len(of_layers) != len(self.layers):
                    raise ValueError(
                        f"{name}[{domain!r}] has {len(of_layers)} layers; layers names "
                        f"{len(self.layers)}"
                    )
        for domain, counted in self.assignments.items():
            if any(n < 1 for n in counted):
                raise ValueError(f"assignments[{domain!r}] is {counted}; all must be at least 1")


@dataclass(frozen=True)
class RoutedText:
    """A passage and the heads that were on while the model read it.

    Attributes:
        domain: Where the passage is from, as in the loads.
        tokens: The passage, cut into tokens; joined they are the text.
        heads_on: [layer][token], a list of the heads that are on, shared ones included.
    """

    domain: str
    tokens: list[str]
    heads_on: list[list[list[int]]]

    def __post_init__(self) -> None:
        for layer, tokens in enumerate(self.heads_on):
            if len(tokens) != len(self.tokens):
                raise ValueError(
                    f"heads_on[{layer}] has {len(tokens)} tokens; the text has {len(self.tokens)}"
                )


@dataclass(frozen=True)
class ModelRecord:
    """One trained model.

    Attributes:
        name: Of the variant, the same for all seeds ("moh").
        label: The same for people ("MoH attention").
        seed: Of this run.
        training, validation: Losses, in `RunRecord.loss_unit`.
        heads: None where no head is routed.
        experts: None where there are no experts.
        texts: Passages for the viewer; they need `heads`.
        images: Images for maps of their patches; they need `heads`.
        samples: What it drew; None where it draws nothing.
    """

    name: str
    label: str
    seed: int
    training: Curve
    validation: Curve
    heads: HeadLoads | None = None
    experts: ExpertLoads | None = None
    texts: list[RoutedText] = field(default_factory=list)
    images: list[RoutedImage] = field(default_factory=list)
    samples: SampleGrid | None = None

    def __post_init__(self) -> None:
        for name in ("texts", "images"):
            if getattr(self, name) and self.heads is None:
                raise ValueError(
                    f"{self.name} has {name} but heads is None; give its head loads too"
                )
        if not self.texts or self.heads is None:
            return
        layers = {len(loads) for loads in self.heads.by_domain.values()}
        layers |= {len(text.heads_on) for text in self.texts}
        if len(layers) != 1:
            raise ValueError(f"heads and texts of {self.name} differ in layers: {sorted(layers)}")

    def final_loss(self) -> float | None:
        """The last validation loss; None where there is none, or it is not finite."""
        last = self.validation.losses[-1:]
        return last[0] if last and math.isfinite(last[0]) else None


@dataclass(frozen=True)
class Speed:
    """A prompt or the next token, timed on a dense model and on one with routed heads.

    Attributes:
        step: "prompt" or "next token".
        context: Tokens of the prompt, or of the cache that the next token reads.
        dense, routed: Median milliseconds.
    """

    step: str
    context: int
    dense: float
    routed: float

    @property
    def ratio(self) -> float:
        """Time with routed heads over time of the dense model."""
        return self.routed / self.dense


@dataclass(frozen=True)
class RunRecord:
    """A comparison of models.

    Attributes:
        title: Of the page.
        facts: Device, versions, seeds, data, steps, …: what one needs to run it again.
        table_columns: Names with units. An arrow at the end says which way is better
            ("validation loss (nats) ↓") and lets the report mark the best; without, none is marked.
            Give it to numbers that are exact or have a spread, so that no winner is named by
            chance.
        table_rows: Cells, one for each column.
        notes: Sentences on what the numbers do and do not say.
        models: All runs; those of one variant share a name and differ in the seed.
        sample_model, sample_prompt, sample_text: A text that one of the models wrote.
        loss_unit: Unit of all the curves.
        speeds: Dense against routed heads, at some lengths; empty where nothing was timed.
        speed_note: How they were measured, or why they were not.
    """

    title: str
    facts: dict[str, str]
    table_columns: list[str]
    table_rows: list[list[Cell]]
    notes: list[str]
    models: list[ModelRecord]
    sample_model: str = ""
    sample_prompt: str = ""
    sample_text: str = ""
    loss_unit: str = "nats per token"
    speeds: list[Speed] = field(default_factory=list)
    speed_note: str = ""

    def __post_init__(self) -> None:
        for index, row in enumerate(self.table_rows):
            if len(row) != len(self.table_columns):
                raise ValueError(
                    f"table_rows[{index}] has {len(row)} cells; there are "
                    f"{len(self.table_columns)} columns"
                )

    @staticmethod
    def of_earlier(fields: dict[str, Any]) -> dict[str, Any]:
        """Numbers to compare, which were written as text once, such as "1.47 ± 0.02"."""
        columns, rows = fields.get("table_columns"), fields.get("table_rows")
        if not isinstance(columns, list) or not isinstance(rows, list):
            return fields
        marked = [isinstance(column, str) and column.endswith(("↓", "↑")) for column in columns]
        read = [
            [_number(cell) if m else cell for cell, m in zip(row, marked, strict=False)]
            if isinstance(row, list) and len(row) == len(columns)
            else row
            for row in rows
        ]
        return fields | {"table_rows": read}

    def variants(self) -> dict[str, list[ModelRecord]]:
        """The runs of each variant, in the order in which they first appear."""
        groups: dict[str, list[ModelRecord]] = {}
        for model in self.models:
            groups.setdefault(model.name, []).append(model)
        return groups


def _number(cell: Any) -> Any:
    """A number out of text such as "1,200 ± 30", which prints as the text; else the cell."""
    number = r"(-?\d[\d,]*\.?\d*)"
    if not isinstance(cell, str) or "{" in cell or "}" in cell:
        return cell
    if (match := re.match(rf"{number}[^±]*(?:± {number})?", cell)) is None:
        return cell
    value, spread = (float((group or "0").replace(",", "")) for group in match.groups())
    return {"value": value, "form": cell, "spread": spread}


def to_json(record: RunRecord) -> str:
    """The record as JSON text; `from_json` gives an equal record back."""
    return json.dumps(asdict(record), ensure_ascii=False)


def from_json(text: str) -> RunRecord:
    """The record that `to_json` wrote. Records of earlier versions lack what has a default.

    Raises:
        ValueError: If the text is not JSON, or a field is missing, unknown, of another type or
            inconsistent.
    """
    return from_plain(RunRecord, json.loads(text))


def _check_same_shape(name: str, by_domain: dict[str, Layers]) -> None:
    shapes = {tuple(len(layer) for layer in layers) for layers in by_domain.values()}
    if len(shapes) > 1:
        raise ValueError(f"the domains of {name} differ in layers or candidates: {shapes}")


def _check_difference(difference: GroupDifference | None, by_domain: dict[str, Layers]) -> None:
    if difference is None:
        return
    if difference.documents.keys() != by_domain.keys():
        raise ValueError(
            f"difference has the groups {list(difference.documents)}; by_domain has "
            f"{list(by_domain)}"
        )
    (layers, *_) = by_domain.values()
    if difference.candidates() != [len(layer) for layer in layers]:
        raise ValueError(
            f"difference has {difference.candidates()} candidates by layer; by_domain has "
            f"{[len(layer) for layer in layers]}"
        )
