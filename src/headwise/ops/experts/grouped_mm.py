"""Sort the assignments once, then torch's grouped matrix product: one launch for all experts.

For GPUs: no size is read back to the host, so nothing waits.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from headwise.ops.activations import Activation, activate
from headwise.ops.experts.choices import runs_of_experts

# torch's kernel loads rows in pieces of this many bytes.
_ALIGNMENT = 16


def expert_mlp(
    x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    num_experts, top_k = up.shape[0], indices.shape[1]
    runs = runs_of_experts(indices, num_experts)
    # The kernel leaves the rows of choices that go nowhere as they were.
    counts, ends = runs.go_somewhere(), runs.ends[:-1]
    rows = torch.where(counts, x[runs.order // top_k], 0)
    hidden = activate(grouped_mm(rows, up.mT, offs=ends), activation, down.shape[2])
    hidden = torch.where(counts, hidden, 0)
    y = torch.where(counts, grouped_mm(hidden, down.mT, offs=ends), 0)
    unsorted = runs.put_back(y).unflatten(0, (-1, top_k))
    return (unsorted * weights.to(y.dtype).unsqueeze(-1)).sum(1)


def computes(x: Tensor, down: Tensor) -> bool:
    """Whether torch's kernel computes this dtype and these widths."""
    widths = (x.shape[1], down.shape[2])
    aligned = all(width * x.element_size() % _ALIGNMENT == 0 for width in widths)
    return aligned and x.dtype != torch.float64
