"""Model families of our own, of transformers' building blocks. Importing it registers them."""

from headwise.models.masked import MaskedConfig, MaskedModel

__all__ = ["MaskedConfig", "MaskedModel"]
