"""From logits to scores: how much of each candidate, and what of it sums to 1."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from headwise.ops.choice import check_choice
from headwise.ops.tensors import check_tensor

HeadScores = Literal["softmax", "sparsemax", "sigmoid"]
TokenScores = Literal["softmax", "sigmoid"]


def affinities(
    logits: Float[Tensor, "*batch E"], scores: HeadScores
) -> tuple[Float[Tensor, "*batch E"], Float[Tensor, "*batch E"]]:
    """The scores by which candidates are chosen and weighed, and the same divided by their sum.

    softmax and sparsemax sum to 1 already; sigmoids lie in 0..1 each for itself.
    """
    check_choice("scores", scores, HeadScores)
    check_tensor("logits", logits, ("...", "E"))
    if scores == "sigmoid":
        return logits.sigmoid(), log_affinities(logits, scores).softmax(-1)
    probabilities = sparsemax(logits) if scores == "sparsemax" else logits.softmax(-1)
    return probabilities, probabilities


def log_affinities(
    logits: Float[Tensor, "*batch E"], scores: TokenScores
) -> Float[Tensor, "*batch E"]:
    """Logarithms of the affinities up to a constant of the token: they do not underflow."""
    return logsigmoid(logits) if scores == "sigmoid" else logits


def sparsemax(logits: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
    """The point of the simplex nearest to the logits: like softmax, with scores of exactly 0.

        p_i = max(z_i - τ, 0),   τ so that they sum to 1:   τ = max_j (z_(1) + … + z_(j) - 1) / j

    with z_(1) ≥ z_(2) ≥ … the logits in descending order. The gradient of a score of 0 is 0.

    **Source**: Martins and Astudillo, arXiv 1602.02068, Eq. 2 and Algorithm 1, of whose thresholds
    the largest is τ.

    Raises:
        ValueError: If the logits are no floating tensor.

    Example (worked by hand): of 0.8, 0.6 and -1 the first two remain, τ = 0.2: 0.6, 0.4 and 0.
    """
    check_tensor("logits", logits, ("...", "E"))
    if logits.shape[-1] == 0:
        return logits
    # Shifting all logits shifts τ; near 0 no digits are lost.
    z = logits - logits.detach().amax(-1, keepdim=True)
    ordered = z.detach().sort(dim=-1, descending=True).values
    ranks = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    thresholds = (ordered.cumsum(-1) - 1) / ranks
    support = z.detach() > thresholds.amax(-1, keepdim=True)
    # Once more from the support alone, for the gradient.
    total = torch.where(support, z, 0).sum(-1, keepdim=True)
    threshold = (total - 1) / support.sum(-1, keepdim=True)
    return torch.where(support, z - threshold, 0).clamp_min(0)
