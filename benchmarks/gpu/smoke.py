"""Each Triton kernel of attention once, small, on a GPU, against float64; it survives errors."""

import sys
import traceback
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from headwise.ops import head_attention

LARGEST_ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Tokens, and keys that each of them sees.
CASES = {
    "forward and backward": (300, None),
    "forward and backward in a window": (300, 100),
    "one token": (1, None),
    "one token in a window": (1, 100),
}


def main() -> int:
    """Prints a line a case; returns how many failed."""
    cases = product(CASES, LARGEST_ERROR, (64, 128, 48, 256))
    return sum(not passes(*case) for case in cases)


def passes(case: str, dtype: torch.dtype, channels: int) -> bool:
    """Whether the kernels compile, run and are right."""
    name = f"{case}, {str(dtype).removeprefix('torch.')}, {channels} channels"
    torch.manual_seed(0)
    tokens, window = CASES[case]
    q = torch.randn(2, tokens, 4, channels, device="cuda").to(dtype)
    k, v = (torch.randn(2, 1000, 2, channels, device="cuda").to(dtype) for _ in range(2))
    gate = torch.rand(2, tokens, 4, device="cuda") + 0.5
    gate[..., ::2] *= torch.rand(2, tokens, 2, device="cuda") < 0.5
    try:
        got = compute((q, k, v, gate), window, "triton")
        exact = compute([x.double() for x in (q, k, v, gate)], window, "dense")
    except Exception:
        print(f"FAILED {name}\n{traceback.format_exc(limit=-3)}", flush=True)
        return False
    pairs = zip(got, exact, strict=True)
    error = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
    right = error <= LARGEST_ERROR[dtype]
    print(f"{'ok' if right else 'WRONG'}: {name}, error {error:.1e}", flush=True)
    return right


def compute(inputs: Sequence[Tensor], window: int | None, impl: Any) -> list[Tensor]:
    """Causal attention; of more than one token with all gradients."""
    learns = inputs[0].shape[1] > 1
    leaves = [x.detach().requires_grad_(learns) for x in inputs]
    q, k, v, gate = leaves
    y = head_attention(q, k, v, gate, causal=True, window=window, impl=impl)
    if not learns:
        return [y]
    upstream = torch.linspace(-1, 1, y.numel(), device="cuda").reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("not tried: no CUDA device")
    sys.exit(main())
