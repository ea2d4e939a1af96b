"""What a layer costs: FLOPs and parameters by formula, mixtures of equal cost, shares of devices.

A multiply-add is 2 FLOPs. Like torch's counter, the formulas count matrix products and attention,
not norms, softmax or activations; causal attention is counted as the pairs that are seen.
"""

from headwise.parity.flops import Reads, count_flops, router_share
from headwise.parity.match import Match, match_mh_moe, match_sparse_moe
from headwise.parity.measure import measure_flops
from headwise.parity.mixture import Mixture
from headwise.parity.parameters import count_parameters
from headwise.parity.sharding import Decoder, Sharding

__all__ = [
    "Decoder",
    "Match",
    "Mixture",
    "Reads",
    "Sharding",
    "count_flops",
    "count_parameters",
    "match_mh_moe",
    "match_sparse_moe",
    "measure_flops",
    "router_share",
]
