"""LDM-Q Profile: where quantization noise arises in a MODEL."""

from typing import Any

from comfy_api.latest import io, ui

from ..running import running, show_text
from ..sockets import PROFILE, sampling_inputs, schema, text_output


class LDMQProfile(io.ComfyNode):
    """MODEL, conditioning, latent -> PROFILE, chart, text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What ComfyUI shows."""
        return schema(
            "ldmq_profile",
            display_name="LDM-Q Profile",
            description="Measure how much every layer of a model would suffer from quantization. Takes as long as some "
            "dozens of pictures; the result holds for all pictures that the model will make.",
            search_aliases=["int8", "quantize", "SQNR", "sensitivity", "vram", "smaller model"],
            inputs=[
                io.Model.Input("model", tooltip="The float MODEL, with its LoRAs if you always use them."),
                io.Conditioning.Input("positive", tooltip="A prompt that is typical of what you make."),
                io.Conditioning.Input("negative", tooltip="The negative prompt that you use with it."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent. Its size decides how long this takes; half the width and height of your "
                    "pictures measure nearly the same.",
                ),
                *sampling_inputs(
                    "first_seed", "Seed of the first sample; the others count up. Leave it: other seeds, same findings."
                ),
            ],
            outputs=[
                PROFILE.Output("profile", tooltip="What was measured, for LDM-Q Plan."),
                io.Image.Output(
                    "chart", tooltip="SQNR as block after block is quantized, and the layers that suffer most."
                ),
                text_output("The findings in words."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        first_seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
    ) -> io.NodeOutput:
        """Run the node."""
        with running(cls, "Profiling") as task:
            from ..charts import profile_chart
            from ..native.capture import Sampling
            from ..native.measuring import profile_model
            from ..payloads import from_profile
            from ..texts import profile_text

            sampling = Sampling(first_seed, steps, cfg, sampler_name, scheduler)
            profile = profile_model(model, positive, negative, latent_image, sampling, task)
            chart, text = profile_chart(profile), profile_text(profile)
        show_text(cls, text)
        return io.NodeOutput(from_profile(profile), chart, text, ui=ui.PreviewImage(chart, cls=cls))
