"""LDM-Q Quantize: a MODEL as a plan says."""

from typing import Any

from comfy_api.latest import io

from ..running import running, show_text
from ..sockets import CALIBRATION, PLAN, schema, text_output


class LDMQQuantize(io.ComfyNode):
    """MODEL, PLAN, optional CALIBRATION -> MODEL, text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What ComfyUI shows."""
        return schema(
            "ldmq_quantize",
            display_name="LDM-Q Quantize",
            description="Quantize a MODEL as the plan says. KSampler, LoRA and ControlNet go on working on the "
            "result. The original stays as it is, and in RAM for as long as it is used; a saved model needs only its "
            "own size.",
            search_aliases=["int8", "int4", "vram", "smaller model", "faster", "compress"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The float MODEL that the plan was made for. LoRAs before or after; one "
                    "that you always use goes before LDM-Q Calibrate.",
                ),
                PLAN.Input("plan", tooltip="From LDM-Q Plan."),
                CALIBRATION.Input(
                    "calibration",
                    optional=True,
                    tooltip="From LDM-Q Calibrate. Without it, layers with a static input range take their range from "
                    "every call; the text says how many.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "quantized",
                    display_name="model",  # the oldest API wants ids that inputs and outputs do not share
                    tooltip="The quantized MODEL, for KSampler, LoRA loaders, LDM-Q Save model, ...",
                ),
                text_output("What runs in which precision."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, plan: dict[str, Any], calibration: dict[str, Any] | None = None) -> io.NodeOutput:
        """Run the node."""
        with running(cls, "Quantizing") as task:
            from ..native.patching import quantize_model
            from ..payloads import to_plan, to_ranges

            ranges = None if calibration is None else to_ranges(calibration)
            quantized, text = quantize_model(model, to_plan(plan), ranges, task)
        show_text(cls, text)
        return io.NodeOutput(quantized, text)
