"""Profiles equal direct measurements, and measuring leaves neither traces nor tensors behind."""

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_ldmq import Plan, Profile, ProfileSettings, Recording, calibrate, profile_sqnr
from diffusers_ldmq.artifacts import LayerChoice
from diffusers_ldmq.calls import run
from diffusers_ldmq.errors import LDMQError, PlanError
from diffusers_ldmq.families import find_denoiser, layer_table, quantizable_layers
from diffusers_ldmq.layers import quantize_layer
from diffusers_ldmq.metrics import Power, sqnr_db, total
from diffusers_ldmq.planners import low_precision
from diffusers_ldmq.profiling import _spread
from diffusers_ldmq.quantization import quantized_for_now

Recordings = Callable[[str], Recording]
Profiles = Callable[[str], Profile]
DenoiserOf = Callable[[str], Any]

LAYERS = {
    "pixel": ("up_blocks.0.resnets.0.conv1", "down_blocks.1.attentions.0.to_q"),
    "dit": ("transformer_blocks.1.ff.net.2",),
}


def inputs_and_outputs(denoiser: Any, recording: Recording, name: str) -> list[tuple[float, Tensor, Tensor]]:
    """(timestep, input, float output) of a layer in every 'select' call."""
    seen: list[tuple[Tensor, Tensor]] = []
    layer = denoiser.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    calls = recording.only("select").calls
    for call in calls:
        run(denoiser, recording.batch(call))
    handle.remove()
    return [(call.timestep, *pair) for call, pair in zip(calls, seen, strict=True)]


@pytest.mark.parametrize("scheme", ProfileSettings().schemes)
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in LAYERS.items() for n in names])
def test_relative_noise_is_that_of_two_direct_forwards(
    kind: str, name: str, scheme: str, denoiser_of: DenoiserOf, recordings: Recordings, profiles: Profiles
) -> None:
    denoiser, recording = denoiser_of(kind), recordings(kind)
    plan = Plan("", layer_table(denoiser).fingerprint, "test", {name: LayerChoice(scheme, "")})
    state = calibrate(denoiser, plan, recording, observer="minmax-affine").states[name]
    quantized = quantize_layer(denoiser.get_submodule(name), state)
    quantized.use_backend("reference")
    powers: dict[float, Power] = {}
    with torch.no_grad():
        for timestep, x, output in inputs_and_outputs(denoiser, recording, name):
            powers[timestep] = Power.between(output, quantized(x))
    profile = profiles(kind)
    noise = profile.noise_of(name)
    for index, timestep in enumerate(profile.timesteps):
        measured = sqnr_db(noise.signal[index], noise.noise[scheme][index])
        assert measured == pytest.approx(powers[timestep].sqnr_db, abs=0.1)
    assert noise.power(scheme).sqnr_db == pytest.approx(total(list(powers.values())).sqnr_db, abs=0.1)


def test_weight_and_activation_noise_are_measured_separately(
    denoiser_of: DenoiserOf, recordings: Recordings, profiles: Profiles
) -> None:
    denoiser, name = denoiser_of("pixel"), LAYERS["pixel"][0]
    noise = profiles("pixel").noise_of(name)
    layer = denoiser.get_submodule(name)
    weight = layer.weight.detach()
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    rounded = copy.deepcopy(layer)
    rounded.weight.data = torch.round(weight / scale) * scale
    powers = [
        Power.between(output, rounded(x)) for _, x, output in inputs_and_outputs(denoiser, recordings("pixel"), name)
    ]
    assert noise.power("w8a16").sqnr_db == pytest.approx(total(powers).sqnr_db, abs=0.01)
    # independent errors: their powers add up to that of both together
    both = noise.power("w8a16").noise + noise.power("a8").noise
    assert noise.power("w8a8").noise == pytest.approx(both, rel=0.1)
    assert noise.power("a8").noise > 0


@pytest.mark.parametrize("kind", ["pixel", "dit"], indirect=True)
def test_the_end_of_the_block_curve_is_the_fully_quantized_model(
    kind: str, denoiser_of: DenoiserOf, recordings: Recordings, profiles: Profiles
) -> None:
    denoiser, recording, profile = denoiser_of(kind), recordings(kind), profiles(kind)
    table = profile.table
    layers = {
        info.name: LayerChoice(low_precision(profile.noise_of(info.name), "w8a8").scheme, "")
        for info in table.layers
        if not info.keep_float
    }
    plan = Plan(table.denoiser, table.fingerprint, "test", layers)
    select = recording.only("select")
    powers: dict[float, Power] = {}
    with quantized_for_now(denoiser, calibrate(denoiser, plan, recording, observer="minmax-affine")):
        for call in select.calls:
            batch = select.batch(call)
            powers[call.timestep] = Power.between(batch.output, run(denoiser, batch))
    for index, timestep in enumerate(profile.timesteps):
        measured = sqnr_db(profile.curve.signal[index], profile.curve.noise[-1][index])
        assert measured == pytest.approx(powers[timestep].sqnr_db, abs=0.1)
    assert -10 * torch.log10(torch.tensor(profile.curve.nsr()[-1])).item() == pytest.approx(
        total(list(powers.values())).sqnr_db, abs=0.1
    )


def test_one_row_per_block_and_one_column_per_timestep(kind: str, profiles: Profiles, recordings: Recordings) -> None:
    profile, recording = profiles(kind), recordings(kind)
    steps = len(recording.only("select").timesteps())
    assert profile.timesteps == recording.only("select").timesteps()
    assert len(profile.curve.signal) == steps
    assert [len(row) for row in profile.curve.noise] == [steps] * len(profile.curve.groups)
    assert [name for group in profile.curve.groups for name in group] == [block.name for block in profile.table.blocks]
    assert profile.schedule == recording.only("select").timesteps()
    assert [layer.name for layer in profile.layers] == [info.name for info in profile.table.layers]
    for layer in profile.layers:
        assert set(layer.noise) == set(layer.own) == {*ProfileSettings().schemes, "a8"}
        assert {len(row) for row in (layer.signal, *layer.noise.values(), *layer.own.values())} == {steps}


def test_a_block_that_stays_float_adds_no_noise(profiles: Profiles) -> None:
    profile = profiles("pixel")
    before = 0.0
    for block, noise in zip(profile.table.blocks, profile.curve.nsr(), strict=True):
        if all(profile.table.layer(name).keep_float for name in block.layers):
            assert noise == before
        else:
            assert noise != before
        before = noise


def test_only_the_layers_asked_for_stay_float_in_the_curve(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser = denoiser_of("dit")
    names = [info.name for info in layer_table(denoiser).layers]
    settings = ProfileSettings(schemes=("w8a8", "w8a16"), keep_float=frozenset(names[:-1]), timesteps=1)
    nsr = profile_sqnr(denoiser, recordings("dit"), settings).curve.nsr()
    assert not any(nsr[:-1])
    assert nsr[-1] > 0


def test_few_timesteps_are_spread_from_the_noisiest_to_the_cleanest(
    denoiser_of: DenoiserOf, recordings: Recordings
) -> None:
    settings = ProfileSettings(timesteps=2, images=1, schemes=("w8a8",))
    profile = profile_sqnr(denoiser_of("dit"), recordings("dit"), settings)
    steps = recordings("dit").timesteps()
    assert profile.timesteps == (steps[0], steps[-1])
    assert profile.settings["images"] == 1


def test_macs_are_those_of_one_image(profiles: Profiles) -> None:
    table = profiles("pixel").table
    assert table.layer("conv_in").macs == 16 * 8 * 8 * 3 * 9
    assert table.layer("time_embedding.linear_1").macs == 16 * 64
    assert all(info.macs > 0 for info in table.layers)


def test_the_denoiser_is_unchanged_bit_for_bit(kind: str, denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser = denoiser_of(kind)
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    modules = dict(denoiser.named_modules())
    profile_sqnr(denoiser, recordings(kind), ProfileSettings(timesteps=1, images=1, schemes=("w8a8",)))
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())
    after = dict(denoiser.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())


def test_the_float_layers_come_back_after_an_interrupt(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser = denoiser_of("pixel")
    modules = dict(denoiser.named_modules())

    def interrupt(done: int, whole: int) -> None:
        if done > whole / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile_sqnr(denoiser, recordings("pixel"), ProfileSettings(schemes=("w8a8",)), progress=interrupt)
    assert all(dict(denoiser.named_modules())[name] is module for name, module in modules.items())


def live_tensors() -> int:
    gc.collect()
    return sum(value.numel() for value in gc.get_objects() if isinstance(value, Tensor))


def test_memory_does_not_grow_with_the_number_of_calls(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser, recording = denoiser_of("pixel"), recordings("pixel")
    seen: dict[int, int] = {}

    def look(done: int, whole: int) -> None:
        if done in (9, 18, 27) and done not in seen:  # when a probing pass is over, one per timestep
            seen[done] = live_tensors()

    profile_sqnr(denoiser, recording, progress=look)
    before = live_tensors()
    assert len(seen) == 3
    assert seen[18] == seen[27]  # what is kept after the second call is kept after the third
    profile_sqnr(denoiser, recording)
    assert live_tensors() == before


def test_progress_ends_when_all_is_done(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    told: list[tuple[int, int]] = []
    settings = ProfileSettings(timesteps=1, schemes=("w8a8",))
    profile_sqnr(denoiser_of("dit"), recordings("dit"), settings, progress=lambda *pair: told.append(pair))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]


def test_there_is_a_sign_of_life_at_every_layer(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser, told = denoiser_of("dit"), list[int]()
    settings = ProfileSettings(timesteps=1, schemes=("w8a8", "w4a16"))
    profile_sqnr(denoiser, recordings("dit"), settings, progress=lambda done, whole: told.append(done))
    weights = ("float", "w8", "w4")  # of every layer, rounded in three ways
    assert told.count(0) >= len(weights) * len(quantizable_layers(denoiser))


@pytest.mark.parametrize("name", ["verify", "calibrate"])
def test_a_recording_that_lacks_a_set_is_refused(name: Any, denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    with pytest.raises(LDMQError, match="the recording has no calls for the set"):
        profile_sqnr(denoiser_of("dit"), recordings("dit").only(name))


def test_a_profile_survives_its_file(kind: str, profiles: Profiles, tmp_path: Path) -> None:
    profile = profiles(kind)
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile


def test_two_profiles_are_equal(make: Callable[[str], Any], recordings: Recordings, profiles: Profiles) -> None:
    assert profile_sqnr(find_denoiser(make("dit"))[1], recordings("dit")) == profiles("dit")


@pytest.mark.parametrize(
    ("wanted", "places"),
    [(1, [9]), (2, [0, 9]), (3, [0, 8, 9]), (4, [0, 4, 8, 9]), (5, [0, 3, 5, 8, 9]), (10, range(10)), (99, range(10))],
)
def test_the_last_timestep_stands_alone_and_the_others_evenly_before_it(
    wanted: int, places: Any, recordings: Recordings
) -> None:
    times = [float(100 - 10 * k) for k in range(10)]
    call = recordings("dit").only("select").calls[0]
    recording = replace(recordings("dit"), calls=tuple(replace(call, timestep=t, step=k) for k, t in enumerate(times)))
    batches = _spread(recording, ProfileSettings(timesteps=wanted))
    assert [batch.timestep for batch in batches] == [times[k] for k in places]
    every = _spread(recording, ProfileSettings(timesteps=wanted, full=True, images=1))
    assert [batch.timestep for batch in every] == times
    assert every[0].output.shape[0] == 2  # one image, both guidance halves


@pytest.mark.parametrize("name", ["timesteps", "images", "groups"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_profile_of_nothing_is_refused(
    name: str, value: int, denoiser_of: DenoiserOf, recordings: Recordings
) -> None:
    settings = ProfileSettings(**{name: value})  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError, match=f"a profile of {value} {name} measures nothing; ask for at least 1"):
        profile_sqnr(denoiser_of("dit"), recordings("dit"), settings)


@pytest.mark.parametrize("settings", [{"scheme": "float"}, {"schemes": ("w8a8", "float")}])
def test_the_float_scheme_cannot_be_profiled(settings: Any, denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    with pytest.raises(PlanError, match="the scheme 'float' makes no noise"):
        profile_sqnr(denoiser_of("dit"), recordings("dit"), ProfileSettings(**settings))


def test_what_the_planners_may_mix_is_always_measured(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    settings = ProfileSettings(timesteps=1, scheme="w4a8", schemes=("w8a8",))
    profile = profile_sqnr(denoiser_of("dit"), recordings("dit"), settings)
    assert set(profile.layers[0].own) == {"w4a8", "w4a8-dyn", "w8a8", "w8a8-dyn", "w8a16", "a8"}
    assert profile.settings["schemes"] == ["w8a8", "w4a8", "w4a8-dyn", "w8a8-dyn", "w8a16"]


def test_a_full_profile_holds_both_directions_and_all_parts_of_every_block(
    denoiser_of: DenoiserOf, recordings: Recordings, profiles: Profiles
) -> None:
    settings = ProfileSettings(timesteps=1, groups=1, schemes=("w8a8",), full=True)
    profile = profile_sqnr(denoiser_of("dit"), recordings("dit"), settings)
    kinds = [(curve.direction, curve.part) for curve in (profile.curve, *profile.curves)]
    assert kinds == [(d, p) for d in ("forward", "backward") for p in ("both", "weight", "activation")]
    assert profile.timesteps == profile.schedule == recordings("dit").only("select").timesteps()
    assert {curve.groups for curve in profile.curves} == {tuple((block.name,) for block in profile.table.blocks)}
    assert profile.curve.noise == profiles("dit").curve.noise  # which has all timesteps and blocks, too
    assert profiles("dit").curves == ()


def test_layers_that_share_an_input_are_told(profiles: Profiles) -> None:
    attention = "mid_block.attentions.0"
    shared = profiles("pixel").shared
    assert (f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v") in shared
    assert len(shared) == 4
    assert all(len(group) == 3 for group in shared)
