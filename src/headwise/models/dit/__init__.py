"""Diffusion transformers: configuration, model, loss, and a pipeline that needs diffusers."""

# A saved pipeline names this module. diffusers looks here for DiT, and for the base by which it
# tells how a DiT is loaded.
from transformers import PreTrainedModel

from headwise.models.dit.config import DiTConfig
from headwise.models.dit.model import DiT

__all__ = ["DiT", "DiTConfig", "PreTrainedModel"]
