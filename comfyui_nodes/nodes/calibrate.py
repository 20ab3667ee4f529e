"""LDM-Q Calibrate: the input ranges of the layers that a plan gives static ones."""

from typing import Any

from comfy_api.latest import io

from ..payloads import SELECTIONS
from ..running import running, show_text
from ..sockets import AS_PLANNED, CALIBRATION, PLAN, SELECTED, sampling_inputs, schema, text_output


class LDMQCalibrate(io.ComfyNode):
    """MODEL, PLAN, conditioning, latent -> CALIBRATION, text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What ComfyUI shows."""
        return schema(
            "ldmq_calibrate",
            display_name="LDM-Q Calibrate",
            description="Measure the range of every layer's input that the plan quantizes, in a single sampling step "
            "or over the whole schedule.",
            search_aliases=["int8", "quantize", "activation ranges", "single step calibration"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The float MODEL that the plan was made for, with its LoRAs if you always use them.",
                ),
                PLAN.Input("plan", tooltip="From LDM-Q Plan."),
                io.Conditioning.Input("positive", tooltip="A prompt that is typical of what you make."),
                io.Conditioning.Input("negative", tooltip="The negative prompt that you use with it."),
                io.Latent.Input(
                    "latent_image", tooltip="An empty latent of the size that you sample at; batch 1 will do."
                ),
                io.Combo.Input(
                    "selection",
                    options=[AS_PLANNED, *SELECTIONS],
                    default=AS_PLANNED,
                    tooltip=f"as planned: what LDM-Q Plan (Advanced) says, else first-step. {SELECTED} uniform takes "
                    "as long as sampling, normal and tdac as long as sampling a few images. Choose one of them if all "
                    "layers are w8a8 and LDM-Q Compare shows too much.",
                ),
                *sampling_inputs(
                    "first_seed", "Seed of the first sample; the others count up. There is no need to vary it."
                ),
            ],
            outputs=[
                CALIBRATION.Output("calibration", tooltip="For LDM-Q Quantize, with the same plan."),
                text_output("What was measured."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        plan: dict[str, Any],
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        selection: str,
        first_seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
    ) -> io.NodeOutput:
        """Run the node."""
        with running(cls, "Calibrating") as task:
            from ..native.capture import Sampling
            from ..native.measuring import calibrate_model
            from ..payloads import from_ranges, selection_of, to_plan
            from ..texts import calibration_text

            sampling = Sampling(first_seed, steps, cfg, sampler_name, scheduler)
            chosen = to_plan(plan)
            selection = selection_of(chosen) if selection == AS_PLANNED else selection
            ranges = calibrate_model(model, chosen, positive, negative, latent_image, sampling, selection, task)
            text = calibration_text(ranges)
        show_text(cls, text)
        return io.NodeOutput(from_ranges(ranges), text)
