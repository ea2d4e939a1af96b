"""Routers of tokens to experts, in float32 or wider, and the biases that balance their loads."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from headwise.nn.buffers import KeepsBuffers
from headwise.nn.routers import Router
from headwise.nn.tokens import check_rows
from headwise.ops import ExpertRouting, Routing, count_choices, route_tokens
from headwise.ops.fields import Count, Weight, check, checked
from headwise.ops.logits import router_logits
from headwise.ops.processes import sum_over_processes
from headwise.ops.scores import TokenScores
from headwise.ops.top_k import check_top_k


class ExpertRouter(KeepsBuffers, Router):
    """Base of the routers of tokens to experts: what becomes of the logits (`ops.route_tokens`).

    Args:
        num_experts: All experts.
        top_k: Experts that a token goes to.
        normalize_top_k: Let the weights of a token sum to 1.
        scores: "softmax" or "sigmoid".
        bias_rate: Above 0 the choice has a bias that `update_biases` moves by this much, and the
            module the buffers `bias` and `load`, [num_experts], float32 in a model of any dtype.

    Raises:
        ValueError: If one is out of range.
    """

    bias: Tensor | None
    load: Tensor | None

    @checked
    def __init__(
        self,
        num_experts: Count,
        *,
        top_k: Count,
        normalize_top_k: bool = True,
        scores: TokenScores = "softmax",
        bias_rate: Weight = 0.0,
    ):
        super().__init__()
        check_top_k(top_k, num_experts, lowest=1)
        self.top_k, self.normalize_top_k = top_k, normalize_top_k
        self.scores, self.bias_rate = scores, bias_rate
        for name in ("bias", "load"):
            zeros = torch.zeros(num_experts, dtype=torch.float32) if bias_rate else None
            self.register_buffer(name, zeros)

    def route(self, logits: Tensor, mask: Tensor | None, indices: Tensor | None) -> ExpertRouting:
        """The routing of these logits, by a choice that was made before where there is one.

        Padding (mask False) goes nowhere.
        """
        routing = route_tokens(
            logits,
            top_k=self.top_k,
            normalize=self.normalize_top_k,
            scores=self.scores,
            bias=self.bias,
            indices=indices,
        )
        return routing.with_mask(mask)

    def extra_repr(self) -> str:
        balance = f", bias_rate={self.bias_rate}" if self.bias_rate else ""
        return f"top_k={self.top_k}, scores={self.scores}{balance}"


class LinearRouter(ExpertRouter):
    """scores(W x) over the experts, the `top_k` best. **Source**: arXiv 2404.15045, Eq. 2.

    The options are `ExpertRouter`'s.
    """

    @checked
    def __init__(self, dim: Count, num_experts: Count, *, top_k: Count, **options: Any):
        super().__init__(num_experts, top_k=top_k, **options)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self,
        x: Float[Tensor, "*batch D"],
        mask: Bool[Tensor, "*batch"] | None = None,
        indices: Int[Tensor, "..."] | None = None,
    ) -> ExpertRouting:
        """Route every row of x, by a choice that was made before where there is one.

        Padding (mask False) goes nowhere.
        """
        check_rows("x", x, ("...", self.weight.shape[1]), mask, weight=self.weight)
        return self.route(router_logits(x, self.weight), mask, indices)

    def extra_repr(self) -> str:
        num_experts, dim = self.weight.shape
        return f"dim={dim}, num_experts={num_experts}, {super().extra_repr()}"


class CosineRouter(ExpertRouter):
    """X-MoE's router: cosine between a low-dimensional projection of x and expert embeddings.

        logits = (P x · e_i) / (||P x|| ||e_i|| τ),   τ learned, 0.07 at the start

    The options are `ExpertRouter`'s.

    **Source**: X-MoE, arXiv 2204.09179, Eq. 4 to 6; used by MH-MoE, arXiv 2404.15045.
    **Deviates**: the released code leaves the projection unnormalised and clamps τ; here both
    sides are normalised, as printed, and τ is the exponential of its parameter, so stays positive.
    """

    @checked
    def __init__(
        self,
        dim: Count,
        num_experts: Count,
        *,
        top_k: Count,
        projection_dim: Count = 16,
        **options: Any,
    ):
        super().__init__(num_experts, top_k=top_k, **options)
        self.projection = nn.Parameter(torch.empty(projection_dim, dim))
        self.embedding = nn.Parameter(torch.empty(num_experts, projection_dim))
        self.log_temperature = nn.Parameter(torch.empty(()))
        nn.init.xavier_uniform_(self.projection)
        nn.init.orthogonal_(self.embedding, gain=0.32)
        nn.init.constant_(self.log_temperature, -2.6593)  # ln 0.07

    def forward(
        self,
        x: Float[Tensor, "*batch D"],
        mask: Bool[Tensor, "*batch"] | None = None,
        indices: Int[Tensor, "..."] | None = None,
    ) -> ExpertRouting:
        """Route every row of x, by a choice that was made before where there is one.

        Padding (mask False) goes nowhere.
        """
        check_rows("x", x, ("...", self.projection.shape[1]), mask, weight=self.projection)
        projected = normalize(router_logits(x, self.projection), dim=-1)
        embedding = normalize(self.embedding.to(projected.dtype), dim=-1)
        temperature = self.log_temperature.to(projected.dtype).exp()
        return self.route(router_logits(projected, embedding) / temperature, mask, indices)

    def extra_repr(self) -> str:
        num_experts, projection_dim = self.embedding.shape
        sizes = f"num_experts={num_experts}, projection_dim={projection_dim}"
        return f"{sizes}, {super().extra_repr()}"


class FittedExpertRouter(Router):
    """A linear map that scores experts, and weights that make up for those that are off.

        s = W x + b,   p = softmax(s),   w_e = gain_e for top-k(s)

    `headwise.fit_experts` finds W, b and gain for the MLPs of a pretrained model. The gradient of
    the choice is straight-through, dL/dp_e := dL/dw_e gain_e, so that a fitted router can be tuned.

    **Source**: ours, as `FittedRouter` for heads.

    Args:
        dim: Width of the tokens.
        num_experts: All experts.
        top_k: Experts that a token goes to.

    Raises:
        ValueError: If top_k is out of range.
    """

    @checked
    def __init__(self, dim: Count, num_experts: Count, *, top_k: Count):
        super().__init__()
        check_top_k(top_k, num_experts, lowest=1)
        self.top_k = top_k
        self.weight = nn.Parameter(torch.zeros(num_experts, dim))
        self.bias = nn.Parameter(torch.zeros(num_experts))
        self.gain = nn.Parameter(torch.ones(num_experts))

    def forward(
        self,
        x: Float[Tensor, "*batch D"],
        mask: Bool[Tensor, "*batch"] | None = None,
        indices: Int[Tensor, "..."] | None = None,
    ) -> ExpertRouting:
        """Route every row of x, by a choice that was made before where there is one.

        Padding (mask False) goes nowhere.
        """
        check_rows("x", x, ("...", self.weight.shape[1]), mask, weight=self.weight)
        scores = router_logits(x, self.weight) + self.bias
        chosen = route_tokens(scores, top_k=self.top_k, normalize=False, indices=indices)
        # p - p.detach() is exactly 0.
        on = 1 + (chosen.weights - chosen.weights.detach())
        on = on.masked_fill(chosen.indices < 0, 0)
        weights = on * self.gain.to(on.dtype)[chosen.indices]
        routing = ExpertRouting(weights, chosen.indices, chosen.probabilities, chosen.logits)
        return routing.with_mask(mask)

    def extra_repr(self) -> str:
        num_experts, dim = self.weight.shape
        return f"dim={dim}, num_experts={num_experts}, top_k={self.top_k}"


def update_biases(module: nn.Module, routings: Mapping[str, Routing]) -> None:
    """Balancing without a loss: after a training step, experts with too little to do gain.

        bias_e := bias_e + rate · sign(mean load - load_e)

    with load_e the tokens of the step, of all processes, that chose expert e. Routers without a
    `bias_rate` are left alone, and so is one to which no token came. The routers of a model that
    `convert` made do this themselves when it trains with labels: at the start of the next forward.

    **Source**: arXiv 2408.15664, Algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2 (rate
    0.001).
    **Deviates**: padding is not counted. Under gradient accumulation the load is that of the
    routings given here (of a converted model: of each micro-batch, so that each moves the biases).
    A converted model that checkpoints activations must go backward before its next such forward.

    Args:
        module: That has the routers.
        routings: Of the training step, by the names of the routers in the module, as
            `headwise.record_routing(module)` collects them. Every process must come here.

    Raises:
        ValueError: If there is no such router, or it has another number of experts.

    Example:
        >>> with headwise.record_routing(model) as routings:
        ...     loss = …
        >>> loss.backward(); optimizer.step()
        >>> headwise.update_biases(model, routings)
    """
    check("module", module, nn.Module)
    check("routings", routings, Mapping[str, Routing])
    known = {name for name, part in module.named_modules() if isinstance(part, Router)}
    if unknown := sorted(set(routings) - known):
        raise ValueError(
            f"routings has {unknown[0]!r}; the routers of the module are {sorted(known)}"
        )
    for name, routing in routings.items():
        candidates = routing.probabilities.shape[-1]
        load = getattr(module.get_submodule(name), "load", None)
        if load is not None and candidates != len(load):
            raise ValueError(
                f"routings[{name!r}] has {candidates} candidates; its router has {len(load)} "
                "experts"
            )
    keep_loads(module, routings)
    move_biases(module)


@torch.no_grad()
def keep_loads(module: nn.Module, routings: Mapping[str, Routing]) -> None:
    """First half of `update_biases`: each router's `load` becomes that of its routing.

    Not done by the router's forward, which knows neither a model's padding nor whether it is run
    again for the backward pass. After this all processes hold the same, whichever is saved.
    """
    routers = {name: module.get_submodule(name) for name in routings}
    balanced = {
        name: router.load
        for name, router in routers.items()
        if isinstance(router, ExpertRouter) and router.load is not None
    }
    if not balanced:
        return
    device = next(iter(balanced.values())).device
    counts = [count_choices(routings[name]).to(device, torch.float32) for name in balanced]
    sizes = [len(load) for load in balanced.values()]
    sums = sum_over_processes(torch.cat(counts)).split(sizes)
    for load, count in zip(balanced.values(), sums, strict=True):
        load.copy_(count)


@torch.no_grad()
def move_biases(module: nn.Module) -> None:
    """Second half of `update_biases`: biases move by the loads, which become 0."""
    for router in module.modules():
        if isinstance(router, ExpertRouter) and router.bias is not None and router.load is not None:
            router.bias += router.bias_rate * (router.load.mean() - router.load).sign()
            router.load.zero_()
