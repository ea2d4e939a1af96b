"""What goes into a comparison and comes out of it: activations, gates, gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Of activations or routings, which a case takes in turn.
INPUTS = 3


def value_and_gradients(
    compute: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    backward: bool = True,
    parameters: Sequence[Tensor] = (),
    upstream: Tensor | None = None,
) -> list[Tensor]:
    """What it gives for the inputs, and with `backward` the gradients of inputs and parameters."""
    inputs = [x.detach().requires_grad_(backward) for x in inputs]
    with torch.set_grad_enabled(backward):
        y = compute(*inputs)
    if not backward:
        return [y]
    dy = torch.ones_like(y) if upstream is None else upstream
    return [y.detach(), *torch.autograd.grad(y, [*inputs, *parameters], dy)]


def random_gates(
    shape: tuple[int, int, int], share: float, device: torch.device, *, skewed: bool = False
) -> list[Tensor]:
    """Some gates [B, T, H] of about 1 for a share of the heads; skewed: the first is mostly on.

    There are several to draw from: a kernel must not win by having seen a shape before.
    """
    heads = shape[-1]
    tilt = torch.linspace(3 if skewed else 0, 0, heads)
    gates = []
    for _ in range(INPUTS):
        noise = -torch.log(-torch.log(torch.rand(shape)))
        best = (noise + tilt).topk(round(share * heads), dim=-1).indices
        gate = torch.zeros(shape).scatter_(2, best, 1.0)
        gates.append((gate * (0.5 + torch.rand_like(gate))).to(device))
    return gates


def random_inputs(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Some inputs to draw from."""
    return [torch.randn(*shape, device=device).to(dtype) for _ in range(INPUTS)]
