"""Routings become numbers: who does how much of the work, and how unevenly."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.ops import ExpertRouting, HeadRouting, Routing
from headwise.ops.fields import check

Load = Tensor | Sequence[float]


@dataclass(frozen=True)
class LoadCount:
    """How often each candidate worked, and out of how many occasions; both are exact integers.

    Attributes:
        counts: [H] tokens per head, [E] assignments per expert, or [1] experts that sub-tokens
            have in common; int64 on the CPU.
        total: Real tokens (heads), assignments (experts), or experts that could be in common.
    """

    counts: Int[Tensor, " E"]
    total: int

    def __add__(self, other: "LoadCount") -> "LoadCount":
        if len(self.counts) != len(other.counts):
            raise ValueError(
                f"counts of {len(self.counts)} and {len(other.counts)} candidates cannot be added"
            )
        return LoadCount(self.counts + other.counts, self.total + other.total)

    def load(self) -> Float[Tensor, " E"]:
        """Counts as shares of the total, float64 in 0..1; all 0 where nothing was counted."""
        return self.counts.double() / max(self.total, 1)

    def share(self) -> float | None:
        """All counts over the total; None where nothing was counted."""
        return int(self.counts.sum()) / self.total if self.total else None


def count_heads(routing: HeadRouting) -> LoadCount:
    """Tokens for which each of the H heads is on (its gate is not 0), out of the real tokens.

    Args:
        routing: Of a MoH attention: weights [..., H].

    Returns:
        [H] counts. Shared heads have a load of 1; the loads sum to the number of heads on a token.

    Raises:
        ValueError: If the routing is of experts.

    Example (worked by hand): one shared and two routed heads, gates [1, .7, 0], [1, .4, 0],
    [1, 0, .9] and a padding token: counts [3, 2, 1] of 3, loads [1, 2/3, 1/3].
    """
    check("routing", routing, HeadRouting)
    on = routing.weights != 0
    if routing.mask is not None:
        on = on[routing.mask]
    on = on.flatten(end_dim=-2)
    return LoadCount(on.sum(0).cpu(), on.shape[0])


def count_experts(routing: ExpertRouting) -> LoadCount:
    """Assignments of each of the E experts, out of all; a sub-token counts like a token.

    Args:
        routing: Of a MoE or MH-MoE layer: indices [..., K], with or without a sub-token dimension.

    Returns:
        [E] counts. The loads sum to 1, or to 0 where every token is padding.

    Raises:
        ValueError: If the routing is of heads.

    Example (worked by hand): two tokens of two sub-tokens with indices [0, 0], [0, 2], K = 1,
    among 4 experts: counts [3, 0, 1, 0] of 4, loads [3/4, 0, 1/4, 0].
    """
    check("routing", routing, ExpertRouting)
    num_experts = routing.probabilities.shape[-1]
    chosen = routing.indices if routing.mask is None else routing.indices[routing.mask]
    counts = torch.bincount(chosen[chosen >= 0].flatten().cpu(), minlength=num_experts)
    return LoadCount(counts, int(counts.sum()))


def heads_on(routing: HeadRouting) -> list[list[int]]:
    """For each token of one sequence the heads that are on, ascending; none for padding.

    Args:
        routing: Of a MoH attention for a single sequence: weights [T, H] or [1, T, H].

    Returns:
        T lists of indices in 0..H-1, shared heads included: one layer of `RoutedText.heads_on`.

    Raises:
        ValueError: If the routing holds more than one sequence, or is of experts.
    """
    check("routing", routing, HeadRouting)
    weights = routing.weights
    if weights.ndim == 3 and weights.shape[0] == 1:
        weights = weights[0]
    if weights.ndim != 2:
        raise ValueError(f"weights are {list(weights.shape)}; they must be [T, H] or [1, T, H]")
    return [row.nonzero().flatten().tolist() for row in weights.detach().cpu()]


def load_entropy(load: Load) -> float:
    """Evenness of a load: -sum p ln p / ln E with p = load / sum(load).

    Args:
        load: [E], not negative. For MoH pass the routed heads only: the shared are always on.

    Returns:
        0 where one candidate does all the work, 1 where all do the same (or there is but one).

    Raises:
        ValueError: If the load sums to 0.
    """
    p = as_distribution(load)
    if len(p) == 1:
        return 1.0
    entropy = torch.special.entr(p).sum() / torch.tensor(len(p)).double().log()
    return float(entropy.clamp(0, 1))


def load_distance(first: Load, second: Load) -> float:
    """Total variation of two loads: ½ sum |p - q| with p = first / sum(first), q likewise.

    For routed heads it is the least share of choices that must change to turn one domain's load
    into the other's.

    Returns:
        0 where the loads are proportional, 1 where they share no candidate.

    Raises:
        ValueError: If the lengths differ or a load sums to 0.
    """
    p, q = as_distribution(first), as_distribution(second)
    if p.shape != q.shape:
        raise ValueError(f"loads of {len(p)} and {len(q)} candidates cannot be compared")
    return float((p - q).abs().sum() / 2)


def unused_share(load: Load) -> float:
    """Share of the candidates whose load is exactly 0, in 0..1; 0 where there are none."""
    values = torch.as_tensor(load, dtype=torch.float64)
    return float((values == 0).double().mean()) if len(values) else 0.0


class LoadMeter:
    """Adds up counts over many forwards, by domain and layer.

    Tokens are counted and divided once at the end, so a short batch weighs less than a long one.

    Args:
        count: `count_heads`, `count_experts` or `count_overlap`.

    Example:
        >>> meter = LoadMeter(count_heads)
        >>> for batch in code:
        ...     with record_routing(model) as routings:
        ...         model(**batch)
        ...     meter.add("code", [r for name, r in routings.items() if "self_attn" in name])
        >>> HeadLoads(shared_heads=[[0, 1, 2]] * num_layers, by_domain=meter.by_domain())
    """

    def __init__(self, count: Callable[[Any], LoadCount]):
        self._count = count
        self._sums: dict[str, list[LoadCount]] = {}

    def add(self, domain: str, routings: Iterable[Routing]) -> None:
        """Count one forward: the routings of the layers, in the model's order.

        Raises:
            ValueError: If the number of layers or of candidates is not what it was before.
        """
        new = [self._count(routing) for routing in routings]
        old = self._sums.get(domain)
        if old is not None and len(old) != len(new):
            raise ValueError(f"domain {domain!r} had {len(old)} layers and now has {len(new)}")
        self._sums[domain] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    def counts(self) -> dict[str, list[LoadCount]]:
        """Counts so far, [layer] for each domain."""
        return {domain: list(counts) for domain, counts in self._sums.items()}

    def by_domain(self) -> dict[str, list[list[float]]]:
        """Loads so far, [layer][head or expert] for each domain, as the records hold them."""
        return {
            domain: [count.load().tolist() for count in counts]
            for domain, counts in self._sums.items()
        }


def as_distribution(load: Load) -> Float[Tensor, " E"]:
    """The load over its sum, float64.

    Raises:
        ValueError: If the load sums to 0.
    """
    values = torch.as_tensor(load, dtype=torch.float64)
    total = values.sum()
    if not total > 0:
        raise ValueError(f"the load sums to {float(total)}; it must be more than 0")
    return values / total
