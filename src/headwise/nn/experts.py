"""The stacked matrices of many two-layer MLPs, in the form that transformers' mixtures have."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from headwise.ops import expert_mlp
from headwise.ops.activations import Activation, activate
from headwise.ops.experts import Impl
from headwise.ops.fields import Count, checked
from headwise.ops.linear import linear


class StackedExperts(nn.Module):
    """Base of experts, packed or not: which names their matrices have.

    Gated ones have gate_up_proj [E, 2F, D], gate rows first, and others up_proj [E, F, D]; all have
    down_proj [E, D, F].
    """

    has_gate: bool
    gate_up_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor

    @property
    def first_name(self) -> str:
        """Of the matrices that read."""
        return "gate_up_proj" if self.has_gate else "up_proj"

    @property
    def first_proj(self) -> Tensor:
        """The matrices that read, whatever their name."""
        return self.gate_up_proj if self.has_gate else self.up_proj

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Gated matrices were called up_proj, too, when the first models were saved.
        if self.has_gate and (former := f"{prefix}up_proj") in state_dict:
            state_dict[f"{prefix}gate_up_proj"] = state_dict.pop(former)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Experts(StackedExperts):
    """The stacked matrices of E two-layer MLPs, and what these say of rows.

    Names, shapes and forward are those of transformers' mixtures, so that what adapts, quantises or
    exports these knows them: gate_up_proj [E, 2F, D] with the gate rows first (glu) or up_proj
    [E, F, D], and down_proj [E, D, F].
    """

    @checked
    def __init__(
        self,
        num_experts: Count,
        dim: Count,
        hidden_dim: Count,
        *,
        glu: bool,
        activation: Activation,
        impl: Impl = "auto",
    ):
        super().__init__()
        self.num_experts, self.has_gate = num_experts, glu
        self.activation, self.impl = activation, impl
        up_dim = 2 * hidden_dim if glu else hidden_dim
        first = nn.Parameter(torch.empty(num_experts, up_dim, dim))
        self.register_parameter(self.first_name, first)
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        for weight in (first, self.down_proj):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(
        self,
        hidden_states: Float[Tensor, "*batch D"],
        top_k_index: Int[Tensor, "N K"] | None = None,
        top_k_weights: Float[Tensor, "N K"] | None = None,
    ) -> Float[Tensor, "*batch D"]:
        """`ops.expert_mlp` by its own matrices; without choices expert 0, for every row."""
        up, down = self.first_proj, self.down_proj
        if top_k_index is None or top_k_weights is None:
            return self._expert(0, hidden_states)
        if is_traceable_wrapper_subclass(up) or is_traceable_wrapper_subclass(down):
            # Quantised; such a tensor knows linear maps, and no operator of ours.
            return self.one_after_the_other(hidden_states, top_k_index, top_k_weights)
        return expert_mlp(
            hidden_states,
            top_k_weights,
            top_k_index,
            up,
            down,
            activation=self.activation,
            impl=self.impl,
        )

    def one_after_the_other(
        self,
        hidden_states: Float[Tensor, "N D"],
        top_k_index: Int[Tensor, "N K"],
        top_k_weights: Float[Tensor, "N K"],
    ) -> Float[Tensor, "N D"]:
        """The same in operators of torch alone, each expert over its rows."""
        y = torch.zeros_like(hidden_states)
        index = top_k_index.masked_fill(top_k_weights == 0, -1)
        for expert in index.unique().tolist():
            if expert >= 0:
                rows, place = torch.where(index == expert)
                out = self._expert(expert, hidden_states[rows]) * top_k_weights[rows, place, None]
                y = y.index_add(0, rows, out.to(y.dtype))
        return y

    def _expert(self, expert: int, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        raised = linear(x, self.first_proj[expert])
        hidden_dim = self.down_proj.shape[2]
        return linear(activate(raised, self.activation, hidden_dim), self.down_proj[expert])

    def extra_repr(self) -> str:
        num_experts, dim, hidden = self.down_proj.shape
        sizes = f"num_experts={num_experts}, dim={dim}, hidden_dim={hidden}, glu={self.has_gate}"
        return f"{sizes}, activation={self.activation}, impl={self.impl}"
