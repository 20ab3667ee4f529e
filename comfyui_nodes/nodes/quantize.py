"""LDM-Q Quantize: a MODEL as a plan says."""

from functools import partial
from typing import Any

from comfy_api.latest import io

from ..payloads import RECONSTRUCTIONS
from ..running import running, show_text
from ..sockets import CALIBRATION, PLAN, reconstruct_input, sampling_inputs, schema, text_output


class LDMQQuantize(io.ComfyNode):
    """MODEL, PLAN, optional CALIBRATION, optionally what reconstruction learns from -> MODEL, text."""

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
                reconstruct_input(
                    "With quick or full connect positive, negative and latent_image, too; finished blocks are kept, so "
                    "after a Stop it goes on where it was."
                ),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="For reconstruct: a prompt that is typical of what you make."
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="For reconstruct: the negative prompt that you use with it."
                ),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    tooltip="For reconstruct: an empty latent. Its size decides how long learning takes.",
                ),
                *sampling_inputs(
                    "first_seed",
                    "For reconstruct: seed of the first sample; the others count up. There is no need to vary it.",
                    optional=True,
                    advanced=True,
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
    def execute(
        cls,
        model: Any,
        plan: dict[str, Any],
        calibration: dict[str, Any] | None = None,
        reconstruct: str = RECONSTRUCTIONS[0],
        positive: Any = None,
        negative: Any = None,
        latent_image: dict[str, Any] | None = None,
        first_seed: int = 0,
        steps: int = 20,
        cfg: float = 8.0,
        sampler_name: str = "euler",
        scheduler: str = "normal",
    ) -> io.NodeOutput:
        """Run the node."""
        with running(cls, "Quantizing") as task:
            from ..native.capture import Sampling
            from ..native.patching import quantize_model
            from ..native.reconstructing import Learning, reconstruct_model
            from ..payloads import to_plan, to_ranges
            from ..texts import reconstruction_text

            ranges = None if calibration is None else to_ranges(calibration)
            chosen, learned, units = to_plan(plan), None, ()
            if reconstruct != RECONSTRUCTIONS[0]:
                sampling = Sampling(first_seed, steps, cfg, sampler_name, scheduler)
                learning = Learning(reconstruct, positive, negative, latent_image, sampling)
                told = partial(task.stage, "Reconstructing")
                learned, units = reconstruct_model(model, chosen, ranges, learning, told)
            quantized, text = quantize_model(model, chosen, ranges, partial(task.stage, "Quantizing"), learned)
            text += reconstruction_text(units)
        show_text(cls, text)
        return io.NodeOutput(quantized, text)
