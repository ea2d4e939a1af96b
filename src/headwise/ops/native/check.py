"""What the kernels are checked by (`self_check`): run as a program, it imports torch alone."""

import sys

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu


def check(library: str) -> None:
    """Raises RuntimeError where the kernels compute something else than torch does."""
    torch.ops.load_library(library)
    torch.manual_seed(0)
    ops = torch.ops.headwise_native
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        q, k, v = (torch.randn(1, 600, 2, 64, dtype=dtype) for _ in range(3))
        gate, nothing = torch.ones(1, 600, 2), (None, None, None)
        got, lse = ops.attention(q, k, v, gate, True, 0.125, *nothing)
        heads = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
        want = scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        want = want.transpose(1, 2)
        _compare(got, want, tolerance)
        dy = torch.randn_like(want)
        want.backward(dy)
        gradients = ops.attention_backward(dy, q, k, v, gate, got, lse, True, 0.125, *nothing)
        for gradient, head in zip(gradients, heads, strict=False):
            assert head.grad is not None
            _compare(gradient, head.grad.transpose(1, 2), tolerance)
        one = torch.ones(1, 1, 2)
        got = ops.decode_attention(q[:, -1:].contiguous(), k, v, one, True, 0.125, *nothing, None)
        _compare(got, want[:, -1:], tolerance)
        _compare(*_aggregated(q, k, v), tolerance)
        sizes = (200, 64), (1, 96, 64), (1, 64, 48)
        x, up, down = (torch.randn(*size, dtype=dtype) / 8 for size in sizes)
        weights, indices = torch.ones(200, 1), torch.zeros(200, 1, dtype=torch.long)
        raised, value = linear(x, up[0]).chunk(2, dim=-1)
        got = ops.expert_mlp(x, weights, indices, up, down, False)
        _compare(got, linear(silu(raised) * value, down[0]), tolerance)


def _aggregated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A window over a whole map of 5×5, and seven pooled keys: attention over 32 keys."""
    query, key, value = (x[:, :32].transpose(1, 2) for x in (q, k, v))
    want = scaled_dot_product_attention(query[:, :, :25], key, value, scale=0.125)
    got = torch.ops.headwise_native.aggregated_attention(
        q[:, :25] * 0.125, k[:, :25], v[:, :25], k[:, 25:32], v[:, 25:32], torch.ones(1, 25, 2),
        torch.zeros(2, 81), torch.zeros(2, 25, 7), q[:, :25], torch.zeros(2, 64, 81, dtype=q.dtype),
        torch.zeros(2, 81), 5, 5, 9,
    )  # fmt: skip
    return got, want.transpose(1, 2)


def _compare(got: Tensor, want: Tensor, tolerance: float) -> None:
    if not torch.allclose(got, want, rtol=tolerance, atol=tolerance):
        raise RuntimeError(f"the kernels are wrong on this processor in {want.dtype}")


if __name__ == "__main__":
    check(sys.argv[1])
