"""Routers: modules that turn activations into a Routing. All compute in float32 or wider."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import linear, normalize, pad

from headwise.nn.budget import HeadBudget
from headwise.ops import Routing, route_heads, route_heads_by_query_norm, route_tokens
from headwise.ops.routing import HeadMode, arrange_gates

# Of the outputs of a matrix product: a cache line of float32.
_FAST_MULTIPLE = 16


class Router(nn.Module):
    """Base of all routers: forward returns a Routing, and a recorder finds them by this type."""


class ScoreMap(nn.Module):
    """The weight [num_scores, D] of one of the linear maps that TwoStageRouter computes as one.

    Calling it gives the weight, so that hooks which bring weights to where they are needed
    (offloading) run. No nn.Linear: what adapts or replaces these would have no effect here.
    """

    def __init__(self, dim: int, num_scores: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_scores, dim))

    def forward(self) -> Float[Tensor, "K D"]:
        """The weight."""
        return self.weight

    def extra_repr(self) -> str:
        num_scores, dim = self.weight.shape
        return f"dim={dim}, num_scores={num_scores}"


class TwoStageRouter(Router):
    """MoH's learned router: scores for shared heads, for routed heads and for these two stages.

    A linear map exists only where its softmax has a choice to make: `shared` with two shared heads
    or more, `routed` where heads are routed, `stage` where both kinds exist. With a budget in
    groups the maps score groups, and all heads of a group get its gate.

    **Source**: MoH, arXiv 2410.11842, Eq. 5 and 6 (`ops.route_heads` has the formulas).
    **Deviates**: groups of heads are an extension; the paper routes single heads.
    """

    def __init__(
        self, dim: int, budget: HeadBudget, *, mode: HeadMode = "released", std: float = 0.02
    ):
        super().__init__()
        self.budget, self.mode = budget, mode
        shared, routed = len(budget.shared_groups), budget.routed_groups
        self.shared = ScoreMap(dim, shared) if shared > 1 else None
        self.routed = ScoreMap(dim, routed) if routed else None
        self.stage = ScoreMap(dim, 2) if shared and routed else None
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)

    def forward(
        self, x: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"] | None = None
    ) -> Routing:
        """Route every token of x; padding (mask False) has all heads off."""
        shared, routed, stage = self._scores(x)
        routing = route_heads(shared, routed, stage, top_k=self.budget.kept_groups, mode=self.mode)
        if self.budget.chosen:
            gates = routing.weights.split([shared.shape[-1], routed.shape[-1]], dim=-1)
            routing = routing._replace(weights=arrange_gates(self.budget.shared_groups, *gates))
        return _gates_of_heads(routing, self.budget).with_mask(mask)

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of shared groups, routed ones and the stages; even where there is no choice to make."""
        maps = [m() for m in (self.shared, self.routed, self.stage) if m is not None]
        even = x.new_zeros(*x.shape[:-1], len(self.budget.shared_groups), dtype=_wide(x))
        if not maps:
            return even, even[..., :0], None
        # One product for all maps: reading x costs more than the scores. Without the rows of zeros,
        # it would take up to twice as long.
        rows = [len(m) for m in maps]
        weight = pad(torch.cat(maps), (0, 0, 0, -sum(rows) % _FAST_MULTIPLE))
        scores = iter(_linear(x, weight)[..., : sum(rows)].split(rows, dim=-1))
        shared = even if self.shared is None else next(scores)
        routed = even[..., :0] if self.routed is None else next(scores)
        return shared, routed, None if self.stage is None else next(scores)

    def extra_repr(self) -> str:
        return f"{self.budget}, mode={self.mode}"


class QueryNormRouter(Router):
    """MoH's router without parameters, for pretrained models: the longest queries win.

    With a budget in groups, the length of group i is that of the queries of all its heads together,
    z_i = sqrt(sum_h ||q_h||²) over its heads h, and all of them get its gate.

    **Source**: MoH, arXiv 2410.11842, Eq. 9 and 10 (`ops.route_heads_by_query_norm`).
    **Deviates**: groups of heads are an extension; the paper routes single heads.
    """

    def __init__(self, budget: HeadBudget, *, scale_by_std: bool = True):
        super().__init__()
        self.budget, self.scale_by_std = budget, scale_by_std

    def forward(
        self, q: Float[Tensor, "B T H C"], mask: Bool[Tensor, "B T"] | None = None
    ) -> Routing:
        """Route every token by its queries; padding (mask False) has all heads off."""
        # The norm of a group's queries end to end is the root of its heads' summed squares.
        routing = route_heads_by_query_norm(
            rearrange(q, "b t (g r) c -> b t g (r c)", r=self.budget.heads_per_group),
            shared_heads=self.budget.shared_groups,
            top_k=self.budget.kept_groups,
            scale_by_std=self.scale_by_std,
        )
        return _gates_of_heads(routing, self.budget).with_mask(mask)

    def extra_repr(self) -> str:
        return f"{self.budget}, scale_by_std={self.scale_by_std}"


class LinearRouter(Router):
    """softmax(W x) over the experts, the `top_k` best. **Source**: arXiv 2404.15045, Eq. 2."""

    def __init__(self, dim: int, num_experts: int, *, top_k: int, normalize_top_k: bool = True):
        super().__init__()
        _check_experts(num_experts, top_k)
        self.top_k, self.normalize_top_k = top_k, normalize_top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self, x: Float[Tensor, "*batch D"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> Routing:
        """Route every row of x; padding (mask False) goes nowhere."""
        logits = _linear(x, self.weight)
        routing = route_tokens(logits, top_k=self.top_k, normalize=self.normalize_top_k)
        return routing.with_mask(mask)

    def extra_repr(self) -> str:
        num_experts, dim = self.weight.shape
        return f"dim={dim}, num_experts={num_experts}, top_k={self.top_k}"


class CosineRouter(Router):
    """X-MoE's router: cosine between a low-dimensional projection of x and expert embeddings.

        logits = (P x · e_i) / (||P x|| ||e_i|| τ),   τ learned, 0.07 at the start

    **Source**: X-MoE, arXiv 2204.09179, Eq. 4 to 6; used by MH-MoE, arXiv 2404.15045.
    **Deviates**: the released code leaves the projection unnormalised and clamps τ; here both
    sides are normalised, as printed, and τ is the exponential of its parameter, so stays positive.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int,
        normalize_top_k: bool = True,
        projection_dim: int = 16,
    ):
        super().__init__()
        _check_experts(num_experts, top_k)
        self.top_k, self.normalize_top_k = top_k, normalize_top_k
        self.projection = nn.Parameter(torch.empty(projection_dim, dim))
        self.embedding = nn.Parameter(torch.empty(num_experts, projection_dim))
        self.log_temperature = nn.Parameter(torch.empty(()))
        nn.init.xavier_uniform_(self.projection)
        nn.init.orthogonal_(self.embedding, gain=0.32)
        nn.init.constant_(self.log_temperature, -2.6593)  # ln 0.07

    def forward(
        self, x: Float[Tensor, "*batch D"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> Routing:
        """Route every row of x; padding (mask False) goes nowhere."""
        projected = normalize(_linear(x, self.projection), dim=-1)
        embedding = normalize(self.embedding.to(projected.dtype), dim=-1)
        logits = _linear(projected, embedding) / self.log_temperature.to(projected.dtype).exp()
        routing = route_tokens(logits, top_k=self.top_k, normalize=self.normalize_top_k)
        return routing.with_mask(mask)

    def extra_repr(self) -> str:
        num_experts, projection_dim = self.embedding.shape
        return f"num_experts={num_experts}, top_k={self.top_k}, projection_dim={projection_dim}"


def _gates_of_heads(routing: Routing, budget: HeadBudget) -> Routing:
    """The gates of groups become those of their heads; what was chosen stays a choice of groups."""
    if budget.heads_per_group == 1:
        return routing
    return routing._replace(weights=routing.weights.repeat_interleave(budget.heads_per_group, -1))


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    # Autocast would bring the scores back to bfloat16, where a quarter of the tokens tie.
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(_wide(x)), weight.to(_wide(x)))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_experts(num_experts: int, top_k: int) -> None:
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; it must be at least 1")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}; it must lie in 1..{num_experts} (num_experts)")
