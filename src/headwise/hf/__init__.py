"""Where our layers meet Hugging Face. Importing it registers what AutoModel needs."""

from headwise.hf.calibration import calibrate
from headwise.hf.conversion import Conversion
from headwise.hf.convert import convert
from headwise.hf.expert_configs import MHMoEConfig, MoEConfig
from headwise.hf.head_configs import MoHConfig
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
