"""Where our layers meet Hugging Face. Importing it registers what AutoModel needs."""

from headwise.hf.calibration import calibrate
from headwise.hf.configs import Conversion, MHMoEConfig, MoEConfig, MoHConfig
from headwise.hf.convert import convert
from headwise.hf.recorder import record_routing

__all__ = [
    "Conversion",
    "MHMoEConfig",
    "MoEConfig",
    "MoHConfig",
    "calibrate",
    "convert",
    "record_routing",
]
