"""Pure functions on tensors: no parameters, no configuration, no state.

B batch, T query tokens, S key tokens, N = B·T, D width, H heads, C channels of a head,
E candidates (experts, routed heads), K kept, F hidden width.
"""

from headwise.ops.aggregated import aggregated_attention
from headwise.ops.attention import head_attention
from headwise.ops.balance import balance_loss, count_choices, load_and_probability, router_z_loss
from headwise.ops.experts import expert_mlp
from headwise.ops.routing import (
    ExpertRouting,
    HeadRouting,
    Routing,
    route_heads,
    route_heads_by_query_norm,
    route_heads_by_scores,
    route_tokens,
)
from headwise.ops.scores import sparsemax

__all__ = [
    "ExpertRouting",
    "HeadRouting",
    "Routing",
    "aggregated_attention",
    "balance_loss",
    "count_choices",
    "expert_mlp",
    "head_attention",
    "load_and_probability",
    "route_heads",
    "route_heads_by_query_norm",
    "route_heads_by_scores",
    "route_tokens",
    "router_z_loss",
    "sparsemax",
]
