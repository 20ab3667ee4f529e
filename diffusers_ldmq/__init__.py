"""Post-training quantization of latent diffusion models that measures before it decides and verifies after.

Importing registers the quantizer "ldmq" with diffusers, so that our checkpoints load with plain `from_pretrained`.
"""

from .artifacts import Calibration, Plan, Profile, Report
from .attention import quantize_attention, restore_attention
from .calibration import calibrate
from .calls import Recording
from .config import LDMQConfig
from .correction import correct
from .errors import LDMQError
from .inputs import default_inputs
from .layers import set_low_memory
from .pipeline import QuantizedLDMPipeline
from .planning import make_plan
from .plugin import register
from .profiling import ProfileSettings, profile_sqnr
from .quantization import quantize
from .reconstruction import ReconstructionSettings, reconstruct
from .recording import record_calls
from .twin import register as register_text
from .verification import verify
from .version import __version__

register()
register_text()

__all__ = [
    "Calibration",
    "LDMQConfig",
    "LDMQError",
    "Plan",
    "Profile",
    "ProfileSettings",
    "QuantizedLDMPipeline",
    "ReconstructionSettings",
    "Recording",
    "Report",
    "__version__",
    "calibrate",
    "correct",
    "default_inputs",
    "make_plan",
    "profile_sqnr",
    "quantize",
    "quantize_attention",
    "reconstruct",
    "record_calls",
    "restore_attention",
    "set_low_memory",
    "verify",
]
