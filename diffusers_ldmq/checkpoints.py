"""What a model's folder or hub repository holds, before anything of it is loaded."""

import inspect
import os
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .artifacts import Plan, Profile, Report
from .config import NAME
from .demo import MODEL, demo_model
from .errors import CheckpointError, LDMQError
from .families import FAMILIES
from .hub_errors import HUB_ERRORS, hub_failure, is_missing_file
from .serialization import read_json

SIDE_FILES: dict[str, Any] = {"plan": Plan, "report": Report, "profile": Profile}
"""What stands beside the components in a folder that `save_pipeline` wrote."""


def known(model: str | os.PathLike[str]) -> str:
    """The model's name, the bundled model's folder for its word. Raises LDMQError unless it is a pipeline folder or
    looks like a hub id."""
    if not isinstance(model, (str, os.PathLike)):
        raise LDMQError(
            f"the model is of type {type(model).__name__}, expected a local pipeline folder or a hub id such as "
            f"owner/name; a pipeline in memory is for from_pipe"
        )
    text = os.fspath(model)
    if text == MODEL and not Path(text).exists():
        return os.fspath(demo_model())
    path = Path(text)
    if os.path.exists(path):  # unlike Path.exists, of a name too long for the file system as well
        if not (path / "model_index.json").is_file():
            raise LDMQError(f"{text}: is no diffusers pipeline folder (it has no model_index.json)")
    elif text.startswith((".", "/", "~")) or text.count("/") != 1 or "\\" in text:
        raise LDMQError(f"{text}: no such folder; give a local pipeline folder or a hub id such as owner/name")
    return text


HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
"""What says which files of the hub are meant: diffusers takes them too."""


LOADING_OPTIONS = (
    *HUB_OPTIONS,
    *("custom_pipeline", "custom_revision", "device_map", "disable_mmap", "load_connected_pipeline"),
    *("low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict", "quantization_config"),
    *("trust_remote_code", "use_safetensors", "variant"),
)
"""Keywords of DiffusionPipeline.from_pretrained that are no components."""


SAVING_OPTIONS = ("safe_serialization", "variant", "max_shard_size", "use_flashpack")
"""Keywords of the pipelines' own save_pretrained."""


def refuse_unknown(model: str | os.PathLike[str], options: dict[str, Any], **hub: Any) -> None:
    """Raise LDMQError for a keyword that is neither an option of loading nor a component or option of the pipeline's
    class: diffusers would ignore it."""
    index = _index(known(model), hub)
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    taken = {*index, *LOADING_OPTIONS, *(inspect.signature(kind.__init__).parameters if kind else ())}
    for name in options:
        if name not in taken:
            raise LDMQError(
                f"from_pretrained takes no keyword {name!r}: it is no option of loading or quantizing, and {model} has "
                f"no such component; it has {', '.join(component_names(model, **hub))}"
            )


def component_names(model: str | os.PathLike[str], **hub: Any) -> list[str]:
    """Names of the components that the model's model_index.json lists, in order. hub: of HUB_OPTIONS."""
    return sorted(name for name, kind in _index(known(model), hub).items() if isinstance(kind, list))


def _index(model: str, hub: dict[str, Any]) -> dict[str, Any]:
    path = _file(model, "model_index.json", hub)
    data = read_json(path, CheckpointError) if path else {}
    return data if isinstance(data, dict) else {}


def components_of(model: str | os.PathLike[str], **hub: Any) -> dict[str, Any]:
    """Component -> [library, class] of a pipeline. hub: of HUB_OPTIONS."""
    index = _index(known(model), hub)
    return {name: entry for name, entry in index.items() if isinstance(entry, list)}


def stored_config(model: str | os.PathLike[str], **hub: Any) -> dict[str, Any] | None:
    """The denoiser's quantization_config of a checkpoint of ours; None for a float model. hub: of HUB_OPTIONS.

    Raises LDMQError if there is no such model.
    """
    found = _quantized_component(known(model), hub)
    return found[1] if found else None


def stored_denoiser(folder: str | os.PathLike[str]) -> tuple[str, str, dict[str, Any]]:
    """(pipeline's class name, denoiser's name in it, its quantization_config) of a checkpoint folder of ours.

    Raises LDMQError if it is none.
    """
    if not Path(folder).is_dir():
        raise LDMQError(f"{folder}: no such folder; give one that `ldmq quantize` or save_pretrained wrote")
    found, index = _quantized_component(known(folder), {}), _index(os.fspath(folder), {})
    if found is None:
        raise LDMQError(f"{folder}: is a float pipeline; quantize it first with `ldmq quantize`")
    return str(index.get("_class_name")), *found


def quantized_components(folder: str | os.PathLike[str]) -> list[str]:
    """Names of every part of a pipeline folder that is quantized by us."""
    return [name for name in _index(os.fspath(folder), {}) if _config(os.fspath(folder), name, {}) is not None]


def _quantized_component(model: str, hub: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(name, quantization_config) of the denoiser if it is quantized by us."""
    for component in {name for _, family in FAMILIES.items() for name in family.components} & set(_index(model, hub)):
        config = _config(model, component, hub)
        if config is not None:
            return component, config
    return None


def _config(model: str, component: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    """A component's quantization_config if it is ours."""
    path = _file(model, f"{component}/config.json", hub)
    data = read_json(path, CheckpointError) if path else {}
    config = data.get("quantization_config") if isinstance(data, dict) else None
    if config is not None and not isinstance(config, dict):
        raise CheckpointError(
            f"{model}: {component}/config.json has a quantization_config that is a {type(config).__name__}, expected "
            f"an object; the file is damaged"
        )
    return config if config is not None and config.get("quant_method") == NAME else None


def is_hub_id(text: str) -> bool:
    """True for owner/name that is no folder here."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1 and not Path(text).exists()


def side_files(model: str | os.PathLike[str], **hub: Any) -> dict[str, Any]:
    """Plan, report and profile that stand beside the components; None for what is not there. hub: of HUB_OPTIONS."""
    paths = {name: _file(model, f"{name}.json", hub) for name in SIDE_FILES}
    return {name: SIDE_FILES[name].load(path) if path else None for name, path in paths.items()}


def _file(model: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> Path | None:
    """A file of a local folder or a hub repository; None if it has none."""
    if os.path.exists(model):
        path = Path(model) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(os.fspath(model), name, **hub))
    except HUB_ERRORS as cause:
        if is_missing_file(cause):
            return None
        raise hub_failure(os.fspath(model), cause) from cause


def original_name(model: str | os.PathLike[str], **hub: Any) -> str:
    """Of what a checkpoint was made; '' where that is not stored. hub: of HUB_OPTIONS."""
    return str(_index(os.fspath(model), hub).get("_name_or_path") or "")
