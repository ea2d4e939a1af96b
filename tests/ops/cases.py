"""Random calls of the ops, and how far from float64 a result may lie."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

LAYOUTS = ("contiguous", "channels apart", "heads first", "every second", "repeated")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides; "repeated": the first entry of the batch for all."""
    if layout == "channels apart":
        return torch.stack([x, -x, x + 1], dim=-1).unbind(-1)[0]
    if layout == "heads first":
        return x.transpose(1, -2).contiguous().transpose(1, -2)
    if layout == "every second":
        return torch.stack([x, -x], dim=1).flatten(0, 1)[::2]
    if layout == "repeated":
        return x[:1].expand(x.shape)
    return x


def leaves(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies that want gradients, with the strides of the originals, or in another dtype."""
    return {
        name: (x if dtype is None else x.to(dtype)).detach().requires_grad_()
        for name, x in tensors.items()
    }


def value_and_gradients(y: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    upstream = torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape).to(y.dtype)
    # The reference of nothing but padding is no function of anything.
    total = (y * upstream).sum() + sum(0 * x.sum() for x in tensors.values())
    gradients = torch.autograd.grad(total, list(tensors.values()))
    return {"y": y.detach(), **dict(zip(tensors, gradients, strict=True))}


def assert_as_near(
    got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], *, largest: float
) -> None:
    """Errors at most twice plain PyTorch's, but for the rounding of scores up to `largest`."""
    # Gates and biases may be wider than what they weigh.
    eps = torch.finfo(got["y"].dtype).eps
    # A gradient may sum over all tokens, and rounds with each term even where they cancel to 0.
    most = max(true.numel() for true in exact.values())
    for name, true in exact.items():
        ours, torch_s = (x[name].double() - true for x in (got, plain))
        size = true.norm() + (true.numel() if name == "y" else most) ** 0.5
        rounding = eps * (4 + largest) * size
        assert got[name].isfinite().all(), name
        assert ours.norm() <= 2 * torch_s.norm() + rounding, name


def assert_at_most_twice(
    got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], floor: Any = 0.0
) -> None:
    """Errors at most twice plain PyTorch's, which may be exact by luck where the truth is 0."""
    for name, true in exact.items():
        error, usual = ((x[name].double() - true).norm() for x in (got, plain))
        assert error <= 2 * usual + floor, name


def plain_attention(leaves: dict[str, Tensor], causal: bool) -> dict[str, Tensor]:
    """PyTorch's attention of all heads, times their gates."""
    q, k, v = (leaves[name].transpose(1, 2) for name in "qkv")
    heads = scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    return value_and_gradients(heads * leaves["gate"].unsqueeze(-1), leaves)


def where_on(found: dict[str, Tensor], gate: Tensor) -> dict[str, Tensor]:
    """Without what PyTorch gives gates that are off, whose gradient is 0 by definition."""
    return found | {"gate": found["gate"][gate != 0]}


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def gates(shape: tuple[int, ...], pattern: str) -> Tensor:
    """Gates of which some are exactly 0; negative ones, too."""
    gate = torch.rand(shape).add(0.1) * torch.where(torch.rand(shape) < 0.2, -1, 1)
    if pattern == "none":
        return torch.zeros(shape)
    if pattern == "one head":
        gate[..., torch.arange(shape[-1]) != shape[-1] // 2] = 0
    elif pattern == "padding":
        gate[:, shape[1] // 2 :] = 0
    elif pattern != "all":
        gate[torch.rand(shape) > {"few": 0.1, "half": 0.5}[pattern]] = 0
    return gate


# Of the tensors of aggregated attention those that have channels.
OVER_CHANNELS = ("q", "k", "v", "k_pool", "v_pool", "unit_q", "learned_tokens")


def map_of(
    size: tuple[int, int],
    window: int,
    pooled: int,
    heads: int,
    channels: int,
    on: float,
    batch: int,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a call of aggregated attention, in the order of its arguments, and its options."""
    tokens = size[0] * size[1]
    shapes = {
        **dict.fromkeys(("q", "k", "v"), (batch, tokens, heads, channels)),
        **dict.fromkeys(("k_pool", "v_pool"), (batch, pooled, heads, channels)),
        "gate": (batch, tokens, heads),
        "local_bias": (heads, window**2),
        "pool_bias": (heads, tokens, pooled),
        "unit_q": (batch, tokens, heads, channels),
        "learned_tokens": (heads, channels, window**2),
        "learned_bias": (heads, window**2),
    }
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    gate = tensors["gate"].abs_().add_(0.1)
    gate[torch.rand(gate.shape) > on] = 0
    return tensors, {"size": size, "window": window}


PATTERNS = st.sampled_from(["half", "half", "few", "all", "none", "one head", "padding"])
SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def scored(draw: st.DrawFn, sizes: dict[str, int], values: Any) -> Tensor:
    """Something broadcastable to [B, H, T, S], with strides of several kinds."""
    shape = [sizes[axis] if draw(st.booleans()) else 1 for axis in "BHTS"]
    x = values(shape)
    how = draw(st.sampled_from(["as it is", "transposed", "expanded", "fewer axes"]))
    if how == "transposed":
        return values(shape[:2] + shape[:1:-1]).transpose(2, 3)
    if how == "expanded":
        return x[..., :1].expand(*shape[:3], sizes["S"])
    if how == "fewer axes" and shape[0] == shape[1] == 1:
        return x[0, 0]
    return x
