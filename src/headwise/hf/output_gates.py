"""Where models that multiply each attention head by a learned gate have these gates."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from headwise.ops import HeadRouting


class _Gate(NamedTuple):
    """The linear map that computes gates, beside queries or alone, and what is made of it."""

    projection: Literal["g_proj", "q_proj"]
    activation: Any


# By transformers' class of the attention. A `g_proj` has an output for each head, or one for each
# channel; a `q_proj` has one for each channel, behind the queries of its head.
_GATES = {
    "Lfm3Attention": _Gate("g_proj", torch.sigmoid),
    "Step3p7Attention": _Gate("g_proj", torch.sigmoid),
    "LagunaAttention": _Gate("g_proj", nn.functional.softplus),
    "Qwen3NextAttention": _Gate("q_proj", torch.sigmoid),
    "Qwen3_5Attention": _Gate("q_proj", torch.sigmoid),
    "Qwen3_5MoeAttention": _Gate("q_proj", torch.sigmoid),
}


def check_has_gates(model: nn.Module, name: str) -> None:
    """Raises ValueError unless the attention of that name has gates on its output."""
    attention = model.get_submodule(name)
    gate = _GATES.get(type(attention).__name__)
    # A model may be configured without.
    if gate is None or getattr(attention, gate.projection, None) is None:
        raise ValueError(
            f"{type(model).__name__} cannot be converted with router 'output_gate': {name}, a "
            f"{type(attention).__name__}, has no gate on its heads that is known "
            f"({', '.join(_GATES)} have); name only layers that have one, or take router 'fitted' "
            "or 'query_norm'"
        )


def gates_before(attention: Any, x: Tensor) -> Tensor | None:
    """The gates [B, T, H] of what the attention reads; None where they come with its queries."""
    gate = _GATES[type(attention).__name__]
    if gate.projection != "g_proj":
        return None
    return _by_head(attention, gate.activation(attention.g_proj(x).float()))


def watch_queries(attention: Any) -> None:
    """Route by the gates that come with the queries, as soon as the attention computes them.

    Not by a second product. What was decided waits in the attention for `decided_by_queries`.
    """

    def decide(_: nn.Module, __: Any, projected: Tensor) -> None:
        watch.remove()
        logits = projected.unflatten(-1, (attention.router.budget.num_heads, 2, -1))[..., 1, :]
        gates = _GATES[type(attention).__name__].activation(logits.float()).mean(-1)
        attention.decided = attention.router(gates)

    watch = attention.q_proj.register_forward_hook(decide)


def decided_by_queries(attention: Any) -> HeadRouting:
    """What `watch_queries` saw."""
    routing: HeadRouting = attention.decided
    del attention.decided
    return routing


def _by_head(attention: Any, gates: Tensor) -> Tensor:
    """The mean over a head's channels, where each has a gate of its own."""
    return gates.unflatten(-1, (attention.router.budget.num_heads, -1)).mean(-1)
