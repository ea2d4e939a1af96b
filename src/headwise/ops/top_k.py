"""The best of many candidates, with one answer everywhere: of equal scores the lowest index."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.ops.fields import check

# Up to this share of the candidates, finding one maximum after the other is faster than sorting.
_FEW = 1 / 8


def top_k_lowest_first(scores: Float[Tensor, "*batch E"], k: int) -> Int[Tensor, "*batch K"]:
    """Indices of the `k` largest scores, best first; of equal scores the lowest index wins.

    torch.topk leaves the order of ties to the backend, so two devices could route differently;
    torch.max and a stable sort do not. Scores must be finite.
    """
    few = k <= _FEW * scores.shape[-1] or torch.compiler.is_exporting()  # ONNX has no stable sort
    if k == 0 or not few:
        # A copy, or the order of all would be kept as long as that of the best.
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        return order[..., :k].contiguous()
    best = [scores.max(-1, keepdim=True).indices]
    while len(best) < k:
        scores = scores.scatter(-1, best[-1], float("-inf"))
        best.append(scores.max(-1, keepdim=True).indices)
    return torch.cat(best, dim=-1)


def multi_hot(indices: Tensor, like: Tensor) -> Tensor:
    """1 at the indices, 0 elsewhere, of the shape and dtype of `like`."""
    return torch.zeros_like(like).scatter(-1, indices, 1.0)


def check_top_k(top_k: int, candidates: int, lowest: int) -> None:
    """Raises ValueError unless so many of the candidates can be kept."""
    check("top_k", top_k, int)
    if not lowest <= top_k <= candidates:
        raise ValueError(f"top_k is {top_k}; it must lie in {lowest}..{candidates}")
