"""The sparse mixture of experts, and Multi-Head Mixture-of-Experts, which splits its tokens."""

import math
from itertools import chain
from typing import Any, Literal

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.nn.expert_routers import (
    CosineRouter,
    ExpertRouter,
    FittedExpertRouter,
    LinearRouter,
)
from headwise.nn.experts import Experts
from headwise.nn.linear import project
from headwise.nn.tokens import check_tokens
from headwise.ops import ExpertRouting
from headwise.ops.activations import Activation
from headwise.ops.experts import Impl
from headwise.ops.fields import Count, Index, Weight, checked
from headwise.ops.first_pass import mark_first_pass
from headwise.ops.scores import TokenScores

ExpertRouterName = Literal["linear", "cosine", "fitted"]


class MoE(nn.Module):
    """The ordinary sparse mixture of experts: each token goes to a few of many MLPs.

        y = sum_k w_k expert_k(x) [+ x] [+ shared(x)]

    **Source**: arXiv 1701.06538; with normalised weights, as most sparse mixtures since.
    **Deviates**: no capacity, nothing is dropped.

    Args:
        dim: Width of the tokens.
        num_experts: All experts.
        top_k: Experts that a token goes to.
        expert_dim: Hidden width of an expert.
        normalize_top_k: Let the weights of a token sum to 1. With top_k = 1 the weight is then
            constantly 1, and only the balance loss trains the router.
        shared_expert_dim: Hidden width of an expert for every token; None or 0 for none.
        inner_residual: Add the token to what its experts say.
        activation: "silu", "gelu" or "relu".
        glu: Gated experts (three matrices) instead of plain ones (two).
        router: "linear", X-MoE's "cosine", or "fitted" (`headwise.fit_experts`), whose weights are
            gains: `normalize_top_k` says nothing to it.
        scores: "softmax" over the experts, or DeepSeek-V3's "sigmoid" of each (`ops.route_tokens`).
        bias_rate: Above 0 a bias for the choice alone balances the experts, moved by this much at
            a time (`update_biases`); 0 for none.
        impl: Implementation of `ops.expert_mlp`.

    Raises:
        ValueError: For counts out of range.
    """

    # Parts of a token, each of which is routed on its own.
    num_heads = 1

    @checked
    def __init__(
        self,
        dim: Count,
        *,
        num_experts: Count,
        top_k: Count,
        expert_dim: Count,
        normalize_top_k: bool = True,
        shared_expert_dim: Index | None = None,
        inner_residual: bool = False,
        activation: Activation = "silu",
        glu: bool = True,
        router: ExpertRouterName = "linear",
        scores: TokenScores = "softmax",
        bias_rate: Weight = 0.0,
        impl: Impl = "auto",
    ):
        super().__init__()
        self.dim, self.num_experts, self.expert_dim = dim, num_experts, expert_dim
        self.inner_residual = inner_residual
        # First, so that parameters keep their order and draw the same random numbers as ever.
        self._add_projections()
        width = dim // self.num_heads
        if router == "fitted":
            _check_options_of_fitted(scores, bias_rate)
            self.router: ExpertRouter | FittedExpertRouter = FittedExpertRouter(
                width, num_experts, top_k=top_k
            )
        else:
            kind = LinearRouter if router == "linear" else CosineRouter
            self.router = kind(
                width,
                num_experts,
                top_k=top_k,
                normalize_top_k=normalize_top_k,
                scores=scores,
                bias_rate=bias_rate,
            )
        self.experts = Experts(
            num_experts, width, expert_dim, glu=glu, activation=activation, impl=impl
        )
        self.shared_expert = (
            Experts(1, dim, shared_expert_dim, glu=glu, activation=activation)
            if shared_expert_dim
            else None
        )

    def _add_projections(self) -> None:
        """What a subclass puts before and after the experts."""

    @checked
    def reset_experts(self, *, std: Weight) -> None:
        """Normal for all matrices of the experts, the shared one included.

        Args:
            std: The deviation that suits inputs as wide as a token. The first matrices of experts
                that read sub-tokens, num_heads times as narrow, get √num_heads times as much, so
                that what they compute starts as large.
        """
        nn.init.normal_(self.experts.first_proj, std=std * math.sqrt(self.num_heads))
        nn.init.normal_(self.experts.down_proj, std=std)
        if self.shared_expert is not None:
            nn.init.normal_(self.shared_expert.first_proj, std=std)
            nn.init.normal_(self.shared_expert.down_proj, std=std)

    def forward(
        self, x: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], ExpertRouting]:
        """Split, route, compute, merge.

        Args:
            x: Tokens.
            mask: True for tokens, False for padding, which is neither routed nor counted.

        Returns:
            y, and the routing with weights and indices [B, T, num_heads, top_k].

        Raises:
            ValueError: If x or mask has another shape or dtype.
        """
        # Not by name: an adapter may stand around the experts.
        weight = next(chain(self.experts.parameters(), self.experts.buffers()))
        check_tokens(x, mask, dim=self.dim, weight=weight)
        u = self.split(x)
        routing = self.router(u, None if mask is None else mask.unsqueeze(-1).expand(u.shape[:-1]))
        flat = rearrange(u, "b t h s -> (b t h) s")
        out = self.experts(
            flat,
            rearrange(routing.indices, "b t h k -> (b t h) k"),
            rearrange(routing.weights, "b t h k -> (b t h) k"),
        )
        out = flat + out if self.inner_residual else out
        y = self.merge(out.reshape(x.shape))
        if self.shared_expert is not None:
            y = y + self.shared_expert(x)
        return y, mark_first_pass(routing)

    def split(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T h s"]:
        """The parts that are routed: here each token whole."""
        return rearrange(x, "b t (h s) -> b t h s", h=self.num_heads)

    def merge(self, parts: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """A token of what the experts say of its parts, end to end."""
        return parts

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, inner_residual={self.inner_residual}"


def _check_options_of_fitted(scores: TokenScores, bias_rate: float) -> None:
    for name, value, needed in (("scores", scores, "softmax"), ("bias_rate", bias_rate, 0.0)):
        if value != needed:
            raise ValueError(f"{name} is {value!r}; with router 'fitted' it must be {needed!r}")


class MHMoE(MoE):
    """Splits each token into sub-tokens that go to many small experts, and merges what they say.

        u = split(W_head x);   o = sum_k w_k expert_k(u);   y = W_merge concat(o) [+ shared(x)]

    **Source**: MH-MoE, arXiv 2411.16205, section 2; arXiv 2404.15045, Eq. 1 to 6.
    **Deviates**: no capacity, nothing is dropped (the first paper's code drops tokens, so its
    outputs depend on batch mates). The inner residual is in the first paper, not in its code.

    Args:
        dim: Width of the tokens; divisible by num_heads.
        num_heads: Sub-tokens of a token, each dim / num_heads wide.
        bias: Biases in head and merge layer (first paper: yes; second: no).
        head_layer: Whether there is a head layer before the split.
        merge_layer: Whether there is a merge layer after the experts.
        options: Those of `MoE`, of which num_experts, top_k and expert_dim have no default. Routed
            are sub-tokens; the shared expert gets the whole token.

    Raises:
        ValueError: For sizes that do not divide or counts out of range.
    """

    @checked
    def __init__(
        self,
        dim: Count,
        *,
        num_heads: Count,
        bias: bool = False,
        head_layer: bool = True,
        merge_layer: bool = True,
        **options: Any,
    ):
        if dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide dim = {dim}")
        self.num_heads = num_heads
        self._projections = (head_layer, merge_layer, bias)
        super().__init__(dim, **options)
        self.reset_parameters()

    def _add_projections(self) -> None:
        head_layer, merge_layer, bias = self._projections
        self.head_proj = nn.Linear(self.dim, self.dim, bias=bias) if head_layer else None
        self.merge_proj = nn.Linear(self.dim, self.dim, bias=bias) if merge_layer else None

    def reset_parameters(self) -> None:
        """Xavier for head (gain 1/√2) and merge layer, as in the released code; biases 0."""
        for proj, gain in ((self.head_proj, math.sqrt(0.5)), (self.merge_proj, 1.0)):
            if proj is not None:
                nn.init.xavier_uniform_(proj.weight, gain=gain)
                if proj.bias is not None:
                    nn.init.zeros_(proj.bias)

    def split(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T h s"]:
        """The sub-tokens of W_head x."""
        return super().split(x if self.head_proj is None else project(self.head_proj, x))

    def merge(self, parts: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """W_merge concat(o)."""
        return parts if self.merge_proj is None else project(self.merge_proj, parts)
