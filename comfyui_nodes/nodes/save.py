"""LDM-Q Save model: a quantized MODEL as a file of models/ldmq_models."""

from typing import Any

from comfy_api.latest import io

from ..files import MODELS, name_answer, new_file
from ..running import running, show_text
from ..sockets import accepted, schema, text_output


class LDMQSaveModel(io.ComfyNode):
    """MODEL -> a file, text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What ComfyUI shows."""
        return schema(
            "ldmq_save_model",
            display_name="LDM-Q Save model",
            description="Save a quantized MODEL in models/ldmq_models, for LDM-Q Load model. Only the denoiser is "
            "saved: no text encoder, no VAE. LoRAs on the model are baked in.",
            search_aliases=["int8", "save checkpoint", "quantized model"],
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from LDM-Q Quantize or LDM-Q Load model."),
                io.String.Input(
                    "filename_prefix",
                    default="my-model-ldmq",
                    tooltip="Name of the file in models/ldmq_models; sd15/name makes a subfolder. A number is added.",
                ),
                accepted(
                    io.Boolean.Input,
                    "overwrite",
                    default=False,
                    advanced=True,
                    tooltip="Write exactly this name, in place of a file that has it, instead of adding a number.",
                ),
            ],
            outputs=[text_output("Where the model was saved, and how large it is.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        """Refuse a name that leaves the folder before anything runs."""
        return name_answer(filename_prefix)

    @classmethod
    def execute(cls, model: Any, filename_prefix: str, overwrite: bool) -> io.NodeOutput:
        """Run the node."""
        with running(cls, "Saving") as task:
            from ..native.model_files import save_model

            path = new_file(MODELS, filename_prefix, overwrite=overwrite)
            told = save_model(model, path, task)
            text = f"Saved as {path.name} in {path.parent} ({path.stat().st_size / 1e6:.1f} MB).\n{told}".rstrip()
        show_text(cls, text)
        return io.NodeOutput(text)
