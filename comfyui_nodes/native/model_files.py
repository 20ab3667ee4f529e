"""LDM-Q Save model and LDM-Q Load model: a quantized MODEL as a file of our own, and back."""

import os
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.manifest import OPTIONAL
from diffusers_ldmq.progress import Progress
from diffusers_ldmq.quantization import STORAGE_DTYPE, fits_storage
from diffusers_ldmq.specs import LayerState

from .file_writer import Entry, entry, parts, write_tensors
from .guarding import KEY
from .layer import LDMQLayer
from .model_format import DTYPES, PREFIX, Description, read_model
from .operations import as_module_tensors, build_model
from .patching import quantized_layers_of
from .sampling_patches import LOST, own_sampling, sampling_of


def save_model(model: Any, path: str | os.PathLike[str], progress: Progress | None = None) -> str:
    """Write the denoiser of a quantized MODEL, complete or not at all; LoRAs on it become part of its integers. What is
    on the MODEL and not in the file, in words; empty if nothing is.

    What is not quantized is stored in 16 bits (values that do not fit there in 32). Raises LDMQError if the MODEL is
    not quantized, OutputError if the file cannot be written.
    """
    layers = quantized_layers_of(model)
    if not layers:
        raise LDMQError(
            "this MODEL is not quantized: put LDM-Q Quantize before LDM-Q Save model, or write a float model with the "
            "stock Save Checkpoint node"
        )
    load_patched(model)
    floats = float_tensors(model, layers)
    entries = [entry(PREFIX + name, stored(value)) for name, value in floats.items()]
    manifest: dict[str, Any] = {}
    looking, writing = parts(progress, len(layers))
    for done, (name, layer) in enumerate(layers.items()):
        state = layer.state()
        manifest[name] = _manifest(state)
        entries.extend(_entries(name, layer, state))
        looking(done + 1, len(layers))
    description = _description(model, layers, manifest, tuple(sorted(floats)))
    write_tensors(path, entries, description.metadata(), writing)
    return "" if sampling_of(model) else LOST.format(loader="LDM-Q Load model")


def load_patched(model: Any) -> None:
    """Bring the MODEL's own layers into the module tree that all its clones share, with its LoRAs worked into the
    weights also of layers that are offloaded."""
    clone = model.clone()
    clone.remove_callbacks_with_key(CallbacksMP.ON_LOAD, KEY)  # the guard against stock nodes that do the same
    comfy.model_management.load_models_gpu([clone], force_patch_weights=True)


def float_tensors(model: Any, layers: dict[str, LDMQLayer]) -> dict[str, Tensor]:
    """Every tensor of the loaded denoiser that belongs to none of the quantized layers, as it is in the module."""
    found = model.model.diffusion_model.state_dict()
    return {name: value for name, value in found.items() if name.rpartition(".")[0] not in layers}


def stored(value: Tensor) -> Tensor:
    """A float tensor as files hold it: in 16 bits where its magnitude allows."""
    if not value.is_floating_point() or value.dtype.itemsize <= STORAGE_DTYPE.itemsize or not fits_storage(value):
        return value
    return value.detach().to(STORAGE_DTYPE)


def _entries(name: str, layer: LDMQLayer, state: LayerState) -> Iterator[Entry]:
    """The layer's tensors; its codes are taken out of their packed form once more when their turn to be written comes,
    so that those of all layers are never in memory at once."""
    for leaf, value in state.tensors().items():
        if leaf == "weight":
            yield Entry(f"{PREFIX}{name}.weight", value.dtype, tuple(value.shape), lambda: layer.state().weight)
        else:
            yield entry(f"{PREFIX}{name}.{leaf}", value if leaf.endswith("_scale") else stored(value))


def _manifest(state: LayerState) -> dict[str, Any]:
    found: dict[str, Any] = {"scheme": state.scheme.name, "tensors": sorted(state.tensors())}
    return found | {key: value for key in OPTIONAL if (value := getattr(state, key))}


def _description(
    model: Any, layers: dict[str, LDMQLayer], manifest: dict[str, Any], floats: tuple[str, ...]
) -> Description:
    base = model.model
    model_type, sampling = sampling_of(model) or own_sampling(model)
    dtype = base.get_dtype()
    return Description(
        layers=manifest,
        shapes={name: tuple(layer.geometry.shape) for name, layer in layers.items()},
        floats=floats,
        dtype=str(dtype if dtype in DTYPES.values() else torch.float32).removeprefix("torch."),
        model_type=model_type,
        sampling=sampling,
    )


def load_model(path: str | os.PathLike[str], progress: Progress | None = None) -> Any:
    """The MODEL (ModelPatcher) in a file that `save_model` wrote: its integers are used as they are.

    Raises CheckpointError naming the file for one that is not complete and sound, is none of ours, or holds a model
    that ComfyUI does not know.
    """
    with as_module_tensors():
        content = read_model(path, progress)
        model = build_model(content)
    model.cached_patcher_init = (reload_model, (os.fspath(path),))
    return model


def reload_model(path: str, disable_dynamic: bool = False) -> Any:
    """The same MODEL once more: how ComfyUI's nodes for compiling and several GPUs get one of their own. Its weights
    are never streamed, whatever `disable_dynamic` asks for."""
    return load_model(path)
