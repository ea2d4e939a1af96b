"""Neurons that are active for the same tokens, in groups of equal size."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ROUNDS = 8


def grouped_by_activity(profiles: Float[Tensor, "N U"], num_groups: int) -> Int[Tensor, " U"]:
    """An order of the units in which each run of U / num_groups of them is a group.

    Balanced k-means: units are as near as the cosine of their profiles. In each round the groups
    take units in turns, those first that lose most if they do not get their nearest group.

    **Source**: CMoE, arXiv 2502.04416, section 3, which assigns by an optimal matching instead.

    Args:
        profiles: How active each unit is for each of N tokens, at least 0.
        num_groups: Divides the number of units.
    """
    points = torch.nn.functional.normalize(profiles.float().T, dim=-1)
    size = len(points) // num_groups
    first = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:num_groups]
    centres = points[first.to(points.device)]
    for _ in range(_ROUNDS):
        members = _assigned(points @ centres.T, size).to(points.device)
        sums = torch.zeros_like(centres).index_add(0, members, points)
        centres = torch.nn.functional.normalize(sums, dim=-1)
    return members.argsort(stable=True)


def _assigned(similarity: Tensor, size: int) -> Tensor:
    """The group of each unit, so many in each."""
    num_groups = similarity.shape[-1]
    ranked = similarity.argsort(dim=-1, descending=True, stable=True)
    best = similarity.topk(min(2, num_groups), dim=-1).values
    loses_most = (best[:, -1] - best[:, 0]).argsort(stable=True).tolist()
    groups, room = ranked.tolist(), [size] * num_groups
    chosen = [0] * len(groups)
    for unit in loses_most:
        chosen[unit] = next(group for group in groups[unit] if room[group])
        room[chosen[unit]] -= 1
    return torch.tensor(chosen)
