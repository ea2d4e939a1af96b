"""Model families of our own, of transformers' building blocks. Importing it registers them."""

from headwise.models.decoder import DecoderConfig, DecoderForCausalLM
from headwise.models.dit import DiT, DiTConfig
from headwise.models.masked import MaskedConfig, MaskedModel
from headwise.models.transnext import (
    TransNeXtBackbone,
    TransNeXtConfig,
    TransNeXtForImageClassification,
)

__all__ = [
    "DecoderConfig",
    "DecoderForCausalLM",
    "DiT",
    "DiTConfig",
    "MaskedConfig",
    "MaskedModel",
    "TransNeXtBackbone",
    "TransNeXtConfig",
    "TransNeXtForImageClassification",
]
