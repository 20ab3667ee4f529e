"""LDM-Q Load model: a quantized MODEL from models/ldmq_models, or out of a quantized diffusers pipeline."""

from typing import Any

from comfy_api.latest import io

from ..files import MODELS, NO_FILE, existing, fingerprint, folder_fingerprint, listed, source
from ..running import Task, running, show_text
from ..sockets import schema, text_output


class LDMQLoadModel(io.ComfyNode):
    """A file, or a diffusers folder or hub id -> MODEL, text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What ComfyUI shows."""
        return schema(
            "ldmq_load_model",
            display_name="LDM-Q Load model",
            description="Load a quantized MODEL for KSampler, LoRA and ControlNet. No float copy of it is ever "
            "in memory. Load the text encoder and the VAE with the usual nodes.",
            search_aliases=["int8", "load checkpoint", "quantized model", "UNETLoader", "hugging face"],
            inputs=[
                io.Combo.Input(
                    "model_file",
                    options=[NO_FILE, *listed(MODELS)],
                    default=NO_FILE,
                    tooltip="A file in models/ldmq_models, written by LDM-Q Save model. Press R to refresh the list.",
                ),
                io.String.Input(
                    "folder_or_hub_id",
                    default="",
                    tooltip="Instead of a file: the folder or hub id (name/model) of a pipeline that LDM-Q quantized; "
                    "its denoiser is loaded.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The quantized MODEL."),
                text_output("What was loaded."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_file: str = NO_FILE, folder_or_hub_id: str = "") -> str:
        """Load again when the file or folder changes."""
        return fingerprint(MODELS, model_file) + folder_fingerprint(folder_or_hub_id)

    @classmethod
    def execute(cls, model_file: str, folder_or_hub_id: str) -> io.NodeOutput:
        """Run the node."""
        with running(cls, "Loading") as task:
            task.check()
            from ..native.patching import quantized_layers_of
            from ..texts import model_text

            model = _loaded(model_file, source(folder_or_hub_id), task)
            schemes = [layer.scheme.name for layer in quantized_layers_of(model).values()]
            text = model_text({name: schemes.count(name) for name in schemes}, model.model_size())
        show_text(cls, text)
        return io.NodeOutput(model, text)


def _loaded(model_file: str, folder_or_hub_id: str, progress: Task) -> Any:
    from diffusers_ldmq.errors import CheckpointError

    from ..native.denoiser_folders import load_denoiser
    from ..native.model_files import load_model

    if (model_file == NO_FILE) == (not folder_or_hub_id):
        found = "neither is" if model_file == NO_FILE else "both are"
        raise CheckpointError(
            f"of model_file and folder_or_hub_id {found} given; choose a file that LDM-Q Save model wrote, or name the "
            "folder or hub id of a quantized pipeline, and leave the other empty"
        )
    if model_file != NO_FILE:
        return load_model(existing(MODELS, model_file), progress)
    return load_denoiser(folder_or_hub_id, progress)
