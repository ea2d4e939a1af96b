"""BitNet's layers: ternary while they train, or packed in 2 bits for inference.

A ternary layer keeps the parameters of the layer that it replaces, and makes them ternary in every
forward. A packed layer keeps the result alone: uint8 under the same names, and the scales. Both
give the same outputs bit for bit.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.nn.buffers import KeepsBuffers
from headwise.nn.experts import Experts, StackedExperts
from headwise.ops.activations import Activation
from headwise.ops.experts import Impl
from headwise.ops.ternary import Quantized, pack, quantize_weight, ternary_linear, unpack
from headwise.ops.ternary_mlp import quantize_experts, ternary_mlp


class BitLinear(nn.Linear):
    """nn.Linear with ternary weights and inputs of 8 bits, normed without parameters before.

        y = quantize(norm(x)) · ternary(W)ᵀ + b,   backward as if both were exact

    **Source**: BitNet b1.58, arXiv 2402.17764; `ops.ternary` has the formulas.
    """

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch O"]:
        """y of x."""
        return ternary_linear(x, quantize_weight(self.weight), self.bias)


class PackedLinear(KeepsBuffers):
    """A BitLinear for inference: weight uint8 [O, D / 4], rounded up, and scale; bias as it was.

    Raises:
        ValueError: In a forward in training mode.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: BitLinear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        levels, scale = quantize_weight(linear.weight.detach())
        self.register_buffer("weight", pack(levels))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    @property
    def num_weights(self) -> int:
        """Ternary values, four of which are a byte."""
        return self.in_features * self.out_features

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch O"]:
        """y of x, as of the BitLinear."""
        _refuse_training(self)
        levels = unpack(self.weight, self.in_features, dtype=x.dtype)
        return ternary_linear(x, Quantized(levels, self.scale), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class _TernaryMix(nn.Module):
    """What `Experts` computes, with ternary matrices and activations of 8 bits."""

    matrices: Any
    activation: Activation
    impl: Impl

    def forward(
        self,
        hidden_states: Float[Tensor, "*batch D"],
        top_k_index: Int[Tensor, "N K"] | None = None,
        top_k_weights: Float[Tensor, "N K"] | None = None,
    ) -> Float[Tensor, "*batch D"]:
        """`ops.ternary_mlp` by its own matrices; without choices expert 0, for every row."""
        if self.impl != "auto":
            raise ValueError(
                f"impl is {self.impl!r}; ternary experts have one, so it must be 'auto'"
            )
        x = hidden_states.flatten(end_dim=-2)
        if top_k_index is None or top_k_weights is None:
            top_k_weights = x.new_ones(x.shape[0], 1)
            top_k_index = torch.zeros_like(top_k_weights, dtype=torch.long)
        matrices = self.matrices(x.dtype)
        y = ternary_mlp(x, top_k_weights, top_k_index, *matrices, activation=self.activation)
        return y.view(hidden_states.shape)


class TernaryExperts(_TernaryMix, Experts):
    """`Experts` whose matrices are made ternary whenever they are read: for training."""

    def matrices(self, dtype: torch.dtype) -> tuple[Quantized, Quantized]:
        """Both of them, ternary; they have the model's dtype."""
        return quantize_experts(self.first_proj, self.down_proj)


class PackedExperts(_TernaryMix, StackedExperts, KeepsBuffers):
    """TernaryExperts for inference; raises ValueError in a forward in training mode.

    gate_up_proj or up_proj uint8 [E, U, D / 4] with up_scale [E, 2] (gate first) or [E, 1],
    down_proj uint8 [E, D, F / 4] with down_scale [E].
    """

    up_scale: Tensor
    down_scale: Tensor

    def __init__(self, experts: TernaryExperts):
        super().__init__()
        self.num_experts, self.dim, self.hidden_dim = experts.down_proj.shape
        self.has_gate, self.activation = experts.has_gate, experts.activation
        self.impl = experts.impl
        up, down = quantize_experts(experts.first_proj.detach(), experts.down_proj.detach())
        self.register_buffer(self.first_name, pack(up.levels.flatten(1, 2)))
        self.register_buffer("up_scale", up.scale)
        self.register_buffer("down_proj", pack(down.levels))
        self.register_buffer("down_scale", down.scale)

    @property
    def num_weights(self) -> int:
        """Ternary values, four of which are a byte."""
        matrices = 3 if self.has_gate else 2
        return self.num_experts * matrices * self.dim * self.hidden_dim

    def matrices(self, dtype: torch.dtype) -> tuple[Quantized, Quantized]:
        """As `quantize_experts` gave them."""
        _refuse_training(self)
        up = unpack(self.first_proj, self.dim, dtype=dtype).unflatten(1, (-1, self.hidden_dim))
        down = unpack(self.down_proj, self.hidden_dim, dtype=dtype)
        return Quantized(up, self.up_scale), Quantized(down, self.down_scale)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, "
            f"glu={self.has_gate}, activation={self.activation}"
        )


def _refuse_training(module: nn.Module) -> None:
    if module.training:
        raise ValueError(
            f"{type(module).__name__} is in training mode; packed weights cannot learn: call "
            "eval(), or train the model that was packed"
        )
