"""Mixture-of-Head attention as a layer of its own."""

from typing import Literal

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.nn.budget import Budget, HeadBudget
from headwise.nn.linear import is_plain
from headwise.nn.routers import HeadRouter, OneStageRouter, QueryNormRouter, TwoStageRouter
from headwise.nn.tokens import check_tokens
from headwise.ops import HeadRouting, head_attention
from headwise.ops.attention import Impl
from headwise.ops.fields import Count, checked
from headwise.ops.first_pass import mark_first_pass
from headwise.ops.head_projection import merge_heads, project_heads, skips_faster
from headwise.ops.routing import HeadMode
from headwise.ops.scores import HeadScores

HeadRouterName = Literal["two_stage", "one_stage", "query_norm"]


def check_head_router(router: str, *, scores: HeadScores) -> None:
    """Refuse scores that the router has no use for."""
    if router not in _GATES_ARE_SCORES and scores != "softmax":
        raise ValueError(
            f"scores is {scores!r}; with router {router!r}, whose gates do not depend on the size "
            "of its scores, it must be 'softmax'"
        )


_GATES_ARE_SCORES = ("two_stage", "one_stage")


def head_router(
    router: HeadRouterName,
    dim: int,
    budget: HeadBudget,
    *,
    mode: HeadMode,
    scores: HeadScores = "softmax",
    std: float = 0.02,
) -> HeadRouter:
    """The router of that name: "query_norm" reads the queries, the others learn from x.

    Weights of a learned router start normal with deviation `std`.
    """
    check_head_router(router, scores=scores)
    if router == "query_norm":
        return QueryNormRouter(budget)
    kind = TwoStageRouter if router == "two_stage" else OneStageRouter
    return kind(dim, budget, mode=mode, scores=scores, std=std)


class MoHAttention(nn.Module):
    """Self-attention whose heads are experts: each token switches on only some of them.

        y_t = sum_h g_h(x_t) · head_h(x_t) W_O^h

    **Source**: MoH, arXiv 2410.11842, Eq. 4; the gates g are those of `ops.route_heads`
    (router "two_stage"), of `OneStageRouter` (router "one_stage": its ablation) or of
    `ops.route_heads_by_query_norm` (router "query_norm").

    Args:
        dim: Width of the tokens.
        num_heads: All heads. Divides dim unless head_dim is given.
        shared_heads: Heads that are always on, the first ones: a count, or a share of num_heads.
        active_heads: Heads that a token switches on, shared ones included: a count or a share.
        num_kv_heads: Key and value heads; divides num_heads. Default: as many as num_heads.
        head_dim: Channels of a head. Default: dim / num_heads.
        router: "two_stage" (learned), "one_stage" (the same with all shared heads at 1) or
            "query_norm" (without parameters).
        mode: For the learned routers: "released" or "paper".
        scores: For the learned routers, of the routed heads: "softmax", "sparsemax" or "sigmoid".
            With sparsemax a token may switch on fewer heads than active_heads.
        causal: A token sees only itself and the tokens before it.
        bias: Whether q, k, v and o have biases.
        impl: Implementation of `ops.head_attention`.
        route_groups: The query heads of a key head are on or off together, so that decoding reads
            keys and values of those groups only that are on, and the cache traffic of grouped-query
            attention falls with active_heads. Then shared_heads and active_heads still count query
            heads and must be whole groups (a share rounds to them).

    Raises:
        ValueError: For an impossible budget, sizes that do not divide, or a router that does not
            exist.
    """

    @checked
    def __init__(
        self,
        dim: Count,
        *,
        num_heads: Count,
        shared_heads: Budget,
        active_heads: Budget,
        num_kv_heads: Count | None = None,
        head_dim: Count | None = None,
        router: HeadRouterName = "two_stage",
        mode: HeadMode = "released",
        scores: HeadScores = "softmax",
        causal: bool = False,
        bias: bool = True,
        impl: Impl = "auto",
        route_groups: bool = False,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {num_kv_heads}; it must divide num_heads = {num_heads}"
            )
        budget = HeadBudget.resolve(
            num_heads,
            shared=shared_heads,
            active=active_heads,
            num_groups=num_kv_heads if route_groups else None,
        )
        if head_dim is None and dim % num_heads:
            raise ValueError(
                f"dim is {dim}; it must be divisible by num_heads = {num_heads}, or give head_dim"
            )
        self.dim, self.budget, self.causal, self.impl = dim, budget, causal, impl
        self.head_dim = head_dim if head_dim is not None else dim // num_heads
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias)
        self.router = head_router(router, dim, budget, mode=mode, scores=scores)

    def forward(
        self, x: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], HeadRouting]:
        """Attend.

        Args:
            x: Tokens.
            mask: True for tokens, False for padding: never seen as a key, routed nowhere.

        Returns:
            y, and the routing with weights [B, T, H]; exactly active_heads of a token's are not 0
            (with sparsemax at most). With route_groups its indices, probabilities and logits are of
            groups.

        Raises:
            ValueError: If x or mask has another shape or dtype.
        """
        check_tokens(x, mask, dim=self.dim, weight=self.q_proj.weight)
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        skips = mask is None and self._skips(x)
        if isinstance(self.router, QueryNormRouter):
            q = self._heads(self.q_proj(x))
            routing = mark_first_pass(self.router(q, mask))
        else:
            routing = mark_first_pass(self.router(x, mask))
            q = (
                project_heads(x, self.q_proj.weight, self.q_proj.bias, routing.weights)
                if skips
                else self._heads(self.q_proj(x))
            )
        heads = head_attention(
            q,
            k,
            v,
            routing.weights,
            causal=self.causal,
            mask=None if mask is None else rearrange(mask, "b s -> b 1 1 s"),
            share_on=self.router.budget.active_share,
            impl=self.impl,
        )
        if skips:
            return merge_heads(heads, self.o_proj.weight, self.o_proj.bias), routing
        return self.o_proj(rearrange(heads, "b t h c -> b t (h c)")), routing

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t (h c) -> b t h c", c=self.head_dim)

    def _skips(self, x: Tensor) -> bool:
        """Whether queries and outputs of heads that are off are left out, too."""
        budget = self.budget
        plain = is_plain(self.q_proj) and is_plain(self.o_proj)
        return (
            plain
            and self.impl == "auto"
            and skips_faster(
                x,
                self.q_proj.weight,
                head_dim=self.head_dim,
                routed_heads=budget.routed_heads,
                off=budget.num_heads - budget.active_heads,
            )
        )

    def extra_repr(self) -> str:
        return f"{self.budget}, head_dim={self.head_dim}, causal={self.causal}, impl={self.impl}"
