"""Tiny float denoisers of five classes in folders, and the same quantized while they are loaded: what
`test_quantizer_list` and `test_offloading` share."""

import functools
import inspect
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_pipelines import INPUTS, MAKERS
from torch import Tensor, nn

from diffusers_ldmq import LDMQConfig
from diffusers_ldmq.families import find_denoiser
from diffusers_ldmq.recording import generators

KINDS = ("sd", "ddim", "dit", "sd3", "flux")
"""UNet2DConditionModel, UNet2DModel, DiT, SD3 and Flux transformers."""
SCHEMES = ("w8a16", "w8a8-dyn", "w4a16", "w4a16-g8")
"""Every data-free scheme."""
FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Model:
    """A float denoiser: its class, the folder it is saved in, and one call that its pipeline makes."""

    kind: Any
    folder: Path
    inputs: dict[str, Any]

    def float(self, **options: Any) -> Any:
        """Freshly loaded."""
        return self.kind.from_pretrained(self.folder, **options)

    def quantized(self, plan: Any = "w8a16", keep: Any = None, **options: Any) -> Any:
        """Freshly loaded and quantized meanwhile."""
        return self.float(quantization_config=LDMQConfig(plan, keep), **options)

    def call(self, model: nn.Module) -> Tensor:
        """The model's output for `inputs`, cast to its dtype."""
        with torch.no_grad():
            return model(**self.cast(model), return_dict=False)[0]

    def cast(self, model: nn.Module) -> dict[str, Any]:
        """`inputs` in the model's floating dtype, but timesteps."""
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        made = dict(self.inputs)
        for name, value in self.inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
                made[name] = value.to(dtype)
        return made


class _Called(Exception):  # noqa: N818  (a signal, not an error)
    """Ends the pipeline call: its first denoiser call was seen."""


@functools.cache
def model(name: str) -> Model:
    """The denoiser of the tiny pipeline called so."""
    pipe = MAKERS[name]()
    denoiser: Any = find_denoiser(pipe)[1]
    folder = Path(_scratch().name) / name
    denoiser.save_pretrained(folder)
    return Model(type(denoiser), folder, _first_call(pipe, denoiser, name))


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="quantized-models-")


def _first_call(pipe: Any, denoiser: nn.Module, name: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    signature = inspect.signature(denoiser.forward)

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(signature.bind(*args, **kwargs).arguments)
        raise _Called

    hook = denoiser.register_forward_pre_hook(see, with_kwargs=True)
    try:
        pipe(**INPUTS[name][0], generator=generators(0, 2))
    except _Called:
        hook.remove()
    seen.pop("return_dict", None)
    return seen
