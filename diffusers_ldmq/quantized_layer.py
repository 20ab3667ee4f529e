"""What QuantLinear and QuantConv2d share: nn.Linear and nn.Conv2d that hold integers once they have a state.

Real subclasses with the parents' constructors, because LoRA, offloading and layerwise casting pick layers by
class and peft builds new ones with `type(layer)(...)`. Before the first forward a layer holds plain codes;
then a backend packs them into its own form, the codes are released and `weight` becomes a stand-in of the
right shape, dtype and device that takes no memory. Whoever saves, copies or moves the layer gets the codes
back from the packed form.
"""

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .affine import dequantize_weight
from .backends import Backend, choose_backend
from .compiled import new_handle, run_compiled
from .errors import BackendError, LDMQError
from .gradient import autocast, straight_through
from .packing import Pack, check_codes, identity, is_current, is_stand_in, make_own, make_stand_in, ordinary
from .specs import Geometry, LayerState, Scheme, check_rotation, check_state, geometry_of, parse_scheme, tensor_specs

# bias before weight: pipelines read the dtype of a module's first parameter and must not find integers
PARAMETERS = ("bias", "weight")
# buffers, because model.dtype and offloading look at parameters
BUFFERS = ("weight_scale", "input_scale", "input_zero_point", "pre_quant_scale", "low_rank_a", "low_rank_b")
CAST = ("bias", "low_rank_a", "low_rank_b")
"""What follows .to(dtype); everything else only moves."""
_packing = threading.RLock()
L = TypeVar("L", bound="QuantizedLayer")


class QuantizedLayer(nn.Module):
    """What QuantLinear and QuantConv2d share. A plain float layer until a state is loaded."""

    _scheme: Scheme | None = None
    _rotation: int = 0
    _pack: Pack | None = None
    _handle: Tensor | None = None  # what stands for this layer in compiled graphs; None while it is float
    _requested_backend: str | None = None
    _low_memory: bool = False

    @classmethod
    def from_float(cls: type[L], layer: nn.Module, state: LayerState) -> L:
        """A quantized layer in place of `layer`: same device, training flag, hooks and attributes, weights
        from `state`. `layer` itself is not changed. Raises LDMQError if the two do not fit each other."""
        if not issubclass(cls, parent := _parent(layer)):
            raise LDMQError(f"{cls.__name__} cannot replace {type(layer).__name__}")
        if "forward" in vars(layer):
            raise LDMQError(
                f"a {parent.__name__} layer's forward is replaced (by an accelerate hook?); remove the hooks "
                "(pipe.remove_all_hooks()) before quantizing"
            )
        new = cls.__new__(cls)
        new.__dict__.update(layer.__dict__, _parameters=dict(layer._parameters), _buffers=dict(layer._buffers))
        new.load_state(state)
        return new

    @property
    def scheme(self) -> Scheme:
        return self._scheme or parse_scheme("float")

    @property
    def rotation(self) -> int:
        """Hadamard block size over input channels; 0 = none."""
        return self._rotation

    @property
    def rank(self) -> int:
        """Rank of the low-rank branch; 0 = none."""
        return 0 if (branch := self._buffers.get("low_rank_a")) is None else int(branch.shape[0])

    @property
    def geometry(self) -> Geometry:
        """Raises BackendError if the layer walks its input in a way that integer kernels do not know."""
        return geometry_of(self)

    @property
    def backend_name(self) -> str | None:
        """Name of the backend that runs this layer (or will); None while it is float."""
        if self._scheme is None:
            return None
        pack = self._pack
        return pack.backend.name if pack is not None else self._choose_backend().name

    def use_backend(self, name: str | None) -> None:
        """Run on the backend called `name`; None = the best one. Raises BackendError if it refuses."""
        self._restore()
        self._requested_backend = name
        if self._scheme is not None:
            self._choose_backend()

    def use_low_memory(self, on: bool) -> None:
        """Hold 4-bit weights in 4 bits while running, too: slower, with the same outputs."""
        self._restore()
        self._low_memory = on

    def prepare(self, scheme: Scheme, names: set[str] | frozenset[str], rotation: int = 0, rank: int = 0) -> None:
        """Give the layer empty tensors for a checkpoint's values, on the device it is on (also meta).

        names: those of the file, as in LayerState; rotation, rank: as there, too. Values are filled in by assignment
        or load_state_dict. Raises LDMQError if the scheme needs a tensor that is not named, for the name of one it
        cannot have, and for a rotation or rank that does not fit the layer.
        """
        check_rotation(rotation, self.geometry)
        specs = tensor_specs(scheme, self.geometry, rank)
        required = {name for name, spec in specs.items() if spec.required}
        if not required <= names <= set(specs):
            raise LDMQError(
                f"a {scheme.name} layer has tensors {', '.join(specs)} (always "
                f"{', '.join(sorted(required))}); found {', '.join(sorted(names)) or 'none'}"
            )
        weight = self._parameters["weight"]
        assert weight is not None
        floating = weight.dtype if weight.is_floating_point() else torch.float32
        made = {
            name: torch.empty(spec.shape, dtype=spec.dtype or floating, device=weight.device)
            for name, spec in specs.items()
            if name in names
        }
        self.adopt(LayerState(scheme, **made, rotation=rotation))

    def load_state(self, state: LayerState) -> None:
        """Take over a state; its tensors move to this layer's device unless that is meta.

        Raises LDMQError if a tensor is missing or its shape or dtype is not what the scheme asks for.
        """
        check_state(state, self.geometry)
        device = next(p.device for p in self._parameters.values() if p is not None)
        self.adopt(state if device.type == "meta" else state.to(device))

    def state(self) -> LayerState:
        """What the layer holds, as plain codes. Raises LDMQError if it is a float layer."""
        return replace(self._unrestored_state(), weight=self._codes())

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The float layer that this one stands for. dtype: the weight's; None = the bias' or fp32."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Output in the input's dtype, under autocast in its dtype. input: float [..., K] or [B, C, h, w].

        Gradients reach the input straight through the rounding; the integers themselves get none.
        """
        handle = self._handle
        if handle is None:
            return super().forward(input)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self.forward(autocast(input))
        if torch.compiler.is_compiling():
            return run_compiled(input, handle, self.geometry)
        if input.requires_grad and torch.is_grad_enabled():
            return straight_through(input, self._run, self._own_weight, self.geometry)
        return self._run(input)

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        return shown if self._scheme is None else f"{shown}, scheme={self._scheme.name}, backend={self.backend_name}"

    def _own_weight(self) -> Tensor:
        return dequantize_weight(self.state(), torch.Size(self.geometry.shape))

    def _run(self, x: Tensor) -> Tensor:
        pack = self._pack
        if pack is None or pack.device != x.device or not is_current(pack, self._parameters, self._buffers):
            pack = self._packed_for(x)
        return pack.backend.run(x, pack.data)

    def _packed_for(self, x: Tensor) -> Pack:
        # what is made in inference mode could not be changed or differentiated through later
        with _packing, torch.inference_mode(False), torch.no_grad():
            self._restore()
            weight = self._parameters["weight"]
            assert weight is not None
            if weight.device != x.device:
                raise BackendError(f"a quantized layer on {weight.device} was given an input on {x.device}")
            check_codes(weight)
            make_own(self._held(), self._parameters, self._buffers)
            weight = self._parameters["weight"]
            assert weight is not None
            state, backend = self._unrestored_state(), self._choose_backend()
            data = backend.pack(state, self.geometry, self._low_memory)
            stand_in = make_stand_in(weight)
            weight.data = stand_in.expand(weight.shape)
            held = self._held()
            made_of = tuple(identity(name, held.get(name)) for name in PARAMETERS + BUFFERS)
            self._pack = Pack(backend, data, x.device, stand_in, made_of)
            return self._pack

    def _choose_backend(self) -> Backend:
        state = self._unrestored_state()
        return choose_backend(state, self.geometry, state.weight.device, self._requested_backend)

    def adopt(self, state: LayerState) -> None:
        """Take over a state as it is, unchecked; its tensors may be on meta until a loader fills them."""
        self._pack = None
        self._scheme, self._rotation = state.scheme, state.rotation
        self._handle = new_handle(self)
        with torch.inference_mode(False):
            held = {name: ordinary(tensor.detach()) for name, tensor in state.tensors().items()}
            for name in PARAMETERS:
                self._parameters.pop(name, None)
                value = held.get(name)
                self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))
            for name in BUFFERS:
                self._buffers.pop(name, None)
                if name in held:
                    self.register_buffer(name, held[name])

    def _unrestored_state(self) -> LayerState:
        """The state, whose weight may be the stand-in."""
        if self._scheme is None:
            raise LDMQError("this layer is not quantized; it has no LayerState")
        held = {name: tensor.detach() for name, tensor in self._held().items()}
        return LayerState(self._scheme, **held, rotation=self._rotation)

    def _held(self) -> dict[str, Tensor]:
        """Every tensor that is there, by name."""
        found = {name: self._parameters.get(name, self._buffers.get(name)) for name in PARAMETERS + BUFFERS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _codes(self) -> Tensor:
        """The weight codes on the weight's device, wherever they are now."""
        weight = self._parameters["weight"]
        assert weight is not None
        pack = self._pack
        if pack is None or weight.is_meta or not is_stand_in(weight, pack):
            return weight.detach()
        return pack.backend.unpack(pack.data).to(weight.device)

    def _restore(self) -> None:
        """Back to plain codes; nothing to do where they were never packed."""
        with _packing, torch.inference_mode(False), torch.no_grad():
            if self._pack is not None:
                weight = self._parameters["weight"]
                assert weight is not None
                weight.data = self._codes()
                self._pack = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._pack is not None:
            destination[prefix + "weight"] = self._codes()

    def _load_from_state_dict(  # noqa: PLR0913 (nn.Module's signature)
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._restore()
        weight, given = self._parameters["weight"], state_dict.get(prefix + "weight")
        if self._scheme is not None and weight is not None and given is not None and given.dtype != weight.dtype:
            # copy_ would cast and truncate without a word
            error_msgs.append(f"{prefix}weight: {weight.dtype} codes expected, found {given.dtype}; quantize it first")
            return
        lists = (missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As nn.Module, but integers and scales only move; they keep their dtype."""
        if self._scheme is None:
            return super()._apply(fn, recurse)
        self._restore()
        before = self._unrestored_state().tensors()
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = getattr(self, name)
            # files want contiguous codes, and .to(memory_format=channels_last) would reorder them
            if name not in CAST and (now.dtype != tensor.dtype or not now.is_contiguous()):
                moved = tensor.to(now.device)
                setattr(self, name, nn.Parameter(moved, requires_grad=False) if name == "weight" else moved)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: a packed tensor survives neither, the codes do."""
        state = dict(vars(self))
        state.pop("_handle", None)
        if self._pack is not None:
            weight = nn.Parameter(self._codes(), requires_grad=False)
            state.update(_pack=None, _parameters={**self._parameters, "weight": weight})
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._scheme is not None:
            self._handle = new_handle(self)


def _parent(layer: nn.Module) -> type[nn.Module]:
    return nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
