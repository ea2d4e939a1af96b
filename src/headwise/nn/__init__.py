"""Layers: parameters around ops. Each returns (y, routing)."""

from headwise.nn.budget import Budget, HeadBudget
from headwise.nn.expert_routers import CosineRouter, ExpertRouter, LinearRouter, update_biases
from headwise.nn.mh_moe import MHMoE, MoE
from headwise.nn.moh import MoHAttention
from headwise.nn.routers import (
    HeadRouter,
    OneStageRouter,
    QueryNormRouter,
    Router,
    TwoStageRouter,
)

__all__ = [
    "Budget",
    "CosineRouter",
    "ExpertRouter",
    "HeadBudget",
    "HeadRouter",
    "LinearRouter",
    "MHMoE",
    "MoE",
    "MoHAttention",
    "OneStageRouter",
    "QueryNormRouter",
    "Router",
    "TwoStageRouter",
    "update_biases",
]
