"""Projections of a transformers attention that leave out heads that are off."""

from typing import Any

from torch import nn

from headwise.nn import HeadRouter
from headwise.nn.projections import OutputProjection, QueryProjection

_QUERIES = ("q_proj", "query")
_OUTPUTS = ("o_proj", "out_proj", "dense")
_HEAD_DIM = ("head_dim", "attention_head_size")


def skip_heads(attention: nn.Module, router: HeadRouter) -> None:
    """Let the projections of an attention leave out heads that are off, where that is exact.

    They change their class, and stay an nn.Linear of the same parameters. Projections of queries,
    keys and values at once, adapted and quantised ones stay as they are.
    """
    num_heads = router.budget.num_heads
    for linear in _plain(attention, _OUTPUTS):
        if linear.in_features % num_heads == 0:
            linear.__class__, linear.budget = OutputProjection, router.budget
    for linear in _plain(attention, _QUERIES):
        if _keeps_heads_apart(attention, linear.out_features / num_heads):
            linear.__class__, linear.budget = QueryProjection, router.budget


def _keeps_heads_apart(attention: nn.Module, head_dim: float) -> bool:
    """Whether all that is done to queries is done head by head.

    A norm over the queries of all heads would see that some are 0. What stands beside the
    projections may be one. It is known by its weights, of which one for each head has as many as
    a head has channels; what has none is not trusted.
    """
    if head_dim not in (getattr(attention, name, None) for name in _HEAD_DIM):
        return False
    others = (m for m in attention.children() if not isinstance(m, _HARMLESS))
    return all({tuple(p.shape) for p in m.parameters()} == {(head_dim,)} for m in others)


_HARMLESS = (nn.Linear, HeadRouter, nn.Dropout, nn.Identity)


def _plain(attention: nn.Module, names: tuple[str, ...]) -> list[Any]:
    found = (getattr(attention, name, None) for name in names)
    return [linear for linear in found if type(linear) is nn.Linear]
