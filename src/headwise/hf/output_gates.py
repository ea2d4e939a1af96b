"""Where models that multiply each attention head by a learned gate have these gates."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from headwise.hf.parallelism import heads_here
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
    gates = gate.activation(attention.g_proj(x).float())
    # The mean over a head's channels, where each has a gate of its own.
    return _of_all_heads(attention, gates.unflatten(-1, (_heads(attention, "g_proj", gates), -1)))


def watch_queries(attention: Any) -> None:
    """Route by the gates that come with the queries, as soon as the attention computes them.

    Not by a second product. What was decided waits in the attention for `decided_by_queries`.
    """

    def decide(_: nn.Module, __: Any, projected: Tensor) -> None:
        watch.remove()
        heads = _heads(attention, "q_proj", projected)
        logits = projected.unflatten(-1, (heads, 2, -1))[..., 1, :]
        gates = _GATES[type(attention).__name__].activation(logits.float())
        attention.decided = attention.router(_of_all_heads(attention, gates))

    watch = attention.q_proj.register_forward_hook(decide)


def decided_by_queries(attention: Any) -> HeadRouting:
    """What `watch_queries` saw."""
    routing: HeadRouting = attention.decided
    del attention.decided
    return routing


def _heads(attention: Any, projection: str, projected: Tensor) -> int:
    """Of how many heads it is that a projection gave: all, or those that this process computes."""
    width: int = getattr(attention, projection).out_features
    heads: int = attention.router.budget.num_heads * projected.shape[-1] // width
    return heads


def _of_all_heads(attention: Any, gates: Tensor) -> Tensor:
    """The mean gate of each head, [B, T, H], of the gates [B, T, heads, channels] here."""
    here = heads_here(attention, gates.shape[2], attention.router.budget.num_heads)
    return here.gathered(gates.mean(-1))
