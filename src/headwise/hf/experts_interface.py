"""Experts of converted models through transformers' ExpertsInterface, with ours as "headwise"."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    ExpertsInterface,
    grouped_mm_experts_forward,
)

from headwise.hf.attention import NAME
from headwise.nn.experts import Experts
from headwise.ops.activations import activate


class RoutedExperts(Experts):
    """`Experts` by the implementation that the model's config names.

    "headwise" is `ops.expert_mlp`; "eager" one expert after the other in plain PyTorch;
    "batched_mm", "grouped_mm" and others are transformers' functions, which find here what they ask
    for.

    Attributes:
        config: The model's, in which `model.set_experts_implementation` writes the name.
    """

    has_bias = has_post_expert_norm = is_transposed = False
    is_concatenated = True
    _is_expert_parallel = False
    config: PreTrainedConfig

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """What the chosen experts say of each row, weighted."""
        name = self.config._experts_implementation
        compute = ALL_EXPERTS_FUNCTIONS.get_interface(name, Experts.one_after_the_other)
        y: Tensor = compute(self, hidden_states, top_k_index, top_k_weights)
        return y

    def act_fn(self, raised: Tensor) -> Tensor:
        """The activation, where there is no gate."""
        return activate(raised, self.activation, raised.shape[-1])

    def _apply_gate(self, raised: Tensor) -> Tensor:
        return activate(raised, self.activation, raised.shape[-1] // 2)


def go_through_interface(experts: Experts, config: PreTrainedConfig) -> None:
    """Let experts ask the config who computes them; their parameters stay."""
    experts.__class__ = RoutedExperts
    experts.config = config


def _compute(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Any, top_k_weights: Any
) -> Tensor:
    """Ours; experts that the model had before get transformers' own default."""
    if isinstance(experts, Experts):
        return Experts.forward(experts, hidden_states, top_k_index, top_k_weights)
    y: Tensor = grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    return y


ExpertsInterface.register(NAME, _compute)
