"""Where our layers meet Hugging Face. Importing it registers what AutoModel needs."""

from typing import Any

from headwise.hf import auto
from headwise.hf.calibration import calibrate
from headwise.hf.conversion import Conversion
from headwise.hf.converter import convert, restore
from headwise.hf.expert_configs import FittedExperts, MHMoEConfig, MoEConfig
from headwise.hf.fitting.experts import fit_experts
from headwise.hf.fitting.heads import fit
from headwise.hf.head_configs import FittedHeads, MoHConfig
from headwise.hf.loading import load
from headwise.hf.quantized import QuantizedBytes, quantized_bytes
from headwise.hf.recorder import record_routing, replay_routing
from headwise.hf.trainers import add_balance_loss

__all__ = [
    "Conversion",
    "FittedExperts",
    "FittedHeads",
    "MHMoEConfig",
    "MoEConfig",
    "MoHConfig",
    "QuantizedBytes",
    "add_balance_loss",
    "calibrate",
    "convert",
    "fit",
    "fit_experts",
    "load",
    "quantized_bytes",
    "record_routing",
    "replay_routing",
    "restore",
]


def __getattr__(name: str) -> Any:
    """RoutedConfig, RoutedLlamaForCausalLM and their like: the classes of converted models.

    The module that is saved beside a model of transformers looks for them here, and so does
    diffusers, whose saved pipelines name such a class and this module; and its base ModelMixin, by
    which diffusers tells what it is. Only then diffusers is imported.
    """
    if name == auto.RoutedConfig.__name__:
        return auto.RoutedConfig
    found = None
    if name.startswith("Routed"):
        found = auto.class_of(name)
    if found is None and (name == "ModelMixin" or name.startswith("Routed")):
        from headwise.hf.of_diffusers import class_of

        found = class_of(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
