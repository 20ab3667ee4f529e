"""LDM-Q Pipeline loader: a whole diffusers pipeline, quantized on the way in if asked for."""

from typing import Any

import comfy.model_management
from comfy_api.latest import io

from ..payloads import RECONSTRUCTIONS, SELECTIONS
from ..pipeline_folders import BUNDLED, choices, model_of, stamp
from ..presets import DEFAULT, PRESETS
from ..running import running, show_text
from ..sockets import PIPELINE, PLAN, SELECTED, accepted, reconstruct_input, schema, steps_input, text_output

AS_IT_IS = "no, as it is"
DTYPES = ("auto", "float32", "bfloat16", "float16")


class LDMQPipelineLoader(io.ComfyNode):
    """Bundled model, folder or hub id -> PIPELINE, text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What ComfyUI shows."""
        return schema(
            "ldmq_pipeline_loader",
            display_name="LDM-Q Pipeline loader",
            description="Load a diffusers pipeline: the small model that comes with LDM-Q, a folder, or one from the "
            "hub. A float pipeline is profiled, planned, calibrated and quantized; what that gave is kept, so the "
            "next time is quick. A pipeline that is quantized already just loads.",
            search_aliases=["diffusers", "hugging face", "int8", "quantize", "pipeline"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=choices(),
                    default=BUNDLED,
                    tooltip="The bundled model, which draws 64x64 emoji from their names, or a pipeline in "
                    "models/ldmq_pipelines or models/diffusers. Press R to refresh the list.",
                ),
                io.Combo.Input(
                    "quantize",
                    options=[*PRESETS, AS_IT_IS],
                    default=DEFAULT,
                    tooltip="Safe: 8-bit weights, all arithmetic in floating point. Balanced: most arithmetic in 8-bit "
                    "integers too, the fastest. Smallest: 4-bit weights where they do least harm. no, as it is: a "
                    "float pipeline stays float. Pipelines that are quantized already load as they are, whatever is "
                    "chosen.",
                ),
                io.String.Input(
                    "hub_id_or_folder",
                    default="",
                    tooltip="Instead of the list: a hub id such as owner/name, or the path of a diffusers folder. Only "
                    "safetensors files are read.",
                ),
                accepted(
                    io.String.Input,
                    "target",
                    default="",
                    advanced=True,
                    tooltip="What the quantized pipeline must reach, instead of the preset's own rule: sqnr>=30dB, "
                    "size<=0.3x, size<=900MB, int8>=80%, or several with commas between. It is measured at the end.",
                ),
                accepted(
                    io.Combo.Input,
                    "calibration",
                    options=list(SELECTIONS),
                    default="first-step",
                    advanced=True,
                    tooltip=f"Where the ranges of layers' inputs come from. {SELECTED}",
                ),
                steps_input("Sampling steps to measure with. Use the number that you sample with.", advanced=True),
                accepted(
                    io.Combo.Input,
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    advanced=True,
                    tooltip="What the float parts compute in. auto: the fastest on this machine. A quantized pipeline "
                    "keeps the one that it was made in.",
                ),
                PLAN.Input(
                    "plan",
                    optional=True,
                    tooltip="A plan that was made for this very pipeline, from LDM-Q Plan (Advanced), which opens "
                    "files; it goes before the preset. Plans of a MODEL do not fit.",
                ),
                reconstruct_input("Finished blocks are kept: after a Stop it goes on where it was."),
            ],
            outputs=[
                PIPELINE.Output("pipeline", tooltip="For LDM-Q Pipeline sampler and LDM-Q Pipeline save."),
                text_output("What was loaded, how it is quantized, and what it takes."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str = BUNDLED, hub_id_or_folder: str = "", **others: Any) -> str:
        """Load again when a file of the folder changes."""
        return stamp(model, hub_id_or_folder)

    @classmethod
    def execute(
        cls,
        model: str,
        quantize: str,
        hub_id_or_folder: str,
        target: str,
        calibration: str,
        steps: int,
        dtype: str,
        plan: dict[str, Any] | None = None,
        reconstruct: str = RECONSTRUCTIONS[0],
    ) -> io.NodeOutput:
        """Run the node."""
        with running(cls, "Loading") as task:
            from ..payloads import to_plan
            from ..pipelines import Order, load, told_of

            device = comfy.model_management.get_torch_device()
            if device.type != "cpu":  # how much memory a pipeline takes ComfyUI does not know
                comfy.model_management.unload_all_models()
            order = Order(
                model=model_of(model, hub_id_or_folder),
                preset=None if quantize == AS_IT_IS else PRESETS[quantize],
                target=target.strip(),
                plan=None if plan is None else to_plan(plan),
                calibration=calibration,
                reconstruction=reconstruct,
                steps=steps,
                dtype=dtype,
                device=str(device),
            )
            pipeline = load(order, task.stage, comfy.model_management.throw_exception_if_processing_interrupted)
            text = told_of(pipeline)
        show_text(cls, text)
        return io.NodeOutput(pipeline, text)
