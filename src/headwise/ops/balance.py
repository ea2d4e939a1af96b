"""Losses on a routing: keep the load even, keep the logits small."""

from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.ops.choice import check_choice
from headwise.ops.fields import check
from headwise.ops.first_pass import check_keeps_gradients
from headwise.ops.processes import in_several_processes, sum_over_processes
from headwise.ops.routing import Routing

BalanceForm = Literal["scaled", "plain", "first_choice"]
BalanceScope = Literal["process", "all"]


def balance_loss(
    routing: Routing, *, form: BalanceForm = "scaled", scope: BalanceScope = "process"
) -> Float[Tensor, ""]:
    """Load-balance loss of one layer over its E candidates (routed heads, groups or experts).

    With F_e the share of tokens that chose e (the shares sum to K) and P_e the mean of p_e:

        scaled:        E · sum_e F_e P_e      K at perfect balance, E where all go to the same
        plain:             sum_e F_e P_e      MoH's printed form
        first_choice:  E · sum_e F_e P_e      with F from the first choice only, 1 at balance

    **Source**: scaled: MoH's released code and MH-MoE, arXiv 2411.16205; plain: MoH, arXiv
    2410.11842, Eq. 7; first_choice: MH-MoE's released code for arXiv 2404.15045.
    scope "all": global-batch balance, arXiv 2501.11873.
    **Deviates**: padding (`routing.mask`) is not counted.

    Args:
        routing: Of any layer of the library.
        form: Which of the three.
        scope: Whose tokens F counts: those of this "process", or of "all" processes of
            torch.distributed, which then must all come here. P is of this process: data
            parallelism averages the gradients, and where all have as many tokens the average is
            the gradient of the loss on the joined batch.

    Returns:
        A scalar; its gradient flows through P only. 0 for a layer that routes nothing.

    Raises:
        ValueError: If form or scope is unknown, the routing is none, or it lost its gradients in
            reentrant activation checkpointing.
    """
    check("routing", routing, Routing)
    check_keeps_gradients(routing)
    check_choice("form", form, BalanceForm)
    check_choice("scope", scope, BalanceScope)
    candidates = routing.probabilities.shape[-1]
    if form == "first_choice":
        routing = routing._replace(indices=routing.indices[..., :1])
    share, probability = load_and_probability(routing)
    if scope == "all" and in_several_processes():
        share = _share_over_processes(routing)
    scale = 1 if form == "plain" else candidates
    return scale * (share * probability).sum()


def load_and_probability(routing: Routing) -> tuple[Float[Tensor, " E"], Float[Tensor, " E"]]:
    """F and P of `balance_loss`: each candidate's share of tokens and mean probability."""
    probabilities = routing.probabilities.flatten(end_dim=-2)
    counts = count_choices(routing)
    if routing.mask is None:
        return counts / max(probabilities.shape[0], 1), probabilities.mean(0)
    real = routing.mask.flatten().to(probabilities.dtype)
    tokens = real.sum().clamp_min(1)
    return counts / tokens, (probabilities * real.unsqueeze(-1)).sum(0) / tokens


def mean_balance_loss(routings: Iterable[Routing]) -> Float[Tensor, ""]:
    """The mean of `balance_loss` over the layers that have a choice to make; 0 where none has."""
    losses = [balance_loss(r) for r in routings if r.probabilities.shape[-1]]
    return torch.stack(losses).mean() if losses else torch.zeros(())


def count_choices(routing: Routing) -> Float[Tensor, " E"]:
    """How many tokens chose each candidate; padding chose none."""
    indices = routing.indices.flatten()
    # Padding has index -1: it lands in a first slot that is cut off.
    ones = routing.probabilities.new_ones(indices.shape)
    slots = routing.probabilities.new_zeros(routing.probabilities.shape[-1] + 1)
    return slots.scatter_add(0, indices + 1, ones)[1:]


def _share_over_processes(routing: Routing) -> Tensor:
    """F of `balance_loss` over the tokens of all processes."""
    counts = count_choices(routing)
    mask = routing.mask
    rows = routing.probabilities.flatten(end_dim=-2).shape[0]
    tokens = counts.new_tensor(rows) if mask is None else mask.sum().to(counts.dtype)
    sums = sum_over_processes(torch.cat([counts, tokens.view(1)]))
    return sums[:-1] / sums[-1].clamp_min(1)


def router_z_loss(routing: Routing) -> Float[Tensor, ""]:
    """Mean over tokens of logsumexp(logits)², which keeps a router's logits near 0.

    **Source**: ST-MoE, arXiv 2202.08906, Eq. 5. Padding (`routing.mask`) is not counted. 0 for a
    layer that routes nothing. Raises ValueError where `balance_loss` does for a routing.
    """
    check("routing", routing, Routing)
    check_keeps_gradients(routing)
    if routing.logits.shape[-1] == 0:
        return routing.logits.sum()
    squares = torch.logsumexp(routing.logits, dim=-1).square()
    if routing.mask is None:
        return squares.mean()
    return torch.where(routing.mask, squares, 0).sum() / routing.mask.sum().clamp_min(1)
