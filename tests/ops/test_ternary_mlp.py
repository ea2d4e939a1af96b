"""A mixture of ternary experts: by hand, equal to a loop with gradients, rows independent."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from headwise.ops.activations import activate
from headwise.ops.ternary_mlp import quantize_experts, ternary_mlp

N, D, HIDDEN, E, K = 13, 5, 7, 11, 3


def experts(x, weights, up_proj, down_proj, indices, activation="silu"):
    matrices = quantize_experts(up_proj, down_proj)
    return ternary_mlp(x, weights, indices, *matrices, activation=activation)


def through(x, value):
    return x + (value - x).detach()


def eight_bits(x):
    x = x / (x.square().mean() + 1e-6).sqrt()
    unit = x.abs().max().clamp(min=1e-5) / 127
    return through(x, (x / unit).round() * unit)


def ternary(w):
    unit = w.abs().mean()
    return through(w, (w / unit).clamp(-1, 1).round() * unit)


def reference(x, weights, up_proj, down_proj, indices, activation="silu"):
    """The equation, a token and a choice at a time, with quantised values as plain numbers."""
    parts = up_proj.shape[1] // HIDDEN
    rows = []
    for token, token_weights, chosen in zip(x, weights, indices.tolist(), strict=True):
        y = torch.zeros_like(token)
        for weight, e in zip(token_weights, chosen, strict=True):
            if e >= 0:
                up = torch.cat([ternary(w) for w in up_proj[e].chunk(parts)])
                hidden = activate(up @ eight_bits(token), activation, HIDDEN)
                y = y + weight * (ternary(down_proj[e]) @ eight_bits(hidden))
        rows.append(y)
    return torch.stack(rows)


def leaves(gated=True, dtype=torch.float64):
    shapes = (N, D), (N, K), (E, 2 * HIDDEN if gated else HIDDEN, D), (E, D, HIDDEN)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def some_padding():
    indices = torch.randint(E, (N, K))
    indices[torch.rand(N, K) > 0.6] = -1
    indices[4] = -1
    return indices


ROUTINGS = {
    "spread": lambda: torch.randint(E, (N, K)),
    "empty experts": lambda: torch.randint(E, (N, K)) // 4 * 4,
    "same expert thrice": lambda: torch.full((N, K), 10),
    "padding": some_padding,
    "nothing": lambda: torch.full((N, K), -1),
}


def test_by_hand():
    # Every number above 0 is normed to 1: 1/2 · 3 · 1; below 0, relu gives 0.
    x, half = torch.tensor([[4.0], [0.1], [-1.0]]), torch.full((3, 1), 0.5)
    up, down = torch.tensor([[[2.0]]]), torch.tensor([[[3.0]]])
    y = experts(x, half, up, down, torch.zeros(3, 1, dtype=torch.long), "relu")
    assert_close(y, torch.tensor([[1.5], [1.5], [0.0]]), rtol=1e-4, atol=0)


def test_gate_and_up_matrix_have_their_own_scales():
    up = torch.cat([torch.full((1, HIDDEN, D), 2.0), torch.full((1, HIDDEN, D), -6.0)], dim=1)
    up, down = quantize_experts(up, torch.ones(1, D, HIDDEN))
    assert up.scale.tolist() == [[2, 6]]
    assert (up.levels == torch.tensor([1, -1]).view(2, 1, 1)).all()
    assert down.scale.tolist() == [1]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_it_is_the_loop_in_values_and_all_gradients(routing, gated):
    tensors, indices = leaves(gated), ROUTINGS[routing]()
    upstream = torch.randn(N, D, dtype=torch.float64)
    results = []
    for compute in (experts, reference):
        y = compute(*tensors, indices) + 0 * sum(t.sum() for t in tensors)
        results.append((y, torch.autograd.grad(y, tensors, upstream)))
    assert_close(*results, rtol=1e-9, atol=1e-9)
    assert (results[0][0][(indices == -1).all(-1)] == 0).all()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_it_is_the_loop_in_every_activation(activation):
    tensors, indices = leaves(), some_padding()
    got, want = (f(*tensors, indices, activation) for f in (experts, reference))
    assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_a_row_does_not_depend_on_the_others():
    (x, weights, up, down), indices = leaves(), some_padding()
    y = experts(x, weights, up, down, indices)
    assert_close(experts(x[:6], weights[:6], up, down, indices[:6]), y[:6])
    others = torch.cat([x[:6], 100 * x[6:]])
    assert_close(experts(others, weights, up, down, indices)[:6], y[:6])


def test_no_rows_at_all():
    x, weights, up, down = leaves()
    none = torch.zeros(0, K, dtype=torch.long)
    assert experts(x[:0], weights[:0], up, down, none).shape == (0, D)


def test_the_dtype_is_that_of_x_or_of_autocast():
    tensors, indices = leaves(dtype=torch.float32), some_padding()
    want = experts(*tensors, indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = experts(*tensors, indices)
    half = experts(*(t.bfloat16() for t in tensors), indices)
    assert mixed.dtype == half.dtype == torch.bfloat16
    assert_close(mixed.float(), want, rtol=0, atol=0.03 * want.abs().max().item())


def test_flops_count_the_choices_that_go_somewhere():
    tensors, indices = leaves(), some_padding()
    with FlopCounterMode(display=False) as counter:
        experts(*tensors, indices)
    assert counter.get_total_flops() == (indices >= 0).sum() * 2 * 3 * D * HIDDEN
