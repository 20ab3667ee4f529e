"""LDM-Q Pipeline save: a pipeline as a diffusers folder of models/ldmq_pipelines."""

from typing import Any

from comfy_api.latest import io

from ..files import PIPELINES, name_answer, new_file
from ..running import running, show_text
from ..sockets import PIPELINE, schema, text_output


class LDMQPipelineSave(io.ComfyNode):
    """PIPELINE -> a folder, text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What ComfyUI shows."""
        return schema(
            "ldmq_pipeline_save",
            display_name="LDM-Q Pipeline save",
            description="Save a pipeline as an ordinary diffusers folder in models/ldmq_pipelines, where LDM-Q "
            "Pipeline loader lists it. It opens in Python and can be pushed to the hub; the U-Net "
            "of an SD 1.5, SD 2 or SDXL pipeline also opens in LDM-Q Load model.",
            search_aliases=["diffusers", "save pretrained", "export pipeline", "hugging face"],
            inputs=[
                PIPELINE.Input("pipeline", tooltip="From LDM-Q Pipeline loader; usually a quantized one."),
                io.String.Input(
                    "filename_prefix",
                    default="my-pipeline-ldmq",
                    tooltip="Name of the folder in models/ldmq_pipelines; sd15/name makes a subfolder. A number is "
                    "added, so nothing is overwritten.",
                ),
            ],
            outputs=[text_output("Where the pipeline was saved, and how large it is.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        """Refuse a name that leaves the folder before anything runs."""
        return name_answer(filename_prefix)

    @classmethod
    def execute(cls, pipeline: Any, filename_prefix: str) -> io.NodeOutput:
        """Run the node."""
        with running(cls, "Saving") as task:
            from ..pipelines import is_quantized, save

            task(0, 1)
            folder = new_file(PIPELINES, filename_prefix)
            save(pipeline, folder, task)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            text = f"Saved as {folder.name} in {folder.parent} ({size / 1e6:.1f} MB)."
            text += "" if is_quantized(pipeline) else " It is not quantized: an ordinary float pipeline."
        show_text(cls, text)
        return io.NodeOutput(text)
