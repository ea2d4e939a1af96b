"""Attention with heads gated per query token: signature, checks, choice of implementation.

reference   Eq. 4 with loops: the specification.
dense       Every head by torch's own attention, then the gate: skips nothing.
gathered    Only heads that are on, by torch's kernels on gathered queries. Forward and backward.
native      The same fused in C++, for CPUs. Forward, backward, decode.
decode      A few queries against a long cache; keys of heads off are not read. Forward only.
triton      Fused kernels for CUDA devices. Forward, backward, decode.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.ops.attention import decode, dense, gathered, reference
from headwise.ops.attention.spans import check_documents, visible_spans
from headwise.ops.choice import check_choice
from headwise.ops.gpu import runs_triton
from headwise.ops.gradients import by_torch_alone, check_named, is_mapped, learns
from headwise.ops.native import DTYPES, is_built, is_ready
from headwise.ops.native.attention import largest_share, native_attention
from headwise.ops.native.decode import native_decode
from headwise.ops.plain_attention import Operands, mask_of
from headwise.ops.tensors import (
    Kind,
    check_broadcastable,
    check_operands,
    check_same_dtype,
)

__all__ = ["Impl", "Operands", "Plan", "check_dropout", "choose", "head_attention"]

Impl = Literal["auto", "reference", "dense", "gathered", "native", "decode", "triton"]

# Below these, finding out which heads are on costs more than computing all of them: the keys for
# impl "native", all scores for impl "gathered".
_FEWEST_KEYS = 128
_FEWEST_SCORES = 2**20
# Below this size of the keys, impl "decode" waits for Python rather than for memory.
_SMALLEST_CACHE = 8 * 2**20
# Above this many queries of a key head, arithmetic costs more than reading the cache.
_MOST_DECODED = 16
_MOST_CHANNELS = 1024  # of impl "native"
# On an H100 the kernels are as fast as cuDNN's for all heads of up to 64 channels, and for three in
# four of wider ones (results/gpu.csv).
_NARROW, _MOST_ON_A_GPU = 64, 0.75
_LARGEST_SCALE = 1e38  # of float32
_IN_PYTORCH = {
    "reference": reference.head_attention,
    "dense": dense.head_attention,
    "gathered": gathered.head_attention,
    "decode": decode.head_attention,
}


def head_attention(
    q: Float[Tensor, "B T H C"],
    k: Float[Tensor, "B S Hkv C"],
    v: Float[Tensor, "B S Hkv C"],
    gate: Float[Tensor, "B T H"],
    *,
    causal: bool = False,
    mask: Bool[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    window: int | None = None,
    cu_seqlens: Int[Tensor, " N"] | None = None,
    cu_seqlens_k: Int[Tensor, " N"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    share_on: float | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "B T H C"]:
    """Gated attention heads, the summands of MoH before the output projection.

        y[b,t,h] = gate[b,t,h] · sum_s softmax_s(scale · q[b,t,h]·k[b,s] + bias[b,h,t,s]) v[b,s]

    A gate of exactly 0 means off: the pair (t, h) gives 0 and passes no gradient, to its gate
    neither. Query heads share key heads in groups of H / Hkv (grouped-query attention).

    **Source**: MoH, arXiv 2410.11842, Eq. 4.
    **Deviates**: the gradient of a gate that is off is 0 by definition, so that an implementation
    may skip the head; the released code computes every head and masks it.

    Args:
        q: Queries.
        k: Keys; S may differ from T, Hkv divides H.
        v: Values.
        gate: Weight of each head for each query token, in any float dtype.
        causal: Token t sees keys up to t + S - T (the last query sees all keys).
        mask: True where a key may be seen; broadcastable to [B, H, T, S].
        bias: Added to the scores, -inf where a key may not be seen; broadcastable to [B, H, T, S].
        window: Keys that a token sees, itself and those right before it (sliding window), at least
            1; where not causal as many after it.
        cu_seqlens: Documents in a row, in a batch of one: where each of them begins, and T. A token
            sees keys of its own document only; `causal` and `window` hold within each.
        cu_seqlens_k: The same for keys, where they differ from the queries, as many documents.
        scale: Factor of the scores, finite; 1/√C by default.
        dropout: Share of the attention weights that are dropped, 0 to below 1. Then every head is
            computed ("dense"), because torch's own attention has dropout.
        share_on: Share of the heads that are on, 0 to 1, where the caller knows it from a budget:
            on a GPU "auto" would have to wait for the gates to count them. It changes no result.
        impl: "auto" chooses by device and shape (`choose`); a named one is that one or an error.

    Returns:
        The gated heads in q's dtype. A query whose mask is False everywhere gives 0, never NaN.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, a number is out of range, impl is
            unknown, or impl cannot compute this.

    Example (worked by hand): one head, q = 0, values 2 and 4, gate 1/2: y = 1/2 · (2 + 4)/2 = 1.5.
    """
    check_choice("impl", impl, Impl)
    _check(q, k, v, gate, mask, bias)
    check_options(causal, window, scale, dropout, share_on, impl)
    check_documents(q, k, cu_seqlens, cu_seqlens_k)
    if q.numel() == 0 or k.numel() == 0:
        return q.clone().zero_()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:
        # A softmax needs the largest score times scale; and torch's kernel masks, then scales.
        q, scale = (-q, -scale) if scale < 0 else (0 * q, 1.0)
    spans = None
    if window is not None or cu_seqlens is not None:
        spans = visible_spans(
            q.shape[1], k.shape[1], causal=causal, window=window, cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k, device=q.device,
        )  # fmt: skip
        causal, share_on = False, None  # torch's own kernels are fast without a mask only
    x = Operands(q, k, v, gate, causal, _four_dimensional(mask), _four_dimensional(bias), scale)
    if q.is_meta:
        impl = "auto"  # nothing is computed there, by any
    if dropout:
        return dense.head_attention(_masked(x, spans), dropout)
    plan = choose(x, share_on=share_on, impl=impl, longest=_longest_document(x.q, cu_seqlens))
    if plan.impl == "native":
        return _native(x, spans, plan)
    if plan.impl == "triton":
        return _triton(x, spans, plan)
    return _IN_PYTORCH[plan.impl](_masked(x, spans))


class Plan(NamedTuple):
    """How one call is computed. It is made once; the implementations rely on it.

    Attributes:
        impl: An implementation that computes these operands.
        decoding: There are few queries for each key head, and nothing learns: reading the keys is
            the cost.
        learning: Gradients are on and q, k, v or the gates want one.
    """

    impl: Impl
    decoding: bool
    learning: bool


def _native(x: Operands, spans: Tensor | None, plan: Plan) -> Tensor:
    bias = None if x.bias is None else x.bias.detach().float()
    operands = (x.q, x.k, x.v, x.gate.float(), x.causal, spans, x.mask, bias, x.scale)
    if plan.decoding:
        return native_decode(*operands)
    plain = spans is None and x.mask is None and bias is None
    limit = largest_share(x.q.dtype, x.k.shape[1], learning=plan.learning or not plain)
    return native_attention(*operands, limit)[0]


def _triton(x: Operands, spans: Tensor | None, plan: Plan) -> Tensor:
    from headwise.ops.attention import triton

    if x.mask is not None:
        x, spans = _masked(x, spans), None
    return (triton.decode_attention if plan.decoding else triton.head_attention)(x, spans)


def _masked(x: Operands, spans: Tensor | None) -> Operands:
    """The same, with a mask for what the spans say."""
    if spans is None:
        return x
    seen = mask_of(spans, x.k.shape[1])
    return x._replace(mask=seen if x.mask is None else seen & x.mask)


def choose(
    x: Operands, *, share_on: float | None = None, impl: Impl = "auto", longest: int | None = None
) -> Plan:
    """The plan for a call; impl "auto" stands for the implementation that should be fastest.

    `longest` says how many queries the longest document has: native reads the keys of a document
    for its own queries only.

    CUDA: triton; dense where the caller says that more heads are on than skipping is worth
    (`_MOST_ON_A_GPU`); gathered where a bias is added or the head width has no kernel. CPU: native
    where it is built and computes these operands; else decode for a few queries without gradients,
    gathered otherwise; dense for short inputs. Where too few heads are off, gathered computes all
    (`gathered.largest_share`). Other devices, torch.export, `torch.func` and forward gradients:
    dense.
    """
    learning = learns(x.q, x.k, x.v, x.gate)
    _, queries, heads, _ = x.q.shape
    # An exported program takes inputs of other lengths than the example, and must not ask.
    asks = not learning and not torch.compiler.is_exporting()
    most = most_decoded(heads, x.k.shape[2])
    decoding = asks and queries <= most
    by_document = asks and (queries if longest is None else longest) <= most
    if impl == "auto":
        fastest = "dense" if by_torch_alone() else _fastest(x, decoding, by_document, share_on)
        return Plan(fastest, by_document if fastest == "native" else decoding, learning)
    check_named(impl, "dense", "reference")
    if impl == "reference" and is_mapped():
        raise ValueError("impl is 'reference', which torch.vmap cannot map; 'dense' can be")
    plan = Plan(impl, by_document if impl == "native" else decoding, learning)
    _check_computes(x, plan)
    return plan


def most_decoded(heads: int, key_heads: int) -> int:
    """So many queries there may be for reading keys to be the cost, not arithmetic."""
    return _MOST_DECODED * key_heads // heads


def _longest_document(q: Tensor, cu_seqlens: Tensor | None) -> int | None:
    """How many tokens it has, where asking costs nothing: not of a GPU, not while exporting."""
    if cu_seqlens is None or q.device.type != "cpu" or by_torch_alone():
        return None
    return int(cu_seqlens.diff().max())


def _fastest(x: Operands, decoding: bool, by_document: bool, share_on: float | None) -> Impl:
    if x.q.device.type == "cuda":
        if share_on is not None and _torch_is_faster(x, share_on):
            return "dense"
        channels = x.q.shape[3]
        kernel = x.bias is None and channels % 16 == 0 and 32 <= channels <= 256
        kernel = kernel and runs_triton(x.q) and x.q.dtype != torch.float64
        return "triton" if kernel else "gathered"
    if x.q.device.type != "cpu":
        return "dense"
    long = by_document or x.k.shape[1] >= _FEWEST_KEYS
    if _native_computes(x) and (is_ready() if long else is_built()):
        return "native" if long else "dense"
    if decoding:
        return "decode" if x.k.numel() * x.k.element_size() >= _SMALLEST_CACHE else "dense"
    return "gathered" if x.gate.numel() * x.k.shape[1] >= _FEWEST_SCORES else "dense"


def _torch_is_faster(x: Operands, share_on: float) -> bool:
    """On a GPU: so many heads are on that torch's own kernel computes all of them sooner."""
    square = x.q.shape[1] == x.k.shape[1] > 1
    fused = x.mask is None and x.bias is None and (not x.causal or square)
    return fused and share_on > (1 if x.q.shape[3] <= _NARROW else _MOST_ON_A_GPU)


def _native_computes(x: Operands) -> bool:
    """Whether the kernels in C++ compute this, where they are built."""
    channels = x.q.shape[3]
    known = x.q.device.type == "cpu" and x.q.dtype in DTYPES
    even = channels % 2 == 0 and channels <= _MOST_CHANNELS
    return known and even and (x.bias is None or not learns(x.bias))


def _check_computes(x: Operands, plan: Plan) -> None:
    q, bias = x.q, x.bias
    if plan.impl == "native" and not _native_computes(x):
        raise ValueError(
            f"q is {q.dtype} {list(q.shape)} on {q.device}, bias wants a gradient: "
            f'{bias is not None and learns(bias)}; impl "native" takes float32 and bfloat16 with '
            f"an even number of channels up to {_MOST_CHANNELS} on CPUs, and a bias that wants no "
            'gradient; impl "gathered" takes all'
        )
    if plan.impl == "decode" and plan.learning:
        raise ValueError(
            'impl is "decode", which has no backward, and gradients are on; use "gathered" or '
            "torch.no_grad()"
        )
    if plan.impl == "triton":
        if bias is not None:
            raise ValueError(
                f"bias has shape {list(bias.shape)}; impl='triton' takes none, impl='gathered' does"
            )
        from headwise.ops.attention import triton_tiles

        triton_tiles.check_queries(q)


def _check(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Tensor | None, bias: Tensor | None
) -> None:
    sizes = check_operands(
        {
            "q": (q, "B T H C"),
            "k": (k, "B S Hkv C"),
            "v": (v, "B S Hkv C"),
            "gate": (gate, "B T H"),
        }
    )
    check_same_dtype(q=q, k=k, v=v)
    if sizes["Hkv"] == 0 or sizes["H"] % sizes["Hkv"]:
        raise ValueError(
            f"k has shape {list(k.shape)}; its Hkv = {sizes['Hkv']} heads must divide q's "
            f"H = {sizes['H']}"
        )
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; it must be bool (additive ones are `bias`)")
    scores = [sizes[axis] for axis in ("B", "H", "T", "S")]
    added: tuple[tuple[str, Tensor | None, Kind], ...] = (
        ("mask", mask, "torch.bool"),
        ("bias", bias, "floating"),
    )
    for name, tensor, kind in added:
        if tensor is not None:
            check_broadcastable(name, tensor, "B H T S", scores, kind=kind, like=q)


def check_options(
    causal: bool,
    window: int | None,
    scale: float | None,
    dropout: float,
    share_on: float | None,
    impl: Impl,
) -> None:
    """Refuse options of `head_attention` that are out of range."""
    # Checks against annotations would be slower, and every step of a decoding model runs this.
    if causal is not True and causal is not False:
        raise ValueError(f"causal is {causal!r}; it must be True or False")
    if window is not None and not (type(window) is int and window >= 1):
        raise ValueError(f"window is {window!r}; it must be an integer, at least 1")
    if scale is not None and not (_is_number(scale) and abs(scale) < _LARGEST_SCALE):
        raise ValueError(f"scale is {scale!r}; it must be a finite number")
    if not (_is_number(dropout) and 0 <= dropout < 1):
        raise ValueError(f"dropout is {dropout!r}; it must be at least 0 and below 1")
    check_dropout(dropout, impl)
    if share_on is not None and not (_is_number(share_on) and 0 <= share_on <= 1):
        raise ValueError(f"share_on is {share_on!r}; it must lie in 0..1")


def check_dropout(dropout: float, impl: Impl) -> None:
    """Refuse dropout by an implementation that has none."""
    if dropout and impl not in ("auto", "dense"):
        raise ValueError(f"dropout is {dropout}; impl {impl!r} has none, 'auto' and 'dense' have")


def _is_number(x: object) -> bool:
    return isinstance(x, float | int) and not isinstance(x, bool)


def _four_dimensional(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.reshape((1,) * (4 - x.ndim) + x.shape)
