"""headwise: transformers whose heads are routed.

Layers return (y, routing); losses, statistics and plots are functions of the routing.
"""

from headwise import bitnet, models, ops, parity
from headwise.hf import (
    FittedExperts,
    FittedHeads,
    MHMoEConfig,
    MoEConfig,
    MoHConfig,
    add_balance_loss,
    calibrate,
    convert,
    fit,
    fit_experts,
    load,
    record_routing,
    replay_routing,
    restore,
)
from headwise.nn import MHMoE, MoE, MoHAttention, MoHMultiheadAttention, update_biases
from headwise.ops import ExpertRouting, HeadRouting, Routing, balance_loss, router_z_loss
from headwise.released import load_released

__version__ = "0.1.0"

__all__ = [
    "ExpertRouting",
    "FittedExperts",
    "FittedHeads",
    "HeadRouting",
    "MHMoE",
    "MHMoEConfig",
    "MoE",
    "MoEConfig",
    "MoHAttention",
    "MoHConfig",
    "MoHMultiheadAttention",
    "Routing",
    "add_balance_loss",
    "balance_loss",
    "bitnet",
    "calibrate",
    "convert",
    "fit",
    "fit_experts",
    "load",
    "load_released",
    "models",
    "ops",
    "parity",
    "record_routing",
    "replay_routing",
    "restore",
    "router_z_loss",
    "update_biases",
]
