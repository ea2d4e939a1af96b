"""Aggregated attention with heads gated per token: signature, checks, choice of implementation.

reference   The equation with loops: the specification.
dense       Every head in plain PyTorch, then the gate: skips nothing.
native      Only heads that are on, fused in C++, for CPUs, once `headwise compile` has built it.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from headwise.ops.aggregated import dense, reference
from headwise.ops.aggregated.operands import Operands
from headwise.ops.choice import check_choice
from headwise.ops.fields import Count, check
from headwise.ops.gradients import by_torch_alone, check_named
from headwise.ops.native import DTYPES, is_ready
from headwise.ops.native.aggregated import native_aggregated_attention
from headwise.ops.tensors import check_operands, check_same_dtype

Impl = Literal["auto", "reference", "dense", "native"]


def aggregated_attention(
    q: Float[Tensor, "B T H C"],
    k: Float[Tensor, "B T H C"],
    v: Float[Tensor, "B T H C"],
    k_pool: Float[Tensor, "B P H C"],
    v_pool: Float[Tensor, "B P H C"],
    gate: Float[Tensor, "B T H"],
    *,
    size: tuple[int, int],
    window: int,
    local_bias: Float[Tensor, "H near"],
    pool_bias: Float[Tensor, "H T P"],
    unit_q: Float[Tensor, "B T H C"],
    learned_tokens: Float[Tensor, "H C near"],
    learned_bias: Float[Tensor, "H near"],
    impl: Impl = "auto",
) -> Float[Tensor, "B T H C"]:
    """Each token of a map looks at the window around it closely and at all of it pooled.

        s[w]   = q[b,t,h]·k[b,t+w,h] + local_bias[h,w]        w: positions of the window in the map
        s[p]   = q[b,t,h]·k_pool[b,p,h] + pool_bias[h,t,p]
        a      = softmax of all s[w] and s[p] together
        l[w]   = unit_q[b,t,h]·learned_tokens[h,:,w] + learned_bias[h,w]
        y[b,t,h] = gate[b,t,h] · (sum_w (a[w] + l[w]) v[b,t+w,h] + sum_p a[p] v_pool[b,p,h])

    Positions outside the map have no part in either sum. A gate of exactly 0 means off: the pair
    (t, h) gives 0 and passes no gradient, to its gate neither.

    **Source**: TransNeXt, arXiv 2311.17132, section 3 (aggregated attention, learnable tokens),
    with the gates of MoH, arXiv 2410.11842, Eq. 4.
    **Deviates**: temperature, query embedding and the logarithm of the length, which the paper
    writes into the scores, come with q. The gradient of a gate that is off is 0 by definition,
    so that an implementation may skip the head.

    Args:
        q: Queries, scaled already.
        k: Keys of the map, row by row.
        v: Values of the map.
        k_pool: Keys of the pooled map; P may be 0.
        v_pool: Values of the pooled map.
        gate: Weight of each head for each token, in any float dtype.
        size: Height and width of the map; their product is T.
        window: Side of the window, odd; positions are counted row by row, the token in the middle.
        local_bias: Added to the scores of the window's positions, w² of them.
        pool_bias: Added to the scores of the pooled keys.
        unit_q: Queries without scale, for the learned weights.
        learned_tokens: Learned keys of the positions: weights that no softmax sees.
        learned_bias: Learned weights of the positions.
        impl: "auto" chooses by device and shape (`choose`); a named one is that one or an error.

    Returns:
        The gated heads in q's dtype.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, window is even, impl is unknown, or
            impl cannot compute this.

    Example (worked by hand): a map of 1×2 with values 2 and 4, one pooled value 9, window 3, all
    scores and learned weights 0, gate 1/2: both tokens give 1/2 · (2 + 4 + 9) / 3 = 2.5.
    """
    check_choice("impl", impl, Impl)
    operands = {
        "q": (q, "B T H C"), "k": (k, "B T H C"), "v": (v, "B T H C"),
        "unit_q": (unit_q, "B T H C"),
        "k_pool": (k_pool, "B P H C"), "v_pool": (v_pool, "B P H C"), "gate": (gate, "B T H"),
        "local_bias": (local_bias, "H w²"), "pool_bias": (pool_bias, "H T P"),
        "learned_tokens": (learned_tokens, "H C w²"), "learned_bias": (learned_bias, "H w²"),
    }  # fmt: skip
    check("size", tuple(size) if isinstance(size, list) else size, tuple[Count, Count])
    check("window", window, Count)
    if window % 2 == 0:
        raise ValueError(f"window is {window}; it must be odd")
    sizes = check_operands(operands, sizes={"w²": window**2})
    check_same_dtype(q=q, k=k, v=v, k_pool=k_pool, v_pool=v_pool, unit_q=unit_q)
    if size[0] * size[1] != sizes["T"]:
        raise ValueError(
            f"size is {size}; it must be height and width of the map, whose product is "
            f"T = {sizes['T']}"
        )
    if q.numel() == 0:
        return q.clone()
    x = Operands(
        q, k, v, k_pool, v_pool, gate, local_bias, pool_bias, unit_q, learned_tokens, learned_bias,
        (size[0], size[1]), window,
    )  # fmt: skip
    impl = choose(q, impl)
    if impl == "native":
        return _native(x)
    return (dense if impl == "dense" else reference).aggregated_attention(x)


def choose(q: Tensor, impl: Impl = "auto") -> Impl:
    """The named implementation; for "auto" native where it is built for q, else dense.

    For torch.export, `torch.func` and forward gradients it is dense, too.
    """
    native_computes = q.device.type == "cpu" and q.dtype in DTYPES and q.shape[3] % 2 == 0
    if impl == "auto":
        return "native" if native_computes and not by_torch_alone() and is_ready() else "dense"
    check_named(impl, "dense", "reference")
    if impl == "native" and not native_computes:
        raise ValueError(
            f'q is {q.dtype} {list(q.shape)} on {q.device}; impl "native" takes float32 and '
            'bfloat16 with an even number of channels on CPUs; impl "dense" takes all'
        )
    return impl


def _native(x: Operands) -> Tensor:
    return native_aggregated_attention(
        x.q, x.k, x.v, x.k_pool, x.v_pool, x.gate.float(), x.local_bias.float(),
        x.pool_bias.float(), x.unit_q, x.learned_tokens.to(x.q.dtype), x.learned_bias.float(),
        *x.size, x.window,
    )  # fmt: skip
