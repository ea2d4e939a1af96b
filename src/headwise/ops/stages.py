"""The gates of MoH's two stages, once the routed heads are chosen."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.ops.dtypes import widened
from headwise.ops.top_k import multi_hot


def two_stage_gates(
    shared_logits: Float[Tensor, "*batch shared"],
    p: Float[Tensor, "*batch routed"],
    stage_logits: Float[Tensor, "*batch 2"] | None,
    indices: Int[Tensor, "*batch K"],
    *,
    paper: bool,
) -> Float[Tensor, "*batch H"]:
    """The equations of `ops.route_heads`; p are the scores of the routed heads."""
    shared = widened(shared_logits).softmax(-1)
    routed = p * multi_hot(indices, p)
    if not paper:
        shared = shared * shared.shape[-1]
        eps = torch.finfo(routed.dtype).eps
        routed = routed / routed.sum(-1, keepdim=True).clamp_min(eps) * indices.shape[-1]
    if shared.shape[-1] and routed.shape[-1] and stage_logits is not None:
        stage = widened(stage_logits).softmax(-1) * (1 if paper else 2)
        shared, routed = shared * stage[..., :1], routed * stage[..., 1:]
    return torch.cat([shared, routed], dim=-1)
