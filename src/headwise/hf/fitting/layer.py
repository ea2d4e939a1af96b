"""A layer to which a router is fitted: its heads or neurons, and what is known of them so far."""

import einops
import torch
from einops import rearrange
from torch import Tensor

from headwise.hf.fitting.sites import Site
from headwise.hf.fitting.solving import Fit
from headwise.nn import HeadBudget
from headwise.ops import route_heads_by_scores


class Layer:
    """Units z in groups, of which a budget is on: the channels of heads, or neurons of experts.

    Attributes:
        number: Of the attention or MLP in the model, counted from 0.
        site: Where its input and units are seen.
        dim: Width of its input.
        budget: Its groups; of experts, each is a head to it.
        order: The units [U], group by group; None where they are in order.
        metric: M [U, U], in whose norm what units add is measured; by their order.
        fit: The linear map that scores the groups which the router chooses from.
        gain: Of each group [G].
    """

    metric: Tensor
    fit: Fit

    def __init__(self, number: int, site: Site, dim: int, budget: HeadBudget):
        self.number, self.site, self.dim, self.budget = number, site, dim, budget
        self.gain = torch.ones(budget.num_groups)
        self.order: Tensor | None = None

    def arrange(self, order: Tensor) -> None:
        """Put the units in this order."""
        self.order, self.metric = order, self.metric[order][:, order]

    @property
    def keeps_all(self) -> bool:
        """Whether there is nothing to choose."""
        return self.budget.active_heads == self.budget.num_heads

    def contributions(self, z: Tensor) -> Tensor:
        """c² of each routed group [N, routed], of units z [N, U]."""
        groups = self.budget.num_groups
        blocks = rearrange(self.metric, "(g c) (h d) -> c d g h", g=groups, h=groups)
        by_group = self._by_group(z.float())
        squares = torch.einsum(
            "ngc,cdg,ngd->ng", by_group, blocks.diagonal(dim1=-2, dim2=-1), by_group
        )
        return squares[:, list(self.budget.candidates)]

    def scores(self, x: Tensor) -> Tensor:
        """Of each routed group [N, routed], by what the module reads, x [N, D]."""
        return x.float() @ self.fit.weight.to(x.device).T + self.fit.bias.to(x.device)

    def products(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """What `solving.gains` takes, of tokens x [N, D] and their units z [N, U]."""
        by_group = self._by_group(z.float())
        z, kept = (part.flatten(-2) for part in (by_group, by_group * self._on(x).unsqueeze(-1)))
        with_kept, with_all = (self._summed(self.metric * (kept.T @ w)) for w in (kept, z))
        return with_kept, with_all.sum(1)

    def parameters(self) -> dict[str, Tensor]:
        """Of the fitted router; none where there is nothing to choose."""
        if self.keeps_all:
            return {}
        return {"weight": self.fit.weight, "bias": self.fit.bias, "gain": self.gain}

    def _on(self, x: Tensor) -> Tensor:
        """1 for each group that is on for a token, else 0: [N, G]."""
        shared, top_k = self.budget.shared_groups, self.budget.kept_groups
        return route_heads_by_scores(self.scores(x), shared_heads=shared, top_k=top_k).weights

    def _by_group(self, z: Tensor) -> Tensor:
        """Units [N, U] as [N, G, U/G]."""
        z = z if self.order is None else z[:, self.order]
        return z.unflatten(-1, (self.budget.num_groups, -1))

    def _summed(self, products: Tensor) -> Tensor:
        """Products [U, U] summed over the units of each group: [G, G]."""
        groups, wide = self.budget.num_groups, products.double()
        return einops.reduce(wide, "(g c) (h d) -> g h", "sum", g=groups, h=groups).cpu()
