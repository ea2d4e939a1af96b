"""What a query may see as a span of keys: sliding windows and documents in a row, causal or not."""

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.ops.tensors import check_same_device, check_tensor


def visible_spans(
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: int | None,
    cu_seqlens: Int[Tensor, " N"] | None,
    cu_seqlens_k: Int[Tensor, " N"] | None,
    device: torch.device,
) -> Int[Tensor, "1 T 2"]:
    """For each query the first key that it sees, and the one after the last.

    Example: documents of 2 and 3 tokens, causal, window 2: (0, 1), (0, 2), (2, 3), (2, 4), (3, 5).
    """
    t = torch.arange(queries, device=device)
    begin, end = torch.zeros_like(t), torch.full_like(t, keys)
    last = t + keys - queries
    if cu_seqlens is not None:
        of_keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        document = torch.searchsorted(
            cu_seqlens[1:].contiguous(), t.to(cu_seqlens.dtype), right=True
        )
        begin, end = of_keys[document].long(), of_keys[document + 1].long()
        # As in the whole: a document's last query sees its last key.
        last = end - cu_seqlens[document + 1] + t
    if causal:
        end = torch.minimum(end, last + 1)
    if window is not None:
        begin = torch.maximum(begin, last - window + 1)
        end = end if causal else torch.minimum(end, last + window)
    return torch.stack([begin, torch.maximum(begin, end)], dim=-1)[None].int()


def check_documents(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None
) -> None:
    """Raises ValueError unless the documents cover the tokens of a batch of one, one by one.

    What is exported has no values yet: where documents begin and end is not checked then.
    """
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise ValueError(
                "cu_seqlens_k is given without cu_seqlens, which says where queries are"
            )
        return
    if q.shape[0] != 1:
        raise ValueError(
            f"q has shape {list(q.shape)}; with cu_seqlens its batch must be 1: documents stand in "
            "a row"
        )
    of_keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    for name, edges, of, size in (
        ("cu_seqlens", cu_seqlens, "T", q.shape[1]),
        ("cu_seqlens_k" if cu_seqlens_k is not None else "cu_seqlens", of_keys, "S", k.shape[1]),
    ):
        check_tensor(name, edges, ("N",), kind="whole")
        check_same_device(**{"q": q, name: edges})
        if not torch.compiler.is_exporting() and not _cover(edges, size):
            raise ValueError(
                f"{name} is {edges.tolist()}; it must ascend from 0 to {of} = {size}: where "
                "documents begin, and where the last one ends"
            )
    if of_keys.shape != cu_seqlens.shape:
        raise ValueError(
            f"cu_seqlens_k has {len(of_keys)} entries; it must have as many as cu_seqlens, "
            f"{len(cu_seqlens)}"
        )


def _cover(edges: Tensor, size: int) -> bool:
    """Whether the edges ascend from 0 to the size."""
    ends = len(edges) >= 2 and int(edges[0]) == 0 and int(edges[-1]) == size
    return ends and not (edges.diff() < 0).any()
