"""Layers: parameters around ops. Each returns (y, routing)."""

from headwise.nn.budget import Budget, HeadBudget
from headwise.nn.mh_moe import MHMoE, MoE
from headwise.nn.moh import MoHAttention
from headwise.nn.routers import CosineRouter, LinearRouter, QueryNormRouter, Router, TwoStageRouter

__all__ = [
    "Budget",
    "CosineRouter",
    "HeadBudget",
    "LinearRouter",
    "MHMoE",
    "MoE",
    "MoHAttention",
    "QueryNormRouter",
    "Router",
    "TwoStageRouter",
]
