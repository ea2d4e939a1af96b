"""How a layer uses its experts: how many, whether sub-tokens differ, whether domains do."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from headwise.analysis.measure import Load, LoadCount, as_distribution, load_entropy
from headwise.analysis.records import ExpertLoads
from headwise.ops import ExpertRouting
from headwise.ops.fields import check


def count_overlap(routing: ExpertRouting) -> LoadCount:
    """Overlap of the experts of a token's sub-tokens, padding left out.

        overlap = mean over tokens and pairs a < b of |A ∩ B| / K,   A, B: their K experts

    1 where all sub-tokens of a token go to the same experts, as if it had not been split; K / E is
    to be expected where each goes to K experts at random, less where first, second, … sub-tokens
    keep to experts of their own.

    Args:
        routing: Of a MoE or MH-MoE layer: indices [B, T, h, K] with h sub-tokens of a token.

    Returns:
        [1] experts in common, out of what it would be if all sub-tokens of a token went to the same
        experts; `share` is the overlap.

    Raises:
        ValueError: If the routing is of heads, or its indices have no dimension of sub-tokens.

    Example (worked by hand): two tokens, h = 3, K = 2. Sub-tokens that go to {0, 1}, {1, 2}, {3, 0}
    have 1 + 1 + 0 experts in common, those that go to {0, 1}, {0, 1}, {2, 3} have 2 + 0 + 0. Of
    2 · 3 · 2 = 12 that makes 4: 1/3.
    """
    check("routing", routing, ExpertRouting)
    indices = routing.indices
    if indices.ndim != 4:
        raise ValueError(f"indices are {list(indices.shape)}; they must be [B, T, h, K]")
    h, k = indices.shape[-2:]
    real = (indices >= 0).flatten(-2).all(-1)
    if routing.mask is not None:
        real = real & routing.mask.all(-1)
    chosen = indices[real].flatten(-2)
    # A sub-token's own experts differ, so of all pairs of choices that agree, those of a choice
    # with itself are h·K a token, and the others are counted in both orders.
    agree = int((chosen.unsqueeze(-1) == chosen.unsqueeze(-2)).sum())
    common = torch.tensor([(agree - chosen.numel()) // 2])
    return LoadCount(common, len(chosen) * math.comb(h, 2) * k)


def effective_experts(load: Load) -> float:
    """Number of equally busy experts that would be as evenly loaded: exp(-sum p ln p).

    **Source**: the expert activation of MH-MoE, arXiv 2404.15045, Figure 1 (8.33 % for X-MoE,
    90.71 % for MH-MoE).
    **Deviates**: the paper counts the experts that more than a threshold's share of the tokens
    choose, and names no threshold but "< 1"; its figures cannot be had again, nor compared with
    this. A sub-token is a choice more there, which h sub-tokens make h times as likely to pass;
    here shares of the assignments are compared, and no threshold is needed.

    Args:
        load: [E], not negative.

    Returns:
        1 where one expert does all the work, E where all do the same.

    Raises:
        ValueError: If the load sums to 0.

    Example (worked by hand): p = [1/2, 1/4, 1/4, 0] gives exp(3/2 ln 2) = √8 = 2.83 of 4.
    """
    return float(torch.special.entr(as_distribution(load)).sum().exp())


def overlap_by_chance(load: Load, top_k: int) -> float:
    """What `count_overlap` comes to where sub-tokens choose at random, at the same load.

        sum over e of (K·p_e)² / K,   K·p_e: probability that a sub-token goes to expert e

    K / E where all experts are equally busy, 1 where K experts do all the work.

    Args:
        load: [E], not negative.
        top_k: K, experts that a sub-token goes to.

    Raises:
        ValueError: If the load sums to 0.

    Example (worked by hand): p = [1/2, 1/4, 1/4, 0] and K = 2: the first expert is always chosen,
    the next two half the time each: (1 + 1/4 + 1/4) / 2 = 3/4.
    """
    return float(top_k * as_distribution(load).square().sum())


def specialisation(loads: Sequence[Load]) -> float | None:
    """How much the expert tells of the domain: their mutual information over its maximum.

        (H(m) - mean of H(p_d)) / ln D,   p_d: load of domain d,   m = mean of the p_d

    This is the Jensen-Shannon divergence of the D loads, all domains weighted equally.

    Args:
        loads: [E] for each domain.

    Returns:
        0 where all domains load the experts alike, 1 where no two share an expert; None for fewer
        than two domains. Loads that were counted have noise, which adds to it:
        `specialisation_by_chance`.

    Raises:
        ValueError: If a load sums to 0.

    Example (worked by hand): p = [1/2, 1/2, 0] and [0, 1/2, 1/2]: m = [1/4, 1/2, 1/4],
    (3/2 ln 2 - ln 2) / ln 2 = 1/2.
    """
    if len(loads) < 2:
        return None
    p = torch.stack([as_distribution(load) for load in loads])
    divergence = torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(-1).mean()
    return float((divergence / math.log(len(loads))).clamp(0, 1))


def specialisation_by_chance(used: int, assignments: Sequence[int]) -> float | None:
    """What `specialisation` comes to on average where domains do not differ, to first order.

        (used - 1) / 2 · (D - 1) / D² · sum over domains of 1 / n_d / ln D

    **Source**: Miller's bias of an entropy that is estimated from counts (1955), here of m and p_d.
    It holds for independent assignments; in a text they hang together, so chance makes more of it.

    Args:
        used: Experts that any domain uses.
        assignments: n_d, counted for each domain.

    Example (worked by hand): 5 experts, two domains of 100 assignments:
    2 · 1/4 · 2/100 / ln 2 = 0.0144.
    """
    domains = len(assignments)
    if domains < 2:
        return None
    noise = sum(1 / n for n in assignments) * (domains - 1) / domains**2
    return (used - 1) / 2 * noise / math.log(domains)


class ExpertUse(NamedTuple):
    """How one layer uses its experts in one domain.

    Attributes:
        layer, domain: Where.
        experts: E.
        used: Those with at least one assignment.
        effective: `effective_experts`, 1..E.
        entropy: `load_entropy`, 0..1.
        largest: Share of the assignments that the busiest expert has.
        overlap: Of sub-tokens, see `count_overlap`; None where tokens are not split.
        overlap_by_chance: See `overlap_by_chance`; None where tokens are not split.
        specialisation: Of the layer, the same for all its domains; None where there is but one.
        specialisation_by_chance: Likewise.
        p_value: Of the layer: how probable chance makes loads that differ as much between the
            domains, see `permutation_test`; None where that was not tested.
    """

    layer: int
    domain: str
    experts: int
    used: int
    effective: float
    entropy: float
    largest: float
    overlap: float | None
    overlap_by_chance: float | None
    specialisation: float | None
    specialisation_by_chance: float | None
    p_value: float | None


def expert_use(experts: ExpertLoads) -> list[ExpertUse]:
    """One entry for each layer and domain, in the order of the record."""
    uses = []
    for position, layer in enumerate(experts.layers):
        loads = {domain: layers[position] for domain, layers in experts.by_domain.items()}
        used_by_any = sum(any(values) for values in zip(*loads.values(), strict=True))
        counted = [layers[position] for layers in experts.assignments.values()]
        tested = experts.difference and experts.difference.layers[position]
        for domain, load in loads.items():
            overlap = experts.overlap[domain][position]
            uses.append(
                ExpertUse(
                    layer=layer,
                    domain=domain,
                    experts=len(load),
                    used=sum(share > 0 for share in load),
                    effective=effective_experts(load),
                    entropy=load_entropy(load),
                    largest=max(as_distribution(load).tolist()),
                    overlap=overlap,
                    overlap_by_chance=(
                        None if overlap is None else overlap_by_chance(load, experts.top_k)
                    ),
                    specialisation=specialisation(list(loads.values())),
                    specialisation_by_chance=specialisation_by_chance(used_by_any, counted),
                    p_value=tested.p_value if tested else None,
                )
            )
    return uses
