"""LDM-Q Compare: two MODELs from the same seed, in pictures and decibels."""

from typing import Any

from comfy_api.latest import io, ui

from ..running import running, show_text
from ..sockets import sampling_inputs, schema, text_output


class LDMQCompare(io.ComfyNode):
    """Two MODELs, VAE, conditioning, latent -> pictures side by side, text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What ComfyUI shows."""
        return schema(
            "ldmq_compare",
            display_name="LDM-Q Compare",
            description="Sample two models from the same seed and show them side by side, with their difference and "
            "how far apart they are in decibels (SQNR; more is closer).",
            search_aliases=["float against quantized", "SQNR", "side by side", "quality"],
            inputs=[
                io.Model.Input("reference", tooltip="The MODEL to compare with, usually the float one."),
                io.Model.Input("model", tooltip="The MODEL to judge, usually the quantized one."),
                io.Vae.Input("vae", tooltip="Decodes the pictures of both."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Latent.Input("latent_image", tooltip="Size and number of the pictures."),
                *sampling_inputs("seed", "Seed of the noise that both start from."),
            ],
            outputs=[
                io.Image.Output("image", tooltip="Reference, model and their difference, side by side."),
                text_output("SQNR of the result and of the model's own output, step by step."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        reference: Any,
        model: Any,
        vae: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
    ) -> io.NodeOutput:
        """Run the node."""
        with running(cls, "Comparing") as task:
            from ..native.capture import Sampling
            from ..native.comparing import compare_models
            from ..pairs import picture_pairs
            from ..texts import comparison_text

            sampling = Sampling(seed, steps, cfg, sampler_name, scheduler)
            comparison = compare_models(reference, model, positive, negative, latent_image, sampling, task)
            text = comparison_text(comparison)
            image = picture_pairs(vae, comparison)
        show_text(cls, text)
        return io.NodeOutput(image, text, ui=ui.PreviewImage(image, cls=cls))
