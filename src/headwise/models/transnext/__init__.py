"""TransNeXt and MoH-ViT: configuration, layers, models, and timm's registry on request."""

from headwise.models.transnext.config import TransNeXtConfig
from headwise.models.transnext.model import TransNeXtBackbone, TransNeXtForImageClassification

__all__ = ["TransNeXtBackbone", "TransNeXtConfig", "TransNeXtForImageClassification"]
