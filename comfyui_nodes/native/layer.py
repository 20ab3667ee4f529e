"""One quantized Linear or Conv2d in ComfyUI's module tree.

The integers live in a QuantLinear or QuantConv2d of diffusers_ldmq, which packs them for a backend, releases the codes
after packing and notices changes. ComfyUI must not see that layer, for it moves, counts and patches leaf modules with a
`weight` and a `bias`; so it is held outside of the module tree, and `weight` is made of it when somebody asks.
"""

from dataclasses import replace
from typing import Any

import comfy.ops
import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor, nn
from torch.nn import functional as F

from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.layers import QuantConv2d, QuantLinear
from diffusers_ldmq.packing import ordinary
from diffusers_ldmq.quantized_layer import QuantizedLayer
from diffusers_ldmq.specs import Geometry, LayerState, Scheme, parse_scheme

from .layouts import bits_of, requantized, wrap


class LDMQLayer(nn.Module, comfy.ops.CastWeightBiasOp):
    """A Linear (x: [..., K]) or Conv2d (x: [B, C, h, w]) of integers, as ComfyUI handles its own.

    state, geometry: as in diffusers_ldmq; dtype: of the float layer's weight, which `weight` reports. Raises LDMQError
    if they do not fit each other.

    `weight` is a Parameter around comfy-kitchen's QuantizedTensor in one of our layouts, `bias` a plain one; assigning
    either changes what the layer computes. A LoRA patched into `weight` is requantized to 8 bits, also in a 4-bit
    layer, where it would be smaller than half a step, and a layer with a static scheme then runs the dynamic one: its
    range was found without the LoRA. Once the weight from before is assigned again, the layer runs its own scheme with
    its own range, bit for bit as before.
    """

    def __init__(self, state: LayerState, geometry: Geometry, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []
        self._geometry, self._dtype, self._own_scheme, self._patched = geometry, dtype, state.scheme, False
        self._hold(hidden_layer(state, geometry))

    @property
    def scheme(self) -> Scheme:
        """What runs now: that of the plan, or `patched_scheme` of it while a LoRA is patched into the weight."""
        return self._hidden.scheme

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    @property
    def backend_name(self) -> str | None:
        """Name of the backend that runs the layer where it is now."""
        return self._hidden.backend_name

    def state(self) -> LayerState:
        """The layer as plain codes, with a LoRA in them if one is patched in now."""
        return self._hidden.state()

    @property
    def weight(self) -> nn.Parameter:
        """The codes as an nn.Parameter around a QuantizedTensor that shares them; unpacks them if they are packed."""
        self._hidden._restore()
        return nn.Parameter(self._wrapped(self._hidden._parameters["weight"]), requires_grad=False)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output in the input's dtype, on its device."""
        comfy.ops.run_every_op()
        if self.weight_function or self.bias_function:
            return self._with_functions(input)
        hidden = self._hidden
        if not torch.compiler.is_compiling() and self._device() != input.device:
            hidden = hidden_layer(hidden.state().to(input.device), self._geometry)
        return hidden(input)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """A weight of this layer as floats in the layer's own coordinates (ComfyUI's way to patch it)."""
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def set_weight(
        self,
        weight: Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **_: Any,
    ) -> Tensor | None:
        """Take over a float weight in the layer's own coordinates, or return it quantized (the inverse of
        `convert_weight`). Raises LDMQError for NaN or Inf, and for the in-place patches of LoRA hooks."""
        if inplace_update:
            raise LDMQError(
                "LoRA hooks change weights in place, which a quantized MODEL does not allow; use the Load LoRA node "
                "before or after LDM-Q Quantize instead"
            )
        new = self._quantized(weight)
        if return_weight:
            return new
        self.weight = new
        return None

    def extra_repr(self) -> str:
        return f"{list(self._geometry.shape)}, scheme={self.scheme.name}"

    def _hold(self, hidden: QuantizedLayer) -> None:
        self.__dict__["_hidden"] = hidden  # not through __setattr__, which would make it a child
        self._show()

    def _show(self) -> None:
        """Parameters for those who list them. The weight's codes are the hidden layer's own tensor and not an alias
        of it, so that they are released when it releases them."""
        codes = self._hidden._parameters["weight"]
        shown = nn.Parameter(self._wrapped(codes), requires_grad=False)
        shown._qdata = codes  # pyright: ignore[reportAttributeAccessIssue]
        self._parameters.update(weight=shown, bias=self._hidden._parameters["bias"])

    def _wrapped(self, codes: Tensor | None) -> QuantizedTensor:
        assert codes is not None
        return wrap(self._hidden._unrestored_state(), self._geometry.shape, self._dtype, codes.detach(), self._patched)

    def _device(self) -> torch.device:
        codes = self._hidden._parameters["weight"]
        assert codes is not None
        return codes.device

    def _quantized(self, weight: Tensor) -> QuantizedTensor:
        return requantized(weight, self._wrapped(self._hidden._parameters["weight"]), bits=8)

    def _with_functions(self, input: Tensor) -> Tensor:
        """As a float layer, with the weight that ComfyUI's functions make of ours (a LoRA on an offloaded layer)."""
        weight: Tensor = self.weight.to(input.device).dequantize().to(input.dtype)
        for function in self.weight_function:
            weight = function(weight)
        bias = self._parameters["bias"]
        if bias is not None:
            bias = bias.to(input.device, input.dtype)
            for function in self.bias_function:
                bias = function(bias)
        walk = self._geometry
        if not walk.is_conv:
            return F.linear(input, weight, bias)
        return F.conv2d(input, weight, bias, walk.stride, walk.padding, walk.dilation, walk.groups)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self._take_weight(value)
        elif name == "bias":
            self._adopt(replace(self._hidden.state(), bias=None if value is None else value.detach()))
        else:
            super().__setattr__(name, value)

    def _take_weight(self, weight: Tensor) -> None:
        if bits_of(weight) is None:
            if isinstance(weight, QuantizedTensor):
                raise LDMQError(f"a weight in the layout {weight._layout_cls} was given to a layer of LDM-Q")
            weight = self._quantized(weight)
        assert isinstance(weight, QuantizedTensor)
        if tuple(weight.shape) != tuple(self._geometry.shape):
            expected = list(self._geometry.shape)
            raise LDMQError(f"a weight of shape {list(weight.shape)} was given to a layer of shape {expected}")
        scheme = patched_scheme(self._own_scheme) if weight._params.patched else self._own_scheme
        held = replace(self._hidden._unrestored_state(), **self.__dict__.pop("_unused_range", {}))
        if held.input_scale is not None and not scheme.is_static:
            self.__dict__["_unused_range"] = {name: getattr(held, name) for name in ("input_scale", "input_zero_point")}
            held = replace(held, input_scale=None, input_zero_point=None)
        device = weight._qdata.device
        self._patched = weight._params.patched
        self._adopt(replace(held, scheme=scheme, weight=weight._qdata, weight_scale=weight._params.scale).to(device))

    def _adopt(self, state: LayerState) -> None:
        self._hidden.adopt(state)
        self._show()

    def _apply(self, fn: Any, recurse: bool = True) -> "LDMQLayer":
        with torch.inference_mode(False), torch.no_grad():
            self._hidden._apply(lambda tensor: ordinary(fn(tensor)), recurse)
            self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        self._show()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """`weight` as a QuantizedTensor, whose nbytes are true, and `bias`: the keys that a LoRA looks for."""
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        if (bias := self._parameters["bias"]) is not None:
            destination[prefix + "bias"] = bias if keep_vars else bias.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Takes what `state_dict` gives, or float tensors, which it quantizes."""
        for name in ("weight", "bias"):
            if (value := state_dict.get(prefix + name)) is not None:
                setattr(self, name, nn.Parameter(value.detach().clone(), requires_grad=False))

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy: what is only shown is made again."""
        return {**vars(self), "_parameters": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adopt(self._hidden.state())


def hidden_layer(state: LayerState, geometry: Geometry) -> QuantizedLayer:
    """The QuantLinear or QuantConv2d of diffusers_ldmq that runs a state, on the device that it is on. Shares the
    state's tensors, but for those made in inference mode, which it copies."""
    rows, bias = geometry.shape[0], state.bias is not None
    if geometry.is_conv:
        walk: dict[str, Any] = dict(stride=geometry.stride, padding=geometry.padding, dilation=geometry.dilation)
        size = (geometry.shape[2], geometry.shape[3])
        layer: QuantizedLayer = QuantConv2d(
            geometry.in_channels, rows, size, groups=geometry.groups, bias=bias, device="meta", **walk
        )
    else:
        layer = QuantLinear(geometry.in_channels, rows, bias=bias, device="meta")
    layer.load_state(state)
    return layer.eval()


def patched_scheme(scheme: Scheme) -> Scheme:
    """The scheme of a layer while a LoRA is patched into it: the weight in 8 bits; activations, where they are
    quantized, in 8 bits with a range for each input, for a range that was calibrated without the LoRA clips what it
    adds."""
    return parse_scheme("w8a16" if scheme.activation is None else "w8a8-dyn")
