"""Model families of our own, of transformers' building blocks. Importing it registers them."""

from headwise.models.dit import DiT
from headwise.models.dit_config import DiTConfig
from headwise.models.masked import MaskedConfig, MaskedModel
from headwise.models.transnext import TransNeXtBackbone, TransNeXtForImageClassification
from headwise.models.transnext_config import TransNeXtConfig

__all__ = [
    "DiT",
    "DiTConfig",
    "MaskedConfig",
    "MaskedModel",
    "TransNeXtBackbone",
    "TransNeXtConfig",
    "TransNeXtForImageClassification",
]
