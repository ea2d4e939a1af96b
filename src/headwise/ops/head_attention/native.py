"""Fused kernels for CPUs in C++ (native_kernels/), built once by `headwise compile`.

They do what torch's own CPU kernels do, on gathered rows, and in the backward with bfloat16
products. Without a compiler nothing is lost but speed: "auto" then gathers in plain PyTorch.
"""

import hashlib
import os
import platform
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.gradients import learns
from headwise.ops.head_attention import whole
from headwise.ops.head_attention.gathered import attention_flops, share_on

DTYPES = (torch.float32, torch.bfloat16)
_MOST_CHANNELS = 1024
_SOURCES = files("headwise.ops.head_attention").joinpath("native_kernels")
_FLAGS = [
    "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fno-math-errno",
    "-fno-trapping-math",
]  # fmt: skip
# From this share of heads on, a forward in bfloat16 is faster by torch's own kernel.
_LARGEST_SHARE = 0.85


def head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    if not takes(q, mask, bias):
        raise ValueError(
            f"q is {q.dtype} with {q.shape[-1]} channels on {q.device}, mask or bias given: "
            f'{mask is not None or bias is not None}; impl "native" takes float32 and bfloat16 '
            f"with an even number of channels up to {_MOST_CHANNELS} on CPUs, without mask and "
            'bias; impl "gathered" takes all'
        )
    if not is_built():
        raise ValueError('impl is "native", which is not built; run `headwise compile` once')
    _load()
    never = 2.0
    limit = never if learns(q, k, v, gate) or q.dtype == torch.float32 else _LARGEST_SHARE
    return native_attention(q, k, v, gate.float(), causal, scale, limit)[0]


def takes(q: Tensor, mask: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the kernels compute this."""
    channels = q.shape[-1] % 2 == 0 and q.shape[-1] <= _MOST_CHANNELS
    return (
        q.device.type == "cpu" and q.dtype in DTYPES and channels and mask is None and bias is None
    )


def library() -> Path:
    """Where the kernels for this source, torch and processor are, or would be."""
    info = Path("/proc/cpuinfo")
    flags = (
        [x for x in info.read_text().splitlines() if x.startswith("flags")] if info.exists() else []
    )
    about = (*_sources().values(), torch.__version__, platform.machine(), *_FLAGS, *flags[:1])
    name = hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "headwise" / f"native-{name}.so"


@cache
def is_built() -> bool:
    """Whether `build` was run, for this source, torch and processor."""
    return library().exists()


def build() -> Path:
    """Compile the kernels for this machine, check them, keep them; returns where.

    Raises:
        RuntimeError: If compiler or ninja are missing, or the result is wrong here.
    """
    from torch.utils.cpp_extension import load

    target = library()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        for file, text in _sources().items():
            (Path(directory) / file).write_text(text)
        name = "headwise_native_build"
        # Linked without -fopenmp: threads must be those of torch, not a second pool beside them.
        load(
            name, [f"{directory}/attention.cpp"], extra_cflags=_FLAGS, is_python_module=False,
            build_directory=directory,
        )  # fmt: skip
        _check()
        os.replace(Path(directory) / f"{name}.so", target)
    is_built.cache_clear()
    return target


def _sources() -> dict[str, str]:
    names = sorted(file.name for file in _SOURCES.iterdir())
    return {name: _SOURCES.joinpath(name).read_text() for name in names}


def _load() -> None:
    if not hasattr(torch.ops.headwise_native, "attention"):
        torch.ops.load_library(library())


def _check() -> None:
    """Refuse kernels that compute something else than plain attention does."""
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        q, k, v = (torch.randn(1, 600, 2, 64, dtype=dtype) for _ in range(3))
        gate = torch.ones(1, 600, 2)
        got, _ = torch.ops.headwise_native.attention(q, k, v, gate, True, 0.125)
        want, _ = whole.forward(q, k, v, gate, True, None, None, 0.125)
        if not torch.allclose(got, want, rtol=tolerance, atol=tolerance):
            raise RuntimeError(f"the kernels are wrong on this processor in {dtype}")


@torch.library.custom_op("headwise::native_attention", mutates_args=())
def native_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, causal: bool, scale: float, limit: float
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, C], and log2 of the sum of the scores' exponentials [B, T, H] in float64.

    From `limit`, a share of heads, on all are computed by torch; that is without a backward.
    """
    if limit <= 1 and share_on(gate) >= limit:
        y, lse = whole.forward(q, k, v, gate, causal, None, None, scale)
        return y, lse.double()
    return torch.ops.headwise_native.attention(
        q.contiguous(), _adjacent(k), _adjacent(v), gate.contiguous(), causal, scale
    )


@torch.library.custom_op("headwise::native_attention_backward", mutates_args=())
def native_attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    y: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and gate."""
    return torch.ops.headwise_native.attention_backward(
        dy.contiguous(), q.contiguous(), _adjacent(k), _adjacent(v), gate.contiguous(), y, lse,
        causal, scale,
    )  # fmt: skip


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@native_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), gate.new_empty(gate.shape, dtype=torch.float64)


@native_attention_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *_: Any) -> Any:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, gate))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, gate, ctx.causal, ctx.scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, gate, *output)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = native_attention_backward(dy, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *gradients, None, None, None


native_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.headwise.native_attention, get_raw=True)
def _flops(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, causal: bool, *_: Any, **__: Any) -> int:
    return attention_flops(q, k, gate != 0, causal)


@register_flop_formula(torch.ops.headwise.native_attention_backward, get_raw=True)
def _backward_flops(dy: Tensor, *args: Any, **_: Any) -> int:
    q, k, _v, gate, _y, _lse, causal, *_rest = args
    return attention_flops(q, k, gate != 0, causal) * 5 // 2
