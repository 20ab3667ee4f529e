"""Own effects by random probes equal direct measurements, layer by layer, and probing leaves no traces."""

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from scipy.stats import spearmanr
from torch import Tensor, nn

from diffusers_ldmq import Plan, Profile, Recording, calibrate
from diffusers_ldmq.artifacts import LayerChoice
from diffusers_ldmq.calibration import observe_inputs
from diffusers_ldmq.calls import Batch, run
from diffusers_ldmq.errors import PlanError
from diffusers_ldmq.families import fingerprint, quantizable_layers
from diffusers_ldmq.metrics import Power, energy
from diffusers_ldmq.noise import NoiseProbes
from diffusers_ldmq.observers import OBSERVERS
from diffusers_ldmq.quantization import quantized_for_now
from diffusers_ldmq.selections import SELECTIONS

Recordings = Callable[[str], Recording]
DenoiserOf = Callable[[str], Any]
ROWS = 64


def probes_of(denoiser: Any, recording: Recording, schemes: tuple[str, ...] = ("w8a8",)) -> NoiseProbes:
    layers = quantizable_layers(denoiser)
    calibrating = recording.only("calibrate")
    picked = SELECTIONS["first-step"](calibrating, None)
    ranges = observe_inputs(denoiser, calibrating.batches(list(picked)), list(layers), "minmax-affine")
    return NoiseProbes(dict(layers), ranges, schemes)


def pixel_batch(denoiser: nn.Module, rows: int = ROWS) -> Batch:
    sample = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = Batch({"sample": sample, "timestep": torch.tensor(333)}, torch.empty(0), 333.0)
    return batch._replace(output=run(denoiser, batch))


def measured(probes: NoiseProbes, denoiser: nn.Module, batch: Batch, number: int = 1, seed: int = 0) -> NoiseProbes:
    probes.measure(denoiser, batch, torch.Generator().manual_seed(seed), number)
    return probes


def exact_effects(
    denoiser: Any, recording: Recording, names: list[str], scheme: str, batches: list[Batch]
) -> dict[str, float]:
    """Layer -> noise power at the output with that one layer quantized."""
    layers = {name: LayerChoice(scheme, "") for name in names}
    plan = Plan("", fingerprint(quantizable_layers(denoiser)), "test", layers)
    calibration = calibrate(denoiser, plan, recording, observer="minmax-affine")
    found = {}
    for name, state in calibration.states.items():
        with quantized_for_now(denoiser, replace(calibration, states={name: state})):
            found[name] = sum(Power.between(batch.output, run(denoiser, batch)).noise for batch in batches)
    return found


def test_with_many_samples_the_estimate_is_what_the_layer_alone_does_at_the_output(
    denoiser_of: DenoiserOf, recordings: Recordings
) -> None:
    denoiser, recording = denoiser_of("pixel"), recordings("pixel")
    batch = pixel_batch(denoiser)
    probes = measured(probes_of(denoiser, recording, ("w8a8", "w4a8")), denoiser, batch, 40)
    names = list(probes.layers)[::2]
    for scheme in probes.schemes:
        exact = exact_effects(denoiser, recording, names, scheme, [batch])
        off = {name: 10 * math.log10(probes.own[name, scheme, 333.0] / exact[name]) for name in names}
        assert median(map(abs, off.values())) < 0.3, off
        assert max(map(abs, off.values())) < 1.5, off  # layers whose noise sits in a few rows
        assert max(exact.values()) > 100 * min(exact.values())  # or a constant would have passed


def test_on_the_trained_model_few_rows_rank_the_layers(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser, recording = denoiser_of("bundled"), recordings("bundled")
    select = recording.only("select")
    batches = [select.batch(select.calls[1])]
    probes = probes_of(denoiser, recording)
    for batch in batches:
        measured(probes, denoiser, batch, 4)
    found = [sum(probes.own[name, "w8a8", batch.timestep] for batch in batches) for name in probes.layers]
    exact = list(exact_effects(denoiser, recording, list(probes.layers), "w8a8", batches).values())
    ranked: Any = spearmanr(found, exact)
    assert ranked.statistic >= 0.9
    assert sum(found) == pytest.approx(sum(exact), rel=0.4)


class Line(nn.Module):
    """Two Linear layers in a row, and one on a single row of its own that is added to all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.embedding = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.last(self.first(x)) + self.embedding(torch.ones(1, 3)),)


def line(rows: int) -> tuple[Line, Batch]:
    denoiser = Line()
    batch = Batch({"x": torch.randn(rows, 6, generator=torch.Generator().manual_seed(2))}, torch.empty(0), 1.0)
    return denoiser, batch._replace(output=run(denoiser, batch))


def line_probes(denoiser: Line) -> NoiseProbes:
    layers: dict[str, Any] = {"first": denoiser.first, "last": denoiser.last, "embedding": denoiser.embedding}
    ranges = {name: OBSERVERS["minmax"]() for name in layers}
    for observer in ranges.values():
        observer.update(torch.tensor([-3.0, 3.0]))
    return NoiseProbes(layers, ranges, ("w4a16",))


def exact_in_a_line(denoiser: Line, batch: Batch, rows: int) -> dict[str, float]:
    probes = line_probes(denoiser)
    with torch.no_grad():
        x = batch.kwargs["x"]
        hidden = denoiser.first(x)
        ones = torch.ones(1, 3)
        errors = {
            name: dict(probes.errors(name, given, probes.layers[name](given)))["w4a16"]
            for name, given in {"first": x, "last": hidden, "embedding": ones}.items()
        }
        at_output = errors["first"] @ denoiser.last.weight.T
    return {
        "first": energy(at_output),
        "last": energy(errors["last"]),
        "embedding": rows * energy(errors["embedding"]),
    }


@pytest.mark.parametrize("name", ["first", "last", "embedding"])
def test_estimates_of_a_linear_model_are_unbiased_and_scatter_as_foretold(name: str) -> None:
    rows, repeats = 8, 300
    denoiser, batch = line(rows)
    exact = exact_in_a_line(denoiser, batch, rows)[name]
    found = torch.tensor(
        [measured(line_probes(denoiser), denoiser, batch, seed=seed).own[name, "w4a16", 1.0] for seed in range(repeats)]
    ).double()
    spread = float(found.std()) / exact
    assert float(found.mean()) == pytest.approx(exact, rel=4 * spread / math.sqrt(repeats))
    assert spread > 0.05  # a random estimate, so that the line above says something
    if name != "embedding":  # its one row reaches every row of the output: a single sample
        # sqrt(2 / rows) is for rows of equal power
        assert spread < 2 * math.sqrt(2 / rows)


def test_the_mean_of_several_probes_is_closer() -> None:
    denoiser, batch = line(4)
    exact = exact_in_a_line(denoiser, batch, 4)["first"]

    def off(number: int) -> float:
        found = [
            measured(line_probes(denoiser), denoiser, batch, number, seed).own["first", "w4a16", 1.0]
            for seed in range(60)
        ]
        return sum((value / exact - 1) ** 2 for value in found) / len(found)

    assert off(16) < off(1) / 6  # 1/16 but for chance


def test_local_powers_do_not_depend_on_the_number_of_probes() -> None:
    denoiser, batch = line(4)
    one, many = (measured(line_probes(denoiser), denoiser, batch, number) for number in (1, 5))
    assert one.signal == many.signal
    assert one.noise == many.noise
    assert one.macs == many.macs == {"first": 4 * 30, "last": 4 * 20, "embedding": 12}
    assert one.own != many.own


def test_gradient_checkpointing_changes_no_number(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser, recording = denoiser_of("pixel"), recordings("pixel")
    batch, switched = pixel_batch(denoiser, 4), []
    enable = denoiser.enable_gradient_checkpointing
    denoiser.enable_gradient_checkpointing = lambda: (switched.append(True), enable())
    on = measured(probes_of(denoiser, recording), denoiser, batch)
    denoiser._supports_gradient_checkpointing = False
    off = measured(probes_of(denoiser, recording), denoiser, batch)
    assert switched == [True]
    assert on.own == pytest.approx(off.own, rel=1e-4)
    assert on.noise == pytest.approx(off.noise, rel=1e-4)
    assert (on.macs, on.readers) == (off.macs, off.readers)


def test_dropout_of_a_model_in_training_mode_adds_nothing_where_activations_are_recomputed(
    recordings: Recordings,
) -> None:
    recording = recordings("pixel")
    torch.manual_seed(0)
    denoiser = UNet2DModel(
        sample_size=8, block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8, layers_per_block=1, dropout=0.5,
    )  # fmt: skip
    batch = pixel_batch(denoiser, 4)
    training = measured(probes_of(denoiser, recording), denoiser.train(), batch)
    assert all(module.training for module in denoiser.modules())
    evaluating = measured(probes_of(denoiser, recording), denoiser.eval(), batch)
    assert training.own == pytest.approx(evaluating.own, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_as_before_also_after_a_failure(
    checkpointing: bool, failing: bool, denoiser_of: DenoiserOf, recordings: Recordings
) -> None:
    denoiser = denoiser_of("pixel")
    probes, batch = probes_of(denoiser, recordings("pixel")), pixel_batch(denoiser, 2)
    frozen = {"conv_in.weight", "conv_out.bias"}
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    if failing:
        batch = batch._replace(kwargs={**batch.kwargs, "class_labels": torch.tensor([1, 1])})
        with pytest.raises(ValueError, match="class_embedding"):
            measured(probes, denoiser, batch)
    else:
        measured(probes, denoiser, batch)
    assert {name for name, parameter in denoiser.named_parameters() if not parameter.requires_grad} == frozen
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    assert denoiser.is_gradient_checkpointing is checkpointing
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())
    assert torch.is_grad_enabled()


def test_layers_that_read_one_tensor_are_found(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser, recording = denoiser_of("bundled"), recordings("bundled")
    select = recording.only("select")
    probes = measured(probes_of(denoiser, recording, ("w8a16",)), denoiser, select.batch(select.calls[0], [0]))
    shared = probes.shared()
    attentions = {name.rpartition(".")[0] for name in probes.layers if name.endswith(".to_q")}
    expected = {
        tuple(f"{name}.{part}" for part in (("to_q", "to_k", "to_v") if name.endswith("attn1") else ("to_k", "to_v")))
        for name in attentions
    }
    assert len(expected) > 6
    assert set(shared) == expected  # neither q with another's k, nor a resnet's conv1 with its time_emb_proj
    order = list(probes.layers)
    assert list(shared) == sorted(shared, key=lambda group: order.index(group[0]))


def test_rows_survive_and_those_of_another_model_are_refused(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser, recording = denoiser_of("pixel"), recordings("pixel")
    batch = pixel_batch(denoiser, 2)
    probes = measured(probes_of(denoiser, recording), denoiser, batch)
    copy = probes_of(denoiser, recording)
    row = probes.row(333.0)
    copy.add(333.0, row)
    assert copy.result((333.0,)) == probes.result((333.0,))
    copy.add(333.0, row)
    assert copy.row(333.0) == pytest.approx(tuple(2 * value for value in row))
    with pytest.raises(PlanError, match="does not fit this model; delete it and start anew"):
        copy.add(333.0, row[:-1])


def test_a_profile_of_a_bf16_model_holds_finite_effects(
    denoiser_of: DenoiserOf, recordings: Recordings, profiles: Callable[[str], Profile]
) -> None:
    denoiser, recording = denoiser_of("pixel").to(torch.bfloat16), recordings("pixel")
    select = recording.only("select")
    probes = measured(probes_of(denoiser, recording, ("w4a8",)), denoiser, select.batch(select.calls[0]), 4)
    found = sum(probes.own[name, "w4a8", select.calls[0].timestep] for name in probes.layers)
    exact = sum(noise.own["w4a8"][0] for noise in profiles("pixel").layers)
    assert found == pytest.approx(exact, rel=0.8)
