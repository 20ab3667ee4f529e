"""LDM-Q Export: a quantized MODEL as a file that ComfyUI loads without this pack."""

from typing import Any

from comfy_api.latest import io

from ..files import STOCK_MODELS, name_answer, new_file
from ..running import running, show_text
from ..sockets import accepted, schema, text_output


class LDMQExport(io.ComfyNode):
    """MODEL -> a file of models/diffusion_models, text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What ComfyUI shows."""
        return schema(
            "ldmq_export",
            display_name="LDM-Q Export",
            description="Write a quantized MODEL as a file for ComfyUI's own Load Diffusion Model (0.27 or newer), "
            "which needs no LDM-Q. Linear layers of 8 bits stay 8 bits, all others, convolutions among them, become "
            "16-bit floats: small for SDXL and transformers, less so for SD 1.5.",
            search_aliases=["int8_tensorwise", "save diffusion model", "share", "stock loader"],
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from LDM-Q Quantize or LDM-Q Load model."),
                io.String.Input(
                    "filename_prefix",
                    default="my-model-int8",
                    tooltip="Name of the file in models/diffusion_models; sd15/name makes a subfolder. A number is "
                    "added.",
                ),
                accepted(
                    io.Boolean.Input,
                    "overwrite",
                    default=False,
                    advanced=True,
                    tooltip="Write exactly this name, in place of a file that has it, instead of adding a number.",
                ),
            ],
            outputs=[text_output("Where the file is, and how each kind of layer was written.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        """Refuse a name that leaves the folder before anything runs."""
        return name_answer(filename_prefix)

    @classmethod
    def execute(cls, model: Any, filename_prefix: str, overwrite: bool) -> io.NodeOutput:
        """Run the node."""
        with running(cls, "Exporting") as task:
            from ..native.export import export_model

            path = new_file(STOCK_MODELS, filename_prefix, overwrite=overwrite)
            told = export_model(model, path, task)
            text = f"Written as {path.name} in {path.parent} ({path.stat().st_size / 1e6:.1f} MB).\n{told}"
        show_text(cls, text)
        return io.NodeOutput(text)
