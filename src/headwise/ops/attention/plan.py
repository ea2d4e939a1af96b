"""Which implementation a call of `head_attention` gets."""

from typing import Literal, NamedTuple

import torch

from headwise.ops.gradients import learns
from headwise.ops.native import DTYPES, is_built, is_ready
from headwise.ops.plain_attention import Operands

Impl = Literal["auto", "reference", "dense", "gathered", "native", "decode", "triton"]

# Below these, finding out which heads are on costs more than computing all of them: the keys for
# impl "native", all scores for impl "gathered".
_FEWEST_KEYS = 128
_FEWEST_SCORES = 2**20
# Below this size of the keys, impl "decode" waits for Python rather than for memory.
_SMALLEST_CACHE = 8 * 2**20
# Above this many query tokens per key head, arithmetic costs more than reading the cache.
_MOST_DECODED = 16
_MOST_CHANNELS = 1024  # of impl "native"
# On an H100 the kernels are as fast as cuDNN's for all heads of up to 64 channels, and for three in
# four of wider ones (results/gpu.csv).
_NARROW, _MOST_ON_A_GPU = 64, 0.75


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


def choose(x: Operands, *, share_on: float | None = None, impl: Impl = "auto") -> Plan:
    """The plan for a call; impl "auto" stands for the implementation that should be fastest.

    CUDA: triton; dense where the caller says that more heads are on than skipping is worth
    (`_MOST_ON_A_GPU`); gathered where a bias is added or the head width has no kernel. CPU: native
    where it is built and computes these operands; else decode for a few queries without gradients,
    gathered otherwise; dense for short inputs. Where too few heads are off, gathered computes all
    (`gathered.largest_share`). Other devices: dense.
    """
    learning = learns(x.q, x.k, x.v, x.gate)
    _, queries, heads, _ = x.q.shape
    decoding = not learning and queries * heads <= _MOST_DECODED * x.k.shape[2]
    if impl == "auto":
        return Plan(_fastest(x, decoding, share_on), decoding, learning)
    plan = Plan(impl, decoding, learning)
    _check_computes(x, plan)
    return plan


def _fastest(x: Operands, decoding: bool, share_on: float | None) -> Impl:
    if x.q.device.type == "cuda":
        if share_on is not None and _torch_is_faster(x, share_on):
            return "dense"
        channels = x.q.shape[3]
        kernel = x.bias is None and channels % 16 == 0 and 32 <= channels <= 256
        return "triton" if kernel and x.q.dtype != torch.float64 else "gathered"
    if x.q.device.type != "cpu":
        return "dense"
    long = decoding or x.k.shape[1] >= _FEWEST_KEYS
    if _native_computes(x, decoding) and (is_ready() if long else is_built()):
        return "native" if long else "dense"
    if decoding:
        return "decode" if x.k.numel() * x.k.element_size() >= _SMALLEST_CACHE else "dense"
    return "gathered" if x.gate.numel() * x.k.shape[1] >= _FEWEST_SCORES else "dense"


def _torch_is_faster(x: Operands, share_on: float) -> bool:
    """On a GPU: so many heads are on that torch's own kernel computes all of them sooner."""
    square = x.q.shape[1] == x.k.shape[1] > 1
    fused = x.mask is None and x.bias is None and (not x.causal or square)
    return fused and share_on > (1 if x.q.shape[3] <= _NARROW else _MOST_ON_A_GPU)


def _native_computes(x: Operands, decoding: bool) -> bool:
    """Whether the kernels in C++ compute this, where they are built."""
    channels = x.q.shape[3]
    known = x.q.device.type == "cpu" and x.q.dtype in DTYPES
    even = channels % 2 == 0 and channels <= _MOST_CHANNELS
    return known and even and x.bias is None and (x.mask is None or decoding)


def _check_computes(x: Operands, plan: Plan) -> None:
    q, mask, bias = x.q, x.mask, x.bias
    if plan.impl == "native" and not _native_computes(x, plan.decoding):
        raise ValueError(
            f"q is {q.dtype} {list(q.shape)} on {q.device}, mask given: {mask is not None}, bias "
            f'given: {bias is not None}; impl "native" takes float32 and bfloat16 with an even '
            f"number of channels up to {_MOST_CHANNELS} on CPUs, no bias, and a mask only where a "
            'few queries are decoded without gradients; impl "gathered" takes all'
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
        # Triton is on machines with a GPU, and `import headwise` does without.
        from headwise.ops.attention import triton_tiles

        triton_tiles.check_queries(q)
