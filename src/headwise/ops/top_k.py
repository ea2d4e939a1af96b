"""The best of many candidates, with one answer everywhere: of equal scores the lowest index."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.ops.fields import check
from headwise.ops.tensors import check_tensor

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


def choice_of(
    scores: Float[Tensor, "*batch E"], k: int, given: Int[Tensor, "..."] | None
) -> tuple[Int[Tensor, "*batch K"], Int[Tensor, "*batch K"]]:
    """Which k candidates are chosen, as a routing says it, and the same to index with.

    Args:
        scores: By which the best are chosen.
        k: How many.
        given: The choice, where it was made before; -1 for none. To index with, -1 is the row's
            first one, or 0.

    Raises:
        ValueError: If the given choice has another shape, or no such candidates.
    """
    if given is None:
        best = top_k_lowest_first(scores, k)
        return best, best
    check_tensor("indices", given, (*scores.shape[:-1], k), kind="whole", like=scores)
    if k and given.numel() and not (torch.compiler.is_compiling() or given.is_meta):
        lowest, highest = given.aminmax()
        if lowest < -1 or highest >= scores.shape[-1]:
            raise ValueError(
                f"indices holds {int(lowest)} to {int(highest)}; they must lie in "
                f"-1..{scores.shape[-1] - 1}"
            )
    given = given.long()
    return given, torch.where(given < 0, given[..., :1], given).clamp_min(0)


def check_top_k(top_k: int, candidates: int, lowest: int) -> None:
    """Raises ValueError unless so many of the candidates can be kept."""
    check("top_k", top_k, int)
    if not lowest <= top_k <= candidates:
        raise ValueError(f"top_k is {top_k}; it must lie in {lowest}..{candidates}")
