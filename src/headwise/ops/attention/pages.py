"""Attention over a cache of pages, where the keys of a document are scattered."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.ops.attention import check_options, choose, head_attention, most_decoded
from headwise.ops.attention.spans import check_documents, visible_spans
from headwise.ops.native.decode import native_decode
from headwise.ops.plain_attention import Operands
from headwise.ops.tensors import check_operands, check_same_device, check_same_dtype, check_tensor


def paged_attention(
    q: Float[Tensor, "1 T H C"],
    k_pages: Float[Tensor, "P Hkv C"],
    v_pages: Float[Tensor, "P Hkv C"],
    gate: Float[Tensor, "1 T H"],
    places: Int[Tensor, " S"],
    *,
    cu_seqlens: Int[Tensor, " N"],
    cu_seqlens_k: Int[Tensor, " N"],
    window: int | None = None,
    scale: float | None = None,
    share_on: float | None = None,
) -> Float[Tensor, "1 T H C"]:
    """`head_attention`, causal, of documents in a row whose key s is `k_pages[places[s]]`.

    Documents that come first and have a few queries each, as requests that go on by a token do, are
    read where they lie by the kernels for CPUs, and heads that are off are not read. The keys of
    all others are gathered.

    Args:
        q, gate, cu_seqlens, cu_seqlens_k, window, scale, share_on: As of `head_attention`.
        k_pages, v_pages: All keys and values that are kept, whosever they are.
        places: Where each key of the documents is, from 0 to P - 1.

    Raises:
        ValueError: If a place is not there, or as `head_attention` does.
    """
    check_tensor("places", places, ("S",), kind="whole")
    check_same_device(k_pages=k_pages, places=places)
    pages = {"k_pages": (k_pages, "P Hkv C"), "v_pages": (v_pages, "P Hkv C")}
    check_operands({"q": (q, "B T H C"), "gate": (gate, "B T H")} | pages)
    check_same_dtype(q=q, k_pages=k_pages, v_pages=v_pages)
    check_options(True, window, scale, 0.0, share_on, "auto")
    check_documents(q, places[None], cu_seqlens, cu_seqlens_k)
    if len(places) and (int(places.min()) < 0 or int(places.max()) >= len(k_pages)):
        raise ValueError(
            f"places has entries from {int(places.min())} to {int(places.max())}; they must be "
            f"from 0 to P - 1 = {len(k_pages) - 1}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    x = Operands(q, k_pages[None], v_pages[None], gate, scale=scale)
    few = _with_few_queries(x, cu_seqlens)
    t, s = int(cu_seqlens[few]), int(cu_seqlens_k[few])
    parts = []
    if few:
        spans = visible_spans(
            t, s, causal=True, window=window, cu_seqlens=cu_seqlens[: few + 1],
            cu_seqlens_k=cu_seqlens_k[: few + 1], device=q.device,
        )  # fmt: skip
        parts += [
            native_decode(
                q[:, :t], x.k, x.v, gate[:, :t].float(), False, spans, None, None, scale,
                places[:s].long(),
            )
        ]  # fmt: skip
    if t < q.shape[1]:
        k, v = (pages.index_select(0, places[s:])[None] for pages in (k_pages, v_pages))
        parts += [
            head_attention(
                q[:, t:], k, v, gate[:, t:], causal=True, window=window, scale=scale,
                cu_seqlens=cu_seqlens[few:] - t, cu_seqlens_k=cu_seqlens_k[few:] - s,
                share_on=share_on,
            )
        ]  # fmt: skip
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _with_few_queries(x: Operands, cu_seqlens: Tensor) -> int:
    """How many documents come first of which the kernels read no keys but those that are on."""
    plan = choose(x, longest=1)
    if plan.impl != "native" or not plan.decoding or x.scale <= 0:
        return 0
    has_few = cu_seqlens.diff() <= most_decoded(x.q.shape[2], x.k.shape[2])
    return int(has_few.long().cumprod(0).sum())
