"""Routing of heads in C++ (kernels/routing.h).

A token's softmaxes are a few numbers each: a kernel reads them once, where a chain of tensor
operations costs about as much as a quarter of the attention heads.
"""

from typing import Any

import torch
from torch import Tensor

from headwise.ops.gradients import by_torch_alone, differentiable_gradients
from headwise.ops.native import DTYPES, is_ready, kernels
from headwise.ops.stages import two_stage_gates
from headwise.ops.tensors import adjacent


def has_kernel(logits: Tensor) -> bool:
    """Whether the kernel for softmaxes is there and computes this."""
    plain = logits.dtype == torch.float32 and logits.device.type == "cpu"
    return plain and not by_torch_alone() and is_ready()


def has_kernel_for_queries(q: Tensor) -> bool:
    """Whether the kernel that routes by queries is there and reads these."""
    return q.device.type == "cpu" and q.dtype in DTYPES and is_ready()


def query_norm_routing(
    q: Tensor, shared: list[int], top_k: int, scale_by_std: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `ops.route_heads_by_query_norm`'s routing, in order; q is [B, T, H, C]."""
    return kernels().route_heads_by_query_norm(adjacent(q), _bits(shared), top_k, scale_by_std)


def routing_by_scores(
    scores: Tensor, gain: Tensor | None, shared: list[int], top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, chosen heads and probabilities, as `ops.route_heads_by_scores` has them.

    Scores are [..., R] in float32, and there are no more heads than an integer has bits.
    """
    batch, num_heads = scores.shape[:-1], scores.shape[-1] + len(shared)
    rows = adjacent(scores.reshape(batch.numel(), scores.shape[-1]))
    gain = None if gain is None else gain.float().contiguous()
    parts = kernels().route_heads_by_scores(rows, gain, num_heads, _bits(shared), top_k)
    weights, indices, probabilities = (x.view(*batch, x.shape[-1]) for x in parts)
    return weights, indices, probabilities


def _bits(heads: list[int]) -> int:
    return sum(1 << head for head in heads)


def gates(
    shared: Tensor, routed: Tensor, stage: Tensor | None, top_k: int, paper: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, chosen heads and probabilities of logits [..., n], as `ops.route_heads` has them."""
    batch = shared.shape[:-1]
    logits = [shared, routed, shared.new_empty(*batch, 0) if stage is None else stage]
    rows = [adjacent(x.reshape(batch.numel(), x.shape[-1])) for x in logits]
    parts = native_route_heads(*rows, top_k, paper)
    weights, indices, probabilities = (x.view(*batch, x.shape[-1]) for x in parts)
    return weights, indices, probabilities


# Without `torch.library.custom_op`, whose wrapper costs a decoded token more time than its routing.
_ROUTE = "headwise::native_route_heads"
torch.library.define(
    _ROUTE,
    "(Tensor shared, Tensor routed, Tensor stage, int top_k, bool paper) -> "
    "(Tensor, Tensor, Tensor)",
)
# Gates [N, shared + routed], indices [N, top_k], probabilities [N, routed].
native_route_heads: Any = torch.ops.headwise.native_route_heads


@torch.library.impl(_ROUTE, "cpu")
def _route(
    shared: Tensor, routed: Tensor, stage: Tensor, top_k: int, paper: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels().route_heads(shared, routed, stage, top_k, paper)


@torch.library.custom_op("headwise::native_route_heads_backward", mutates_args=())
def native_route_heads_backward(
    dgates: Tensor,
    dprobabilities: Tensor,
    shared: Tensor,
    routed: Tensor,
    stage: Tensor,
    indices: Tensor,
    paper: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of shared, routed and stage."""
    return kernels().route_heads_backward(
        dgates.contiguous(), dprobabilities.contiguous(), shared, routed, stage, indices, paper
    )


@torch.library.register_fake(_ROUTE)
def _(shared: Tensor, routed: Tensor, stage: Tensor, top_k: int, paper: bool) -> Any:
    tokens = shared.shape[0]
    return (
        shared.new_empty(tokens, shared.shape[1] + routed.shape[1]),
        shared.new_empty(tokens, top_k, dtype=torch.long),
        routed.new_empty(tokens, routed.shape[1]),
    )


@native_route_heads_backward.register_fake
def _(dgates: Tensor, dprobabilities: Tensor, *logits_and_more: Any) -> Any:
    return tuple(x.new_empty(x.shape) for x in logits_and_more[:3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *logits, _, ctx.paper = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*logits, output[1])


def _backward(ctx: Any, dgates: Tensor, _: Tensor, dprobabilities: Tensor) -> Any:
    if torch.is_grad_enabled():
        *logits, indices = ctx.saved_tensors

        def again(shared: Tensor, routed: Tensor, stage: Tensor) -> tuple[Tensor, Tensor]:
            p = routed.softmax(-1)
            return two_stage_gates(shared, p, stage, indices, paper=ctx.paper), p

        return *differentiable_gradients(again, logits, (dgates, dprobabilities)), None, None
    gradients = native_route_heads_backward(dgates, dprobabilities, *ctx.saved_tensors, ctx.paper)
    return *gradients, None, None


torch.library.register_autograd(_ROUTE, _backward, setup_context=_save)
