"""Routers of heads: modules that turn activations into a routing, in float32 or wider."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from headwise.nn.budget import HeadBudget
from headwise.nn.tokens import check_rows
from headwise.ops import (
    HeadRouting,
    route_heads,
    route_heads_by_query_norm,
    route_heads_by_scores,
)
from headwise.ops.dtypes import wide_dtype
from headwise.ops.fields import Count, Weight, checked
from headwise.ops.gates import arrange_gates
from headwise.ops.logits import router_logits
from headwise.ops.routing import HeadMode
from headwise.ops.scores import HeadScores

# Of the outputs of a matrix product: a cache line of float32.
_FAST_MULTIPLE = 16


class Router(nn.Module):
    """Base of all routers: forward returns a routing, and a recorder finds them by this type."""


class HeadRouter(Router):
    """Base of the routers of attention heads, which choose within a `budget`.

    `QueryNormRouter` routes by the queries, the others by what the attention gets.
    """

    @checked
    def __init__(self, budget: HeadBudget):
        super().__init__()
        self.budget = budget

    @property
    def shared_groups(self) -> int | tuple[int, ...]:
        """Groups that are always on, as ops take them: how many of the first ones, or which."""
        shared = self.budget.shared_groups
        return shared if self.budget.named_shared else len(shared)

    @property
    def is_dense(self) -> bool:
        """Whether every gate is 1: all heads are on, and no gate is learned."""
        return self.budget.active_share == 1 and next(self.parameters(), None) is None


class ScoreMap(nn.Module):
    """The weight [num_scores, D] of one of the linear maps that TwoStageRouter computes as one.

    Calling it gives the weight, so that what stands around it has its effect: hooks that bring
    weights to where they are needed (offloading), adapters of a parameter (PEFT). No nn.Linear:
    what adapts or replaces the product of these would have no effect here.
    """

    @checked
    def __init__(self, dim: Count, num_scores: Count):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_scores, dim))

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "K D"]:
        """The weight; x is not read, but adapters want an argument that they can hand on."""
        return self.weight

    def extra_repr(self) -> str:
        num_scores, dim = self.weight.shape
        return f"dim={dim}, num_scores={num_scores}"


class LearnedRouter(HeadRouter):
    """Base of the routers that score heads by what the attention gets.

    With a budget in groups they score groups, and all heads of a group get its gate.

    Args:
        dim: Width of the tokens.
        budget: The heads.
        mode: "released" or "paper", the formulas that make gates of scores (`ops.route_heads`).
        scores: "softmax", "sparsemax" or "sigmoid", over the routed heads.
        std: Deviation with which the weights start.
    """

    @checked
    def __init__(
        self,
        dim: Count,
        budget: HeadBudget,
        *,
        mode: HeadMode = "released",
        scores: HeadScores = "softmax",
        std: Weight = 0.02,
    ):
        super().__init__(budget)
        self.dim, self.mode, self.scores = dim, mode, scores
        self._add_maps(len(budget.shared_groups), budget.routed_groups)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        mask: Bool[Tensor, "B T"] | None = None,
        indices: Int[Tensor, "..."] | None = None,
    ) -> HeadRouting:
        """Route every token of x, by a choice that was made before where there is one.

        Padding (mask False) has all heads off.
        """
        check_rows("x", x, ("B", "T", self.dim), mask, weight=next(self.parameters(), None))
        return _gates_of_heads(self._route(x, indices), self.budget).with_mask(mask)

    def _add_maps(self, shared: int, routed: int) -> None:
        """The maps that score so many shared and routed groups."""
        raise NotImplementedError

    def _route(self, x: Tensor, indices: Tensor | None) -> HeadRouting:
        """The routing of groups, each gate where its group stands."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.budget}, mode={self.mode}, scores={self.scores}"


class TwoStageRouter(LearnedRouter):
    """MoH's learned router: scores for shared heads, for routed heads and for these two stages.

    A linear map exists only where its softmax has a choice to make: `shared` with two shared heads
    or more, `routed` where heads are routed, `stage` where both kinds exist. Arguments are those of
    `LearnedRouter`.

    **Source**: MoH, arXiv 2410.11842, Eq. 5 and 6 (`ops.route_heads` has the formulas).
    **Deviates**: groups of heads are an extension; the paper routes single heads.
    """

    def _add_maps(self, shared: int, routed: int) -> None:
        self.shared = ScoreMap(self.dim, shared) if shared > 1 else None
        self.routed = ScoreMap(self.dim, routed) if routed else None
        self.stage = ScoreMap(self.dim, 2) if shared and routed else None

    def _route(self, x: Tensor, indices: Tensor | None) -> HeadRouting:
        # Scores of shared groups are even where there is no choice to make.
        even = x.new_zeros(*x.shape[:-1], len(self.budget.shared_groups), dtype=wide_dtype(x))
        logits = iter(())
        if maps := [m(x) for m in (self.shared, self.routed, self.stage) if m is not None]:
            # One product for all maps: reading x costs more than the scores. Without the rows of
            # zeros, it would take up to twice as long.
            rows = [len(m) for m in maps]
            weight = pad(torch.cat(maps), (0, 0, 0, -sum(rows) % _FAST_MULTIPLE))
            logits = iter(router_logits(x, weight)[..., : sum(rows)].split(rows, dim=-1))
        shared = even if self.shared is None else next(logits)
        routed = even[..., :0] if self.routed is None else next(logits)
        stage = None if self.stage is None else next(logits)
        k, mode, scores = self.budget.kept_groups, self.mode, self.scores
        routing = route_heads(
            shared, routed, stage, top_k=k, mode=mode, scores=scores, indices=indices
        )
        if not self.budget.named_shared:
            return routing
        gates = routing.weights.split([shared.shape[-1], routed.shape[-1]], dim=-1)
        return routing.with_weights(arrange_gates(self.budget.shared_groups, *gates))


class OneStageRouter(LearnedRouter):
    """MoH's learned router without its second stage: scores for the routed heads only.

    With p and m as in `ops.route_heads`, the gate of a shared head is 1 and that of a routed one

        paper:     p·m
        released:  top_k·p·m / sum(p·m)

    Arguments are those of `LearnedRouter`.

    **Source**: MoH, arXiv 2410.11842, its ablation of shared heads and two-stage routing: the row
    with the first and without the second (ViT-S 78.3, with both 78.6, with neither 75.6).
    **Deviates**: the paper prints no gates for that row. In mode "released" they are those of
    `TwoStageRouter` where the scores of its shared heads and of its stages are even.
    """

    def _add_maps(self, shared: int, routed: int) -> None:
        self.routed = ScoreMap(self.dim, routed) if routed else None

    def _route(self, x: Tensor, indices: Tensor | None) -> HeadRouting:
        none = x.new_zeros(*x.shape[:-1], 0, dtype=wide_dtype(x))
        logits = none if self.routed is None else router_logits(x, self.routed(x))
        k, mode, scores = self.budget.kept_groups, self.mode, self.scores
        routing = route_heads(
            none, logits, None, top_k=k, mode=mode, scores=scores, indices=indices
        )
        always_on = logits.new_ones(*x.shape[:-1], len(self.budget.shared_groups))
        gates = arrange_gates(self.budget.shared_groups, always_on, routing.weights)
        return routing.with_weights(gates)


class FittedRouter(HeadRouter):
    """A linear map that scores heads, and gates that make up for those that are off.

        s = W x + b,   gate_h = gain_h for shared heads and top-k(s), 0 for the others

    `headwise.fit` finds W, b and gain for a pretrained model. The gradient of the choice is
    straight-through (`ops.route_heads_by_scores`), so that a fitted router can be tuned. With a
    budget in groups it scores groups, and all heads of a group get its gate. Where every head is
    on there is nothing to choose, and no parameters: gates are 1.

    **Source**: ours; MoH, arXiv 2410.11842, has no router that is fitted. Scores of a linear map
    are those of its Eq. 5, straight-through gradients those of its Eq. 10.

    Args:
        dim: Width of the tokens.
        budget: The heads.
    """

    @checked
    def __init__(self, dim: Count, budget: HeadBudget):
        super().__init__(budget)
        self.dim = dim
        self.weight = self.bias = self.gain = None
        if budget.active_heads < budget.num_heads:
            self.weight = nn.Parameter(torch.zeros(budget.routed_groups, dim))
            self.bias = nn.Parameter(torch.zeros(budget.routed_groups))
            self.gain = nn.Parameter(torch.ones(budget.num_groups))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        mask: Bool[Tensor, "B T"] | None = None,
        indices: Int[Tensor, "..."] | None = None,
    ) -> HeadRouting:
        """Route every token of x, by a choice that was made before where there is one.

        Padding (mask False) has all heads off.
        """
        check_rows("x", x, ("B", "T", self.dim), mask, weight=self.weight)
        if self.weight is None or self.bias is None or self.gain is None:
            scores = x.new_zeros(*x.shape[:-1], self.budget.routed_groups, dtype=wide_dtype(x))
        else:
            scores = router_logits(x, self.weight) + self.bias
        routing = route_heads_by_scores(
            scores,
            shared_heads=self.shared_groups,
            top_k=self.budget.kept_groups,
            gain=self.gain,
            indices=indices,
        )
        return _gates_of_heads(routing, self.budget).with_mask(mask)

    def extra_repr(self) -> str:
        return str(self.budget)


class OutputGateRouter(HeadRouter):
    """For attention that multiplies each head by a learned gate already: the largest gates win.

        on_h = 1 for shared heads and top-k(gates), 0 for the others

    There are no parameters. The gates themselves stay where the model multiplies by them, and learn
    there; the choice has no gradient. With a budget in groups, a group's gate is the mean of its
    heads'.

    **Source**: ours; gates after attention: Qwen's gated attention, arXiv 2505.06708.
    """

    def forward(
        self,
        gates: Float[Tensor, "B T H"],
        mask: Bool[Tensor, "B T"] | None = None,
        indices: Int[Tensor, "..."] | None = None,
    ) -> HeadRouting:
        """Route every token by its gates, or a choice that was made before.

        Padding (mask False) has all heads off.
        """
        budget = self.budget
        check_rows("gates", gates, ("B", "T", budget.num_heads), mask)
        of_groups = gates.detach().unflatten(-1, (budget.num_groups, -1)).mean(-1)
        routed = [of_groups[..., group] for group in budget.candidates]
        routing = route_heads_by_scores(
            torch.stack(routed, dim=-1) if routed else of_groups[..., :0],
            shared_heads=self.shared_groups,
            top_k=budget.kept_groups,
            indices=indices,
        )
        return _gates_of_heads(routing, budget).with_mask(mask)

    def extra_repr(self) -> str:
        return str(self.budget)


class QueryNormRouter(HeadRouter):
    """MoH's router without parameters, for pretrained models: the longest queries win.

    With a budget in groups, the length of group i is that of the queries of all its heads together,
    z_i = sqrt(sum_h ||q_h||²) over its heads h, and all of them get its gate.

    **Source**: MoH, arXiv 2410.11842, Eq. 9 and 10 (`ops.route_heads_by_query_norm`).
    **Deviates**: groups of heads are an extension; the paper routes single heads.
    """

    @checked
    def __init__(self, budget: HeadBudget, *, scale_by_std: bool = True):
        super().__init__(budget)
        self.scale_by_std = scale_by_std

    def forward(
        self,
        q: Float[Tensor, "B T H C"],
        mask: Bool[Tensor, "B T"] | None = None,
        indices: Int[Tensor, "..."] | None = None,
    ) -> HeadRouting:
        """Route every token by its queries, or a choice that was made before.

        Padding (mask False) has all heads off.
        """
        check_rows("q", q, ("B", "T", self.budget.num_heads, "C"), mask)
        # The norm of a group's queries end to end is the root of its heads' summed squares.
        heads_each = self.budget.heads_per_group
        routing = route_heads_by_query_norm(
            q if heads_each == 1 else rearrange(q, "b t (g r) c -> b t g (r c)", r=heads_each),
            shared_heads=self.shared_groups,
            top_k=self.budget.kept_groups,
            scale_by_std=self.scale_by_std,
            indices=indices,
        )
        return _gates_of_heads(routing, self.budget).with_mask(mask)

    def extra_repr(self) -> str:
        return f"{self.budget}, scale_by_std={self.scale_by_std}"


def _gates_of_heads(routing: HeadRouting, budget: HeadBudget) -> HeadRouting:
    """Give each head its group's gate; indices, probabilities and logits stay those of groups."""
    if budget.heads_per_group == 1:
        return routing
    return routing.with_weights(routing.weights.repeat_interleave(budget.heads_per_group, -1))
