"""One V3 node a file: the schema, and one call of the function that does the work."""

from comfy_api.latest import io

from .calibrate import LDMQCalibrate
from .compare import LDMQCompare
from .export import LDMQExport
from .load import LDMQLoadModel
from .pipeline_loader import LDMQPipelineLoader
from .pipeline_sampler import LDMQPipelineSampler
from .pipeline_save import LDMQPipelineSave
from .plan import LDMQPlan
from .plan_advanced import LDMQPlanAdvanced
from .profile import LDMQProfile
from .quantize import LDMQQuantize
from .save import LDMQSaveModel

NODES: tuple[type[io.ComfyNode], ...] = (
    LDMQProfile,
    LDMQPlan,
    LDMQPlanAdvanced,
    LDMQCalibrate,
    LDMQQuantize,
    LDMQSaveModel,
    LDMQLoadModel,
    LDMQExport,
    LDMQCompare,
    LDMQPipelineLoader,
    LDMQPipelineSampler,
    LDMQPipelineSave,
)
"""Every node of the pack, in the order of the work."""
