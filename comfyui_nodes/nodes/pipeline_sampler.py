"""LDM-Q Pipeline sampler: pictures from a diffusers pipeline."""

from typing import Any

import comfy.model_management
from comfy_api.latest import io

from ..running import running, show_text
from ..sockets import PIPELINE, accepted, cfg_input, schema, seed_input, steps_input

LARGEST_SIDE = 16384
PREVIEW_SIDE = 512
"""Pixels of the longest side of a preview."""


class LDMQPipelineSampler(io.ComfyNode):
    """PIPELINE, prompt -> IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What ComfyUI shows."""
        return schema(
            "ldmq_pipeline_sampler",
            display_name="LDM-Q Pipeline sampler",
            description="Draw pictures with a diffusers pipeline, float or quantized. Shows each step while it works.",
            search_aliases=["diffusers", "text to image", "txt2img", "sample pipeline"],
            inputs=[
                PIPELINE.Input("pipeline", tooltip="From LDM-Q Pipeline loader."),
                io.String.Input(
                    "prompt",
                    default="red apple",
                    multiline=True,
                    tooltip="What to draw. The bundled model knows names of emoji, without an article. "
                    "Class-conditional pipelines take a label here, a number or a name; leave it empty for "
                    "unconditional ones.",
                ),
                io.String.Input(
                    "negative",
                    default="",
                    multiline=True,
                    tooltip="What not to draw. Leave it empty for pipelines that take no negative prompt.",
                ),
                steps_input("Sampling steps, with the pipeline's own scheduler."),
                cfg_input(5.0, "Guidance scale: how closely to follow the prompt. Not used by pipelines without one."),
                seed_input(
                    "seed", "Noise to start from. The same seed gives the same picture; a batch counts up from it."
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many pictures."),
                accepted(
                    io.Int.Input,
                    "width",
                    default=0,
                    min=0,
                    max=LARGEST_SIDE,
                    step=8,
                    advanced=True,
                    tooltip="Pixels; 0 = the size that the pipeline was made for.",
                ),
                accepted(
                    io.Int.Input,
                    "height",
                    default=0,
                    min=0,
                    max=LARGEST_SIDE,
                    step=8,
                    advanced=True,
                    tooltip="Pixels; 0 = the size that the pipeline was made for.",
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="The pictures.")],
        )

    @classmethod
    def execute(
        cls,
        pipeline: Any,
        prompt: str,
        negative: str,
        steps: int,
        cfg: float,
        seed: int,
        batch_size: int,
        width: int,
        height: int,
    ) -> io.NodeOutput:
        """Run the node."""
        with running(cls, "Sampling") as task:
            from ..pipelines import Wish, bring_back, sample, unused

            wish = Wish(prompt, negative, steps, cfg, seed, width, height, batch_size)

            def told(done: int, total: int, picture: Any) -> None:
                if picture is None:
                    task(done, total)
                else:
                    task.preview(done, total, ("JPEG", picture, PREVIEW_SIDE))

            check = comfy.model_management.throw_exception_if_processing_interrupted
            bring_back(pipeline, comfy.model_management.unload_all_models)
            image = sample(pipeline, wish, told, check)
            text = unused(pipeline)
        show_text(cls, text)
        return io.NodeOutput(image)
