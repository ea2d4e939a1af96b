"""Linear maps into heads and out of them that leave out heads that are off, without gradients.

Each is an nn.Linear with the same parameters, and can take the place of one by its class alone. An
output projection sees which heads are off: they are 0. A query projection is told by the tokens:
`with_gates` gives them their gates for the way.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.nn.budget import HeadBudget
from headwise.ops.head_projection import skips_faster
from headwise.ops.native.projection import native_merge, native_project


class _HeadProjection(nn.Linear):
    """Base of both.

    Attributes:
        budget: The heads.
    """

    budget: HeadBudget

    def _skips(self, x: Tensor, head_dim: int) -> bool:
        """Whether leaving heads out is faster; never with a weight that is quantised or sharded."""
        budget = self.budget
        return type(self.weight) is nn.Parameter and skips_faster(
            x,
            self.weight,
            head_dim=head_dim,
            routed_heads=budget.routed_heads,
            off=budget.num_heads - budget.active_heads,
        )


class QueryProjection(_HeadProjection):
    """W x + b of the heads that are on, where x comes from `with_gates`, and 0 for the others."""

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch HC"]:
        """Queries of x."""
        gate = getattr(x, "gate", None)
        if gate is None or not self._skips(x, self.out_features // self.budget.num_heads):
            return super().forward(x)
        q = native_project(x.flatten(0, -2), self.weight, self.bias, gate.flatten(0, -2).float())
        return q.view(*x.shape[:-1], self.out_features)


class OutputProjection(_HeadProjection):
    """W x + b of heads x, of which those that are 0 are left out."""

    def forward(self, x: Float[Tensor, "*batch HC"]) -> Float[Tensor, "*batch D"]:
        """The sum over the heads."""
        num_heads = self.budget.num_heads
        if not self._skips(x, self.in_features // num_heads):
            return super().forward(x)
        heads = x.flatten(0, -2).unflatten(-1, (num_heads, -1))
        return native_merge(heads, self.weight, self.bias).view(*x.shape[:-1], self.out_features)


def with_gates(x: Float[Tensor, "B T D"], gate: Float[Tensor, "B T H"]) -> Float[Tensor, "B T D"]:
    """The same tokens, as a tensor of their own that tells a QueryProjection which heads are on.

    With gradients or while torch.compile traces, x itself: all queries are then computed.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return x
    told = x.view_as(x)
    told.gate = gate  # type: ignore[attr-defined]
    return told
