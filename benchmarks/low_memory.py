"""What low_memory costs a layer and what it saves: layers of Stable Diffusion 1.5 (batch 2, 64 x 64 latents), one of
each common shape, with 4-bit weights unpacked once or in every call. Random weights; fastest of the interleaved rounds.

    python benchmarks/low_memory.py [--rounds 5]
"""

import time
from dataclasses import fields, is_dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from diffusers_ldmq.backends import choose_backend, fast_dtype
from diffusers_ldmq.specs import LayerState, geometry_of, parse_scheme

CONVS = ((320, 320, 64), (640, 640, 32), (1280, 1280, 16), (1280, 1280, 8), (2560, 1280, 8))
LINEARS = (
    (8192, 320, 320),
    (2048, 640, 640),
    (512, 1280, 1280),
    (512, 1280, 10240),
    (512, 5120, 1280),
    (154, 768, 1280),
)
SCHEMES = ("w4a8", "w4a16", "w4a16-g64")


def cases() -> dict[str, tuple[nn.Linear | nn.Conv2d, Tensor]]:
    """Float layers (without values) and inputs."""
    found: dict[str, tuple[nn.Linear | nn.Conv2d, Tensor]] = {}
    for given, out, size in CONVS:
        x = torch.randn(2, given, size, size).contiguous(memory_format=torch.channels_last)
        found[f"conv 3x3 {given} to {out}, {size}x{size}"] = nn.Conv2d(given, out, 3, padding=1, device="meta"), x
    for rows, given, out in LINEARS:
        found[f"linear {given} to {out}, {rows} rows"] = nn.Linear(given, out, device="meta"), torch.randn(rows, given)
    return found


def state(layer: nn.Linear | nn.Conv2d, name: str) -> LayerState:
    scheme, geometry = parse_scheme(name), geometry_of(layer)
    assert scheme.weight is not None
    rows, columns, group = geometry.shape[0], geometry.columns, scheme.weight.group_size
    weight = torch.randint(0, 256, (rows, -(-columns // 2)), dtype=torch.uint8)
    scale = torch.full((rows, -(-columns // group)) if group else (rows,), 0.01)
    static = (torch.tensor(0.03), torch.tensor(-5, dtype=torch.int32)) if scheme.is_static else (None, None)
    return LayerState(scheme, weight, scale, torch.zeros(rows), *static)


def held(packed: Any) -> int:
    """Bytes of the tensors in a packed layer."""
    if isinstance(packed, Tensor):
        return packed.numel() * packed.element_size()
    return sum(held(getattr(packed, f.name)) for f in fields(packed)) if is_dataclass(packed) else 0


def main(rounds: Annotated[int, typer.Option(min=1)] = 5) -> None:
    """Print the table."""
    shown = Table("layer", "scheme", "once ms", "in every call ms", "ratio", "MB", "MB with low_memory")
    totals = {scheme: [0.0, 0.0] for scheme in SCHEMES}
    for name, (layer, x) in cases().items():
        for scheme in SCHEMES:
            made, geometry, given = state(layer, scheme), geometry_of(layer), x.to(fast_dtype("cpu"))
            backend = choose_backend(made, geometry, x.device)
            packs = [backend.pack(made, geometry, low_memory) for low_memory in (False, True)]
            best = [float("inf")] * 2
            for _ in range(rounds + 1):
                for at, packed in enumerate(packs):
                    start = time.perf_counter()
                    backend.run(given, packed)
                    best[at] = min(best[at], 1e3 * (time.perf_counter() - start))
            totals[scheme] = [total + ms for total, ms in zip(totals[scheme], best, strict=True)]
            sizes = [f"{held(packed) / 1e6:.2f}" for packed in packs]
            shown.add_row(name, scheme, *(f"{ms:.1f}" for ms in best), f"{best[1] / best[0]:.2f}", *sizes)
    for scheme, (once, always) in totals.items():
        shown.add_row("all", scheme, f"{once:.1f}", f"{always:.1f}", f"{always / once:.2f}", "", "")
    Console(width=120).print(shown)


if __name__ == "__main__":
    typer.run(main)
