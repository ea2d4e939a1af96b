"""Layers: parameters around ops. Each returns (y, routing)."""

from headwise.nn.budget import ActiveBudget, Budget, HeadBudget
from headwise.nn.expert_routers import (
    CosineRouter,
    ExpertRouter,
    FittedExpertRouter,
    LinearRouter,
    update_biases,
)
from headwise.nn.mh_moe import MHMoE, MoE
from headwise.nn.moh import MoHAttention
from headwise.nn.multihead import MoHMultiheadAttention
from headwise.nn.routers import (
    FittedRouter,
    HeadRouter,
    OneStageRouter,
    OutputGateRouter,
    QueryNormRouter,
    Router,
    TwoStageRouter,
)

__all__ = [
    "ActiveBudget",
    "Budget",
    "CosineRouter",
    "ExpertRouter",
    "FittedExpertRouter",
    "FittedRouter",
    "HeadBudget",
    "HeadRouter",
    "LinearRouter",
    "MHMoE",
    "MoE",
    "MoHAttention",
    "MoHMultiheadAttention",
    "OneStageRouter",
    "OutputGateRouter",
    "QueryNormRouter",
    "Router",
    "TwoStageRouter",
    "update_biases",
]
