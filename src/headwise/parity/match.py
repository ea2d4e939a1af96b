"""Mixtures of experts of equal FLOPs and parameters: MH-MoE for a sparse MoE, and back."""

import math
from dataclasses import dataclass

from headwise.ops.fields import Count, checked
from headwise.parity.mixture import Mixture, check_heads


@dataclass(frozen=True)
class Match:
    """A mixture found for one that was given, at equal FLOPs and parameters but for rounding.

    Attributes:
        given: What was to be matched.
        found: What matches it.
        exact_expert_dim: f of what was found before it was rounded.
        exact_num_experts: E before it was rounded, for the f that was rounded.
        rounded: What was rounded, for people to read; empty where both are exact.
    """

    given: Mixture
    found: Mixture
    exact_expert_dim: float
    exact_num_experts: float
    rounded: tuple[str, ...]

    @property
    def expert_dim(self) -> int:
        """Hidden width of an expert, after rounding."""
        return self.found.expert_dim

    @property
    def num_experts(self) -> int:
        """Experts, after rounding."""
        return self.found.num_experts

    @property
    def flops(self) -> int:
        """FLOPs per token, router left out."""
        return self.found.flops

    @property
    def parameters(self) -> int:
        """Parameters, router left out."""
        return self.found.parameters

    @property
    def flops_ratio(self) -> float:
        """FLOPs over those of what was given, routers left out."""
        return self.found.flops / self.given.flops

    @property
    def parameter_ratio(self) -> float:
        """Parameters over those of what was given, routers left out."""
        return self.found.parameters / self.given.parameters


@checked
def match_sparse_moe(
    dim: Count,
    num_experts: Count,
    top_k: Count,
    expert_dim: Count,
    *,
    heads: Count,
    top_k_mh: Count | None = None,
    glu: bool = True,
    multiple_of: Count = 8,
    experts_multiple_of: Count = 1,
) -> Match:
    """Width and number of MH-MoE's experts for the FLOPs and parameters of a sparse MoE.

    With m = 3 matrices an expert (glu) or 2, d = dim, f0, E0, k0 the sparse MoE's, k = top_k_mh:

        FLOPs:       2·m·d·f0·k0 = 4·d² + 2·m·d·f·k      =>  f = (k0·f0 - 2·d/m) / k
        parameters:  m·d·f0·E0 = 2·d² + m·(d/heads)·f·E  =>  E = (f0·E0 - 2·d/m)·heads / f

    f is rounded first, and E solved for what it became, so that parameters stay close.

    **Source**: MH-MoE, arXiv 2411.16205, Eq. 8 and 9 (m = 2, k = k0), and its tables (m = 3, E in
    multiples of 8).

    Args:
        dim: Width of the tokens.
        num_experts: E0, experts of the sparse MoE.
        top_k: k0, experts that its tokens go to.
        expert_dim: f0, hidden width of its experts.
        heads: Sub-tokens of a token; divides dim.
        top_k_mh: k, experts that a sub-token goes to. Default: heads · top_k, as in the paper.
        glu: Gated experts on both sides.
        multiple_of: f is rounded to the nearest multiple of this, the first one at least.
        experts_multiple_of: E is rounded to the nearest multiple of this that is at least k.

    Raises:
        ValueError: If a count is no int or below 1, heads does not divide dim, top_k exceeds
            num_experts, no positive f exists, or the parameters buy fewer than k experts, after
            rounding.

    Example (worked by hand): d = 768, E0 = 8, k0 = 1, f0 = 2048 and two heads: f = (2048 - 512) / 2
    = 768 and E = (2048·8 - 512)·2 / 768 = 41.33, rounded to 41.
    """
    given = Mixture(dim, num_experts, top_k, expert_dim, glu=glu)
    check_heads(heads, dim)
    k = heads * top_k if top_k_mh is None else top_k_mh
    matrices = 3 if glu else 2
    if matrices * top_k * expert_dim <= 2 * dim:
        raise ValueError(
            f"expert_dim is {expert_dim}; head and merge layer alone cost as much as "
            f"top_k = {top_k} such experts, so it must exceed {2 * dim / matrices / top_k:g}"
        )
    match = _match(given, heads, k, multiple_of, experts_multiple_of)
    if match is None:
        raise ValueError(
            f"top_k_mh is {k}; at an expert_dim that is a multiple of {multiple_of} the sparse "
            "MoE's parameters buy fewer experts; lower top_k_mh or multiple_of"
        )
    return match


@checked
def match_mh_moe(
    dim: Count,
    num_experts: Count,
    top_k: Count,
    expert_dim: Count,
    *,
    heads: Count,
    top_k_sparse: Count = 1,
    glu: bool = True,
    multiple_of: Count = 8,
    experts_multiple_of: Count = 1,
) -> Match:
    """Width and number of a sparse MoE's experts for the FLOPs and parameters of an MH-MoE.

    The inverse of `match_sparse_moe`, with E, k, f the MH-MoE's and k0 = top_k_sparse:

        f0 = (k·f + 2·d/m) / k0,   E0 = (f·E/heads + 2·d/m) / f0

    **Source**: MH-MoE, arXiv 2411.16205, Eq. 8 and 9, solved for the other side.

    Args:
        dim: Width of the tokens.
        num_experts: E, experts of the MH-MoE.
        top_k: k, experts that its sub-tokens go to.
        expert_dim: f, hidden width of its experts.
        heads: Its sub-tokens of a token; divides dim.
        top_k_sparse: k0, experts that a token of the sparse MoE goes to.
        glu: Gated experts on both sides.
        multiple_of: f0 is rounded to the nearest multiple of this, the first one at least.
        experts_multiple_of: E0 is rounded to the nearest multiple of this that is at least k0.

    Raises:
        ValueError: If a count is no int or below 1, heads does not divide dim, top_k exceeds
            num_experts, or the parameters buy fewer than k0 experts, after rounding.
    """
    given = Mixture(dim, num_experts, top_k, expert_dim, heads, glu)
    match = _match(given, None, top_k_sparse, multiple_of, experts_multiple_of)
    if match is None:
        raise ValueError(
            f"num_experts is {num_experts}; at an expert_dim that is a multiple of {multiple_of} "
            f"these parameters buy a sparse MoE fewer experts than top_k_sparse = {top_k_sparse}; "
            f"raise it to heads · top_k = {heads * top_k} or lower multiple_of"
        )
    return match


def _match(
    given: Mixture, heads: int | None, top_k: int, multiple_of: int, experts_multiple_of: int
) -> Match | None:
    """The mixture that costs what the given one does; None if it has fewer experts than top_k."""
    one = Mixture(given.dim, top_k, top_k, 1, heads, given.glu)
    exact_dim = (given.flops - 2 * one.around) / (one.flops - 2 * one.around)
    expert_dim, dim_note = _rounded("expert_dim", exact_dim, multiple_of, 1)
    per_expert = one.matrices * one.sub_dim * expert_dim
    exact_experts = (given.parameters - one.around) / per_expert
    if math.floor(exact_experts + 0.5) < top_k:
        return None
    experts, experts_note = _rounded("num_experts", exact_experts, experts_multiple_of, top_k)
    found = Mixture(given.dim, experts, top_k, expert_dim, heads, given.glu)
    notes = tuple(note for note in (dim_note, experts_note) if note)
    return Match(given, found, exact_dim, exact_experts, notes)


def _rounded(field: str, exact: float, multiple: int, least: int) -> tuple[int, str]:
    """The nearest multiple that is not below `least`, and what to say of it."""
    nearest = multiple * math.floor(exact / multiple + 0.5)
    value = max(nearest, multiple * math.ceil(least / multiple))
    if value == exact:
        return value, ""
    which = f", the nearest multiple of {multiple}" if multiple > 1 else ""
    bound = f" that is at least {least}" if value > nearest else ""
    return value, f"{field} {exact:.6g} rounded to {value}{which}{bound}"
