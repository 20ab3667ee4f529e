"""What is reconstructed together, in the order in which it runs, and what a run gives it and gets from it.

A unit is a module that its family names (a resnet, a transformer block, an attention), or a single layer outside of
those (EDA-DM, arXiv 2401.04585; the blocks are BRECQ's, arXiv 2102.05426).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .artifacts import TOGETHER
from .calls import Batch, flatten, run
from .errors import CalibrationError
from .families import family_of
from .quantization import replace_layer


@dataclass(frozen=True, slots=True)
class Unit:
    """name: of the module in the denoiser, '' = the denoiser itself; layers: full names of its quantized layers, as it
    registers them."""

    name: str
    layers: tuple[str, ...]

    @property
    def label(self) -> str:
        """What people are told: the denoiser itself has no name in itself."""
        return self.name or TOGETHER

    @property
    def is_layer(self) -> bool:
        """True where the unit is a single layer, not a block."""
        return self.layers == (self.name,)


@dataclass(frozen=True, slots=True)
class Seen:
    """One call of a unit: its arguments and outputs by path, and its layers' outputs by name (first call of each)."""

    arguments: dict[str, Any]
    outputs: dict[str, Tensor]
    layers: dict[str, Tensor]


class _Reached(Exception):  # noqa: N818  (a signal, not an error)
    """Ends a run whose later modules nobody needs."""


def find_units(denoiser: nn.Module, quantized: Iterable[str], batch: Batch) -> tuple[Unit, ...]:
    """The units that hold the quantized layers, in the order in which a run over `batch` first calls them.

    Raises CalibrationError for a unit that the run never calls.
    """
    names, left = set(quantized), set(quantized)
    classes = family_of(denoiser).units
    found: list[Unit] = []
    for name, module in denoiser.named_modules():
        inside = tuple(f"{name}.{child}" for child, _ in module.named_modules() if f"{name}.{child}" in left)
        if any(cls.__name__ in classes for cls in type(module).__mro__) and inside:
            found.append(Unit(name, inside))
            left.difference_update(inside)
    found += [Unit(name, (name,)) for name in left]
    order = _call_order(denoiser, [unit.name for unit in found], batch)
    never = [unit.name for unit in found if unit.name not in order]
    if never:
        raise CalibrationError(
            f"{never[0]!r} was never called while recording ({len(never)} such units of {len(names)} quantized "
            f"layers), so it cannot be reconstructed; keep it float"
        )
    return tuple(sorted(found, key=lambda unit: order[unit.name]))


def _call_order(denoiser: nn.Module, names: list[str], batch: Batch) -> dict[str, int]:
    order: dict[str, int] = {}

    def noting(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            order.setdefault(name, len(order))

        return note

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(_removed(denoiser.get_submodule(name).register_forward_pre_hook(noting(name))))
        run(denoiser, batch)
    return order


@contextmanager
def in_place(denoiser: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The denoiser with these layers in their places; what was there comes back when the context ends."""
    before = {name: denoiser.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            replace_layer(denoiser, name, layer)
        yield
    finally:
        for name, layer in before.items():
            replace_layer(denoiser, name, layer)


def watch(denoiser: nn.Module, units: Sequence[Unit], batch: Batch) -> dict[str, Seen]:
    """What the units, given in execution order, are given and give in a run over `batch`, which ends after the last."""
    seen = {unit.name: Seen({}, {}, {}) for unit in units}
    last = units[-1].name

    def before(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not seen[name].arguments:  # of a unit that is called again the first call counts, everywhere
                seen[name].arguments.update({p: _kept(value) for p, value in flatten_call(args, kwargs).items()})

        return note

    def after(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not seen[name].outputs:
                seen[name].outputs.update({path: _kept(value) for path, value in output_tensors(output).items()})
            if name == last:
                raise _Reached

        return note

    with ExitStack() as hooks:
        for unit in units:
            module = denoiser.get_submodule(unit.name)
            hooks.enter_context(_removed(module.register_forward_pre_hook(before(unit.name), with_kwargs=True)))
            for name in unit.layers:
                noting = _noting(seen[unit.name].layers, name)
                hooks.enter_context(_removed(denoiser.get_submodule(name).register_forward_hook(noting)))
            hooks.enter_context(_removed(module.register_forward_hook(after(unit.name))))
        _run_until_reached(denoiser, batch)
    return seen


def row_bytes(denoiser: nn.Module, units: Sequence[Unit], batch: Batch) -> dict[str, int]:
    """Bytes that each unit's arguments, outputs and layers' outputs take in a run over `batch`."""
    found = {unit.name: 0 for unit in units}

    def noting(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensors = [*flatten_call(args, kwargs).values(), *output_tensors(output).values()]
            found[name] += sum(value.nbytes for value in tensors if isinstance(value, Tensor))

        return note

    with ExitStack() as hooks:
        for unit in units:
            for name in {unit.name, *unit.layers}:
                module = denoiser.get_submodule(name)
                hooks.enter_context(_removed(module.register_forward_hook(noting(unit.name), with_kwargs=True)))
        run(denoiser, batch)
    return found


def watch_arguments(denoiser: nn.Module, unit: Unit, batch: Batch) -> dict[str, Any]:
    """The arguments by path that the unit is given in a run over `batch`, which ends there."""
    found: dict[str, Any] = {}

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update({path: _kept(value) for path, value in flatten_call(args, kwargs).items()})
        raise _Reached

    with _removed(denoiser.get_submodule(unit.name).register_forward_pre_hook(note, with_kwargs=True)):
        _run_until_reached(denoiser, batch)
    return found


def _run_until_reached(denoiser: nn.Module, batch: Batch) -> None:
    with suppress(_Reached):
        run(denoiser, batch)


@contextmanager
def hooked(denoiser: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """The denoiser with a forward hook on each named module while the context is open."""
    with ExitStack() as stack:
        for name, hook in hooks.items():
            stack.enter_context(_removed(denoiser.get_submodule(name).register_forward_hook(hook)))
        yield


@contextmanager
def _removed(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _noting(layers: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def note(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        layers.setdefault(name, _kept(output))

    return note


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def output_tensors(output: Any) -> dict[str, Tensor]:
    """A module's outputs by path; '' is that of a module with a single one."""
    flat = flatten(output) if isinstance(output, (tuple, list, dict)) else {"": output}
    return {path: value for path, value in flat.items() if isinstance(value, Tensor)}


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by path, positions as '#0', '#1', ..."""
    return flatten({**{f"#{i}": value for i, value in enumerate(args)}, **kwargs})
