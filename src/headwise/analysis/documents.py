"""Who works for which document: loads of each, so that domains can be compared beyond chance."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.analysis.permutation import GroupDifference, permutation_test
from headwise.ops import HeadRouting, Routing


def count_rows(routing: Routing) -> tuple[Tensor, Tensor]:
    """What `count_heads` or `count_experts` counts, for each row of the batch by itself.

    Args:
        routing: Of a batch: weights [B, ..., H] of heads, indices [B, ..., K] of experts.

    Returns:
        Counts [B, H] or [B, E], out of [B] tokens or assignments; int64 on the CPU.
    """
    if isinstance(routing, HeadRouting):
        real = _real(routing, routing.weights)
        on = (routing.weights != 0) & real.unsqueeze(-1)
        return on.flatten(1, -2).sum(1).cpu(), real.flatten(1).sum(1).cpu()
    indices = routing.indices
    counted = ((indices >= 0) & _real(routing, indices).unsqueeze(-1)).flatten(1).long()
    counts = counted.new_zeros(len(indices), routing.probabilities.shape[-1])
    counts.scatter_add_(1, indices.clamp(min=0).flatten(1), counted)
    return counts.cpu(), counted.sum(1).cpu()


def _real(routing: Routing, values: Tensor) -> Tensor:
    """Which tokens count, of values [..., n]."""
    if routing.mask is None:
        return torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
    return routing.mask.expand(values.shape[:-1])


class DocumentMeter:
    """Adds up counts over many forwards, by document and layer.

    A document is a file or an image: what is independent of others, as tokens are not.

    Example:
        >>> meter = DocumentMeter()
        >>> meter.add("code", ["a.py", "a.py", "b.py"], routings)  # of a batch of three blocks
        >>> meter.difference()
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, Hashable], NDArray[np.int64]] = {}
        self._totals: dict[tuple[str, Hashable], NDArray[np.int64]] = {}
        self._candidates: list[int] = []

    def add(self, domain: str, documents: Sequence[Hashable], routings: Iterable[Routing]) -> None:
        """Count one forward.

        Args:
            domain: Of the documents.
            documents: Of each row of the batch, which document it is from. Rows of which nothing
                counts are left out.
            routings: Of the layers, in the model's order.

        Raises:
            ValueError: If there are not as many documents as rows, or the layers have other numbers
                of candidates than before.
        """
        layers = [count_rows(routing) for routing in routings]
        rows = len(layers[0][1])
        if len(documents) != rows:
            raise ValueError(f"documents has {len(documents)} entries; the batch has {rows} rows")
        candidates = [counts.shape[1] for counts, _ in layers]
        if self._counts and candidates != self._candidates:
            raise ValueError(f"layers had {self._candidates} candidates and now have {candidates}")
        self._candidates = candidates
        counts = torch.cat([counts for counts, _ in layers], dim=1).numpy()
        totals = torch.stack([total for _, total in layers], dim=1).numpy()
        for row, document in enumerate(documents):
            if totals[row].all():
                key = (domain, document)
                self._counts[key] = self._counts.get(key, 0) + counts[row]
                self._totals[key] = self._totals.get(key, 0) + totals[row]

    def difference(self) -> GroupDifference | None:
        """`permutation_test` of the domains, in which a document weighs as much as it has tokens.

        None where there are not two domains, or one of them has a single document.
        """
        domains = [domain for domain, _ in self._counts]
        if len(sizes := Counter(domains)) < 2 or min(sizes.values()) < 2:
            return None
        counts, totals = (np.stack([*x.values()]) for x in (self._counts, self._totals))
        layers = np.split(counts, np.cumsum(self._candidates)[:-1], axis=1)
        loads = [layer / totals[:, [index]] for index, layer in enumerate(layers)]
        return permutation_test(loads, domains, weights=totals[:, 0])
