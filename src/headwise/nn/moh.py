"""Mixture-of-Head attention as a layer of its own."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.nn.budget import ActiveBudget, Budget, HeadBudget
from headwise.nn.head_widths import attend_by_width, different_widths
from headwise.nn.kv_cache import Keys, KeyValueCache, cache_of, extended, kept_keys
from headwise.nn.linear import is_plain
from headwise.nn.routers import HeadRouter, OneStageRouter, QueryNormRouter, TwoStageRouter
from headwise.nn.tokens import check_dtype, check_tokens
from headwise.ops import HeadRouting, head_attention
from headwise.ops.attention import Impl, check_dropout
from headwise.ops.fields import Count, Index, Range, check, checked
from headwise.ops.first_pass import mark_first_pass
from headwise.ops.head_projection import merge_heads, project_heads, skips_faster
from headwise.ops.rotary import check_rotary, rotate
from headwise.ops.routing import HeadMode
from headwise.ops.scores import HeadScores
from headwise.ops.tensors import check_tensor

HeadRouterName = Literal["two_stage", "one_stage", "query_norm"]
Dropout = Annotated[float, Range(0, below=1)]
Rotary = tuple[Float[Tensor, "..."], Float[Tensor, "..."]]
_EPS = 1e-6  # of qk_norm, as in Qwen3


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
    """Attention whose heads are experts: each token switches on only some of them.

        y_t = sum_h g_h(x_t) · head_h(x_t) W_O^h

    **Source**: MoH, arXiv 2410.11842, Eq. 4; the gates g are those of `ops.route_heads`
    (router "two_stage"), of `OneStageRouter` (router "one_stage": its ablation) or of
    `ops.route_heads_by_query_norm` (router "query_norm").
    **Deviates**: keys and values may be those of a context (cross-attention); what is routed are
    the tokens that ask. Router "query_norm" reads the queries before `qk_norm`, which makes all of
    them about equally long.

    Args:
        dim: Width of the tokens.
        num_heads: All heads. Divides dim unless head_dim or head_dims is given.
        shared_heads: Heads that are always on, the first ones: a count, or a share of num_heads.
        active_heads: Heads that a token switches on, shared ones included: a count or a share.
        num_kv_heads: Key and value heads; divides num_heads. Default: as many as num_heads.
        head_dim: Channels of a head. Default: dim / num_heads.
        head_dims: Channels of each head, where they differ; their sum need not be dim. Default:
            head_dim for all. Such heads have keys of their own, a learned router, no qk_norm and no
            cache.
        context_dim: Width of the context of which keys and values are made. Default: dim.
        router: "two_stage" (learned), "one_stage" (the same with all shared heads at 1) or
            "query_norm" (without parameters).
        mode: For the learned routers: "released" or "paper".
        scores: For the learned routers, of the routed heads: "softmax", "sparsemax" or "sigmoid".
            With sparsemax a token may switch on fewer heads than active_heads.
        causal: A token sees only itself and the tokens before it.
        window: Tokens that a token sees, itself and those right before it; where not causal as many
            after it. Default: all.
        qk_norm: Queries and keys of each head are divided by their root mean square and multiplied
            by learned weights, as in Qwen3.
        dropout: Share of the attention weights that are dropped in training, 0 to below 1. Every
            head is then computed, so impl must be "auto" or "dense".
        bias: Whether q, k, v and o have biases.
        impl: Implementation of `ops.head_attention`.
        route_groups: The query heads of a key head are on or off together, so that decoding reads
            keys and values of those groups only that are on, and the cache traffic of grouped-query
            attention falls with active_heads. Then shared_heads and active_heads still count query
            heads and must be whole groups (a share rounds to them).
        layer_idx: Which layer of a cache is this one's.

    Raises:
        ValueError: For an impossible budget, sizes that do not divide, a router that does not
            exist, dropout with an impl that has none, or what heads of different widths have not.
    """

    @checked
    def __init__(
        self,
        dim: Count,
        *,
        num_heads: Count,
        shared_heads: Budget,
        active_heads: ActiveBudget,
        num_kv_heads: Count | None = None,
        head_dim: Count | None = None,
        head_dims: Sequence[Count] | None = None,
        context_dim: Count | None = None,
        router: HeadRouterName = "two_stage",
        mode: HeadMode = "released",
        scores: HeadScores = "softmax",
        causal: bool = False,
        window: Count | None = None,
        qk_norm: bool = False,
        dropout: Dropout = 0.0,
        bias: bool = True,
        impl: Impl = "auto",
        route_groups: bool = False,
        layer_idx: Index | None = None,
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
        self.head_dims = different_widths(
            head_dims, num_heads=num_heads, head_dim=head_dim, num_kv_heads=num_kv_heads,
            router=router, qk_norm=qk_norm, layer_idx=layer_idx,
        )  # fmt: skip
        if head_dims is not None:
            head_dim = min(head_dims)  # rotary turns no more channels of any head
        if head_dim is None and dim % num_heads:
            raise ValueError(
                f"dim is {dim}; it must be divisible by num_heads = {num_heads}, or give head_dim"
            )
        check_dropout(dropout, impl)
        self.dim, self.budget, self.causal, self.impl = dim, budget, causal, impl
        self.head_dim = head_dim if head_dim is not None else dim // num_heads
        self.context_dim = dim if context_dim is None else context_dim
        self.window, self.dropout, self.layer_idx = window, dropout, layer_idx
        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        if self.head_dims is not None:
            width = kv_width = sum(self.head_dims)
        self.q_proj = nn.Linear(dim, width, bias=bias)
        self.k_proj = nn.Linear(self.context_dim, kv_width, bias=bias)
        self.v_proj = nn.Linear(self.context_dim, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, dim, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=_EPS) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=_EPS) if qk_norm else None
        self.router = head_router(router, dim, budget, mode=mode, scores=scores)

    def forward(
        self,
        x: Float[Tensor, "*batch T D"],
        mask: Bool[Tensor, "*batch N"] | None = None,
        *,
        context: Float[Tensor, "*batch S E"] | None = None,
        context_mask: Bool[Tensor, "*batch S"] | None = None,
        attn_mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
        rotary: Rotary | None = None,
        past_key_values: KeyValueCache | None = None,
        causal: bool | None = None,
    ) -> tuple[Float[Tensor, "*batch T D"], HeadRouting]:
        """Attend.

        Args:
            x: Tokens [B, T, D]. Without a batch [T, D]; masks and context have none then, either.
            mask: True for tokens, False for padding: never seen as a key, routed nowhere. [B, T];
                with a cache [B, P + T], for the P tokens in it, too.
            context: What keys and values are made of instead of x (cross-attention), [B, S, E].
            context_mask: False for padding of the context, [B, S].
            attn_mask: True where a token sees a key; or a float that is added to the scores. As
                torch's `scaled_dot_product_attention` has it, broadcastable to [B, H, T, S].
            rotary: cos and sin, [T, R] or [B, T, R], by which the first R channels of queries and
                keys are turned: what transformers' models call `position_embeddings`. No head may
                be narrower.
            past_key_values: A cache, such as transformers' DynamicCache or StaticCache. Keys and
                values are added to it, and x's tokens see those of earlier calls, too. Of a context
                the first call adds them, and the next ones read them. An EncoderDecoderCache has
                room for both.
            causal: For this call; by default as the layer has it.

        Returns:
            y, and the routing with weights [B, T, H]; exactly active_heads of a token's are not 0
            (with sparsemax at most). With route_groups its indices, probabilities and logits are of
            groups.

        Raises:
            ValueError: If a tensor has another shape, dtype or device, the cache keeps fewer keys
                than the window needs, or two arguments exclude each other.
        """
        if isinstance(x, Tensor) and x.ndim == 2:
            y, routing = self.forward(
                x[None], _in_batch(mask), context=_in_batch(context),
                context_mask=_in_batch(context_mask), attn_mask=attn_mask, rotary=rotary,
                past_key_values=past_key_values, causal=causal,
            )  # fmt: skip
            parts: Any = (None if part is None else part[0] for part in routing)
            return y[0], HeadRouting(*parts)
        causal = self.causal if causal is None else causal
        self._check(x, context, context_mask, rotary, past_key_values, causal)
        if self.head_dims is not None:
            others = (x, mask) if context is None else (context, context_mask)
            return self._of_widths(
                x, mask, *others, attn_mask=attn_mask, rotary=rotary, causal=causal
            )
        cache = cache_of(past_key_values, context=context is not None)
        if context is None:
            keys, own_mask = self._keys(x, mask, rotary, cache, causal)
        else:
            keys, own_mask = self._keys_of_context(context, context_mask, cache), mask
        skips = mask is None and self._skips(x)
        q, routing = self._queries(x, own_mask, rotary, skips=skips)
        seen, bias = keys.masks(attn_mask, q)
        heads = head_attention(
            q.to(keys.v.dtype),
            keys.k,
            keys.v,
            routing.weights,
            causal=keys.causal,
            mask=seen,
            bias=bias,
            window=keys.window,
            dropout=self.dropout if self.training else 0.0,
            share_on=self.router.budget.active_share,
            impl=self.impl,
        )
        if skips:
            return merge_heads(heads, self.o_proj.weight, self.o_proj.bias), routing
        return self.o_proj(rearrange(heads, "b t h c -> b t (h c)")), routing

    def _of_widths(
        self, x: Tensor, mask: Tensor | None, others: Tensor, real: Tensor | None, **options: Any
    ) -> tuple[Tensor, HeadRouting]:
        """The same with heads of different widths, which one router chooses from."""
        assert self.head_dims is not None
        routing = mark_first_pass(self.router(x, mask))
        heads = attend_by_width(
            self.q_proj(x),
            self.k_proj(others),
            self.v_proj(others),
            routing.weights,
            self.head_dims,
            real=real,
            window=self.window,
            dropout=self.dropout if self.training else 0.0,
            share_on=self.router.budget.active_share,
            impl=self.impl,
            **options,
        )
        return self.o_proj(heads), routing

    def _keys(
        self,
        x: Tensor,
        mask: Tensor | None,
        rotary: Rotary | None,
        cache: KeyValueCache | None,
        causal: bool,
    ) -> tuple[Keys, Tensor | None]:
        """What x's tokens may attend to, those of a cache included; and the mask of x alone."""
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        k = _placed(k, self.k_norm, rotary).to(v.dtype)
        if cache is None or self.layer_idx is None:
            return Keys(k, v, mask, causal=causal, window=self.window), mask
        return extended(cache, self.layer_idx, k, v, mask, causal=causal, window=self.window)

    def _keys_of_context(
        self, context: Tensor, mask: Tensor | None, cache: KeyValueCache | None
    ) -> Keys:
        """Those of the whole context, which are made once where a cache keeps them."""
        if cache is not None and self.layer_idx is not None:
            kept = kept_keys(cache, self.layer_idx, context)
            if kept is not None:
                return Keys(*kept, mask)
        k, v = self._heads(self.k_proj(context)), self._heads(self.v_proj(context))
        k = _placed(k, self.k_norm, None).to(v.dtype)
        if cache is not None and self.layer_idx is not None:
            cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
        return Keys(k, v, mask)

    def _queries(
        self, x: Tensor, mask: Tensor | None, rotary: Rotary | None, *, skips: bool
    ) -> tuple[Tensor, HeadRouting]:
        """Queries [B, T, H, C], where `skips` those of heads that are on; and which are on."""
        if isinstance(self.router, QueryNormRouter):
            q = self._heads(self.q_proj(x))
            routing = self.router(q, mask)
        else:
            routing = self.router(x, mask)
            q = (
                project_heads(x, self.q_proj.weight, self.q_proj.bias, routing.weights)
                if skips
                else self._heads(self.q_proj(x))
            )
        return _placed(q, self.q_norm, rotary), mark_first_pass(routing)

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

    def _check(
        self, x: Any, context: Any, context_mask: Any, rotary: Any, cache: Any, causal: bool
    ) -> None:
        """Refuse wrong tensors, and arguments that exclude each other."""
        weight = self.q_proj.weight
        check_tokens(x, None, dim=self.dim, weight=weight)
        check("causal", causal, bool)
        check("past_key_values", cache, KeyValueCache | None)
        if cache is not None and self.head_dims is not None:
            raise ValueError(
                "past_key_values is given; with heads of different widths (head_dims) it must be "
                "None"
            )
        if cache is not None and self.layer_idx is None:
            raise ValueError(
                "layer_idx is None, and past_key_values is given; the constructor must be told "
                "which layer of the cache is this one's"
            )
        if rotary is not None:
            named = "head_dim" if self.head_dims is None else "min(head_dims)"
            check_rotary(rotary, x, self.head_dim, named)
        if context is None:
            if context_mask is not None:
                raise ValueError("context_mask is given, and context is not")
            if self.context_dim != self.dim:
                raise ValueError(
                    f"context is None; a layer with context_dim = {self.context_dim} and dim = "
                    f"{self.dim} needs one"
                )
            return
        check_tensor("context", context, (x.shape[0], "S", self.context_dim), like=weight)
        check_dtype("context", context, weight)
        if context_mask is not None:
            rows = context.shape[:2]
            check_tensor("context_mask", context_mask, rows, kind="torch.bool", like=x)
        for name, given in (
            ("causal", causal), ("window", self.window is not None), ("rotary", rotary is not None),
        ):  # fmt: skip
            if given:
                raise ValueError(
                    f"context is given, and so is {name}; but the tokens of a context have no "
                    "place among x's"
                )

    def extra_repr(self) -> str:
        name = "head_dim" if self.head_dims is None else "head_dims"
        width = f"{name}={getattr(self, name)}"
        return f"{self.budget}, {width}, causal={self.causal}, impl={self.impl}"


def _placed(heads: Tensor, norm: nn.RMSNorm | None, rotary: Rotary | None) -> Tensor:
    """Queries or keys [B, T, H, C], normed and turned where the layer does so."""
    if norm is not None:
        # Under autocast the weights are wider.
        heads = norm(heads.to(norm.weight.dtype)).to(heads.dtype)
    return heads if rotary is None else rotate(heads, *rotary)


def _in_batch(x: Any) -> Any:
    return x[None] if isinstance(x, Tensor) else x
