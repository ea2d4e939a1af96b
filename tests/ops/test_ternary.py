"""Ternary weights, 8-bit activations: by hand, straight through, packed, as transformers'."""

import warnings

import pytest
import torch
from torch.testing import assert_close

from headwise.ops.ternary import (
    Quantized,
    pack,
    quantize_activations,
    quantize_weight,
    rms_norm,
    ternary_linear,
    unpack,
)


def test_a_weight_by_hand():
    levels, scale = quantize_weight(torch.tensor([[4.0, -1.0], [0.0, 3.0]]))
    assert (levels.tolist(), scale.item()) == ([[1, 0], [0, 1]], 2)


def test_stacked_matrices_have_a_scale_each():
    weight = torch.randn(3, 5, 7)
    levels, scale = quantize_weight(weight)
    assert scale.shape == (3,)
    for e in range(3):
        assert all(map(torch.equal, quantize_weight(weight[e]), (levels[e], scale[e])))


def test_activations_by_hand():
    x = torch.tensor([[254.0, -3.0, 100.0], [0.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    levels, scale = quantize_activations(x)
    assert levels.tolist() == [[127, -2, 50], [0, 0, 0], [0, -127, 0]]
    assert_close(scale, torch.tensor([[2.0], [1e-5 / 127], [1 / 127]]))


def test_the_norm_by_hand():
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    assert_close(rms_norm(x), torch.tensor([[0.848528, -1.131371], [0, 0]]), rtol=1e-6, atol=0)


def test_a_linear_map_by_hand():
    weight = Quantized(torch.tensor([[1.0, 0.0], [1.0, -1.0]]), torch.tensor(2.0))
    y = ternary_linear(torch.tensor([3.0, -3.0]), weight, torch.tensor([0.5, 0.0]))
    assert_close(y, torch.tensor([2.5, 4.0]), rtol=1e-6, atol=0)


def test_packing_by_hand():
    levels = torch.tensor([[-1.0, 0.0, 1.0, 1.0, -1.0]])
    packed = pack(levels)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[164, 84]]
    assert unpack(packed, 5, dtype=torch.float32).tolist() == levels.tolist()


@pytest.mark.parametrize("size", [1, 4, 7, 8, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_packed_comes_back(size, dtype):
    levels = torch.randint(-1, 2, (3, 5, size)).to(dtype)
    packed = pack(levels)
    assert packed.shape == (3, 5, (size + 3) // 4)
    assert torch.equal(unpack(packed, size, dtype=dtype), levels)


@pytest.mark.parametrize("value", [2.0, 0.5, float("nan")])
def test_what_is_not_ternary_is_not_packed(value):
    with pytest.raises(ValueError, match="beside -1, 0 and 1"):
        pack(torch.tensor([0.0, 1.0, value]))


@pytest.mark.parametrize("scale", [1.0, 1e8, 1e-8])
def test_levels_stay_whole_and_gradients_pass_straight_through(scale):
    for quantize, shape, bound in (
        (quantize_weight, (5, 7), 1),
        (quantize_activations, (5, 7), 127),
    ):
        x = (scale * torch.randn(shape)).requires_grad_()
        levels, unit = quantize(x)
        assert torch.equal(levels, levels.round())
        assert levels.abs().max() <= bound
        assert torch.equal(levels, quantize(x.detach()).levels)
        upstream = torch.randn(shape)
        (gradient,) = torch.autograd.grad(levels * unit, x, upstream)
        assert_close(gradient, upstream)


def test_a_weight_of_zeros_gives_zero_and_learns():
    weight = torch.zeros(3, 5, requires_grad=True)
    y = ternary_linear(torch.randn(7, 5), quantize_weight(weight))
    assert (y == 0).all()
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert (gradient != 0).all()


def test_an_input_of_zeros_gives_the_bias_and_a_finite_gradient():
    x, bias = torch.zeros(2, 5, requires_grad=True), torch.randn(3)
    y = ternary_linear(x, quantize_weight(torch.randn(3, 5)), bias)
    assert torch.equal(y, bias.expand(2, 3))
    y.sum().backward()
    assert x.grad.isfinite().all()


def ours(x, weight, bias):
    return ternary_linear(x, quantize_weight(weight), bias)


def transformers_s(x, weight, bias):
    """Its weights and activations are multiplied by their scales first, and rounded once more."""
    with warnings.catch_warnings():
        # Of torch's own, when transformers compiles what it imports.
        warnings.simplefilter("ignore", DeprecationWarning)
        from transformers.integrations.bitnet import AutoBitLinear
    linear = AutoBitLinear(13, 11, online_quant=True, use_rms_norm=True).to(x.dtype)
    with torch.compiler.set_stance("force_eager"):
        return torch.func.functional_call(linear, {"weight": weight, "bias": bias}, x)


def arguments(dtype=torch.float32):
    shapes = (17, 13), (11, 13), (11,)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def test_it_is_transformers_s_in_values_and_gradients():
    leaves, upstream = arguments(), torch.randn(17, 11)
    results = []
    for linear in (ours, transformers_s):
        y = linear(*leaves)
        results.append((y, torch.autograd.grad(y, leaves, upstream)))
    assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_at_most_twice_that_of_transformers_s(dtype):
    leaves = [leaf.detach() for leaf in arguments(dtype)]
    exact = ours(*(leaf.double() for leaf in leaves))
    errors = [(linear(*leaves).double() - exact).norm() for linear in (ours, transformers_s)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bit_for_bit_whatever_stands_beside_it(dtype):
    x, weight, _ = (leaf.detach() for leaf in arguments(dtype))
    y = ours(x, weight, None)
    for rows in (slice(1), slice(3, 16)):
        mates = 100 * torch.randn(5, 13, dtype=dtype)
        assert torch.equal(ours(torch.cat([x[rows], mates]), weight, None)[:-5], y[rows])


def test_half_precision_is_refused():
    x, weight, _ = (leaf.detach() for leaf in arguments(torch.float16))
    with pytest.raises(ValueError, match=r"torch\.float16; ternary layers take bfloat16"):
        ours(x, weight, None)
