"""Recording runs the pipeline's own sampling: guidance, labels, seeds, nested arguments, bad pipelines."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tiny_pipelines import INPUTS as TINY_INPUTS
from tiny_pipelines import MAKERS as TINY_MAKERS

from diffusers_ldmq import Recording, record_calls
from diffusers_ldmq.calls import run
from diffusers_ldmq.errors import LDMQError, RecordingError
from diffusers_ldmq.families import family_of
from diffusers_ldmq.recording import generators, image_count, with_reference

Recordings = Callable[[str], Recording]
Make = Callable[[str], Any]
Inputs = Callable[[str], list[dict[str, Any]]]


def rows_of(recording: Recording, name: Any, path: str) -> set[bytes]:
    """Every row of an argument in the first step of a set's runs, as bytes."""
    calls = [call for call in recording.only(name).calls if call.step == 0]
    return {row.numpy().tobytes() for call in calls for row in recording.tensors[call.tensors[path]]}


def test_replay_gives_the_recorded_output_bit_for_bit(kind: str, denoiser_of: Make, recordings: Recordings) -> None:
    denoiser, recording = denoiser_of(kind), recordings(kind)
    assert recording.denoiser == type(denoiser).__name__
    for call in recording.calls:
        batch = recording.batch(call)
        assert torch.equal(run(denoiser, batch), batch.output)


def test_outputs_can_be_those_of_another_denoiser(denoiser_of: Make, recordings: Recordings) -> None:
    denoiser, recording = denoiser_of("pixel"), recordings("pixel")
    with torch.no_grad():
        denoiser.conv_out.weight.mul_(2)
        denoiser.conv_out.bias.mul_(2)
    told: list[int] = []
    found = with_reference(recording, denoiser, lambda done, whole: told.append(done))
    assert told == list(range(1, len(recording.calls) + 1))
    for before, after in zip(recording.calls, found.calls, strict=True):
        assert torch.allclose(found.batch(after).output, 2 * recording.batch(before).output, rtol=1e-4, atol=1e-5)
        assert after.tensors == before.tensors


@pytest.mark.parametrize(("kind", "halves"), [("bundled", 2), ("pixel", 1), ("dit", 2)], indirect=["kind"])
def test_a_call_knows_its_images_with_and_without_guidance(kind: str, halves: int, recordings: Recordings) -> None:
    for call in recordings(kind).calls:
        assert call.images == 2
        assert recordings(kind).tensors[call.output].shape[0] == 2 * halves


def test_half_the_inputs_calibrate_a_quarter_selects_a_quarter_verifies(kind: str, recordings: Recordings) -> None:
    sets = {call.run: call.set for call in recordings(kind).calls}
    assert [sets[number] for number in sorted(sets)] == ["calibrate", "calibrate", "select", "verify"]


@pytest.mark.parametrize(
    ("kind", "noise", "asked"),
    [("bundled", "sample", "encoder_hidden_states"), ("pixel", "sample", None), ("dit", "hidden_states", None)],
    indirect=["kind"],
)
def test_the_three_sets_share_neither_noise_nor_prompts(
    kind: str, noise: str, asked: str | None, recordings: Recordings
) -> None:
    recording = recordings(kind)
    sets = ("calibrate", "select", "verify")
    seen = [rows_of(recording, name, noise) for name in sets]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 8
    if asked:
        prompts = [rows_of(recording, name, asked) for name in sets]
        unconditional = set.intersection(*prompts)
        assert len(unconditional) == 1
        assert len(set.union(*prompts)) == 1 + 8


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_inputs_are_repeated_with_fresh_seeds(count: int, make: Make, inputs_of: Inputs) -> None:
    inputs = [{**entry, "seed": 7 + 2 * i} for i, entry in enumerate(inputs_of("pixel")[:count])]
    recording = record_calls(make("pixel"), inputs)
    seen = [rows_of(recording, name, "sample") for name in ("calibrate", "select", "verify")]
    assert all(seen)
    assert len(set.union(*seen)) == sum(map(len, seen))


def test_single_step_stops_the_calibrating_runs_after_their_first_step(
    kind: str, make: Make, inputs_of: Inputs, recordings: Recordings
) -> None:
    inputs = inputs_of(kind)
    recording = record_calls(make(kind), inputs, selection="first-step")
    calibrating = recording.only("calibrate")
    prompts = sum(image_count(entry) for entry in inputs[:2])
    assert recording.sampler_calls["calibrate"] == len(calibrating.calls) == 2 <= prompts
    assert calibrating.timesteps() == recording.timesteps()[:1]
    steps = inputs[0]["num_inference_steps"]
    assert len(recording.only("select").calls) == len(recording.only("verify").calls) == steps
    everything = recordings(kind)
    assert everything.sampler_calls["calibrate"] == 2 * steps
    assert calibrating.calls[0] == everything.calls[0]  # the first step is the same one


def test_two_recordings_are_equal(make: Make, inputs_of: Inputs, recordings: Recordings) -> None:
    again = record_calls(make("pixel"), inputs_of("pixel"), selection="uniform")
    assert again.calls == recordings("pixel").calls
    assert again.tensors.keys() == recordings("pixel").tensors.keys()


def test_progress_counts_pipeline_calls(make: Make, inputs_of: Inputs) -> None:
    told: list[tuple[int, int]] = []
    record_calls(make("pixel"), inputs_of("pixel"), progress=lambda done, whole: told.append((done, whole)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


class NestedPipeline(DiffusionPipeline):
    """A pipeline whose denoiser takes nested keyword arguments, as SDXL's does."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, batch_size: int = 1, generator: Any = None) -> None:
        shape = (1, 4, 8, 8)
        latents = torch.cat([torch.randn(shape, generator=g) for g in generator])
        self.scheduler.set_timesteps(2)
        for timestep in self.scheduler.timesteps:
            conditions = {"text_embeds": torch.ones(batch_size, 8), "time_ids": torch.zeros(batch_size, 6)}
            self.unet(
                latents,
                timestep,
                encoder_hidden_states=torch.ones(batch_size, 3, 8),
                added_cond_kwargs=conditions,
                down_block_additional_residuals=None,
                return_dict=False,
            )


def nested_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


def test_nested_keyword_arguments_are_recorded_and_replayed() -> None:
    unet = nested_unet()
    recording = record_calls(NestedPipeline(unet, DDIMScheduler()), [{"batch_size": 2}])
    call = recording.calls[0]
    assert {"added_cond_kwargs/text_embeds", "added_cond_kwargs/time_ids"} <= call.tensors.keys()
    batch = recording.batch(call, [1])
    assert batch.kwargs["added_cond_kwargs"]["text_embeds"].shape == (1, 8)
    for call in recording.calls:
        whole = recording.batch(call)
        assert torch.equal(run(unet, whole), whole.output)


def test_image_to_image_calibrates_at_the_noisiest_timestep(make: Make, recordings: Recordings) -> None:
    text_to_image = make("bundled")
    pipe = StableDiffusionImg2ImgPipeline(**text_to_image.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    entry = {"prompt": "red apple", "image": Image.new("RGB", (64, 64), "red"), "num_inference_steps": 4}
    recording = record_calls(pipe, [{**entry, "strength": 0.5}])
    assert recording.only("select").timesteps() == recordings("bundled").timesteps()[2:]
    assert recording.only("calibrate").timesteps() == recordings("bundled").timesteps()[:1]


@pytest.mark.parametrize(
    ("inputs", "count"),
    [
        ({"prompt": "a"}, 1),
        ({"prompt": ["a", "b"]}, 2),
        ({"prompt": ["a", "b"], "num_images_per_prompt": 3}, 6),
        ({"prompt": "a", "num_images_per_prompt": 3}, 3),
        ({"prompt_embeds": torch.zeros(4, 2, 2)}, 4),
        ({"class_labels": [1, 2, 3]}, 3),
        ({"batch_size": 5}, 5),
        ({"image": [1, 2]}, 2),
        ({}, 1),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, dict) else None,
)
def test_image_count(inputs: dict[str, Any], count: int) -> None:
    assert image_count(inputs) == count


def test_an_images_noise_does_not_depend_on_its_batch() -> None:
    alone, second = generators(6, 1)[0], generators(5, 2)[1]
    assert torch.equal(torch.randn(4, generator=alone), torch.randn(4, generator=second))


def hooks(module: torch.nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def test_no_inputs_are_refused(make: Make) -> None:
    with pytest.raises(RecordingError, match="no inputs to record"):
        record_calls(make("pixel"), [])


def test_an_argument_the_pipeline_lacks_is_named_beside_those_it_takes(make: Make) -> None:
    pipe = make("pixel")
    with pytest.raises(RecordingError, match=r"DDPMPipeline takes no argument 'prompt'.*batch_size"):
        record_calls(pipe, [{"prompt": "red apple"}])
    assert hooks(pipe.unet) == 0


def test_an_output_with_nan_is_refused_and_the_hooks_are_gone(make: Make, inputs_of: Inputs) -> None:
    pipe = make("pixel")
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = torch.nan
    with pytest.raises(RecordingError, match=r"UNet2DModel gave NaN or Inf at timestep \d+.*float32"):
        record_calls(pipe, inputs_of("pixel"))
    assert hooks(pipe.unet) == 0


def test_a_pipeline_without_a_denoiser_is_refused_naming_its_models(make: Make) -> None:
    pipe = make("dit")
    pipe.register_modules(transformer=torch.nn.Linear(2, 2))
    with pytest.raises(RecordingError, match=r"DiTPipeline has no denoiser.*AutoencoderKL.*known denoisers.*UNet2D"):
        record_calls(pipe, [{"class_labels": [1]}])


class IdlePipeline(NestedPipeline):
    """A pipeline that never calls its denoiser."""

    def __call__(self, batch_size: int = 1, generator: Any = None) -> None:
        return None


def test_a_denoiser_that_is_never_called_is_an_error() -> None:
    with pytest.raises(RecordingError, match="UNet2DConditionModel was never called"):
        record_calls(IdlePipeline(nested_unet(), DDIMScheduler()), [{}])


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"prompt": 5}, "StableDiffusionPipeline cannot be called with .*'prompt': 5"),
        ({"prompt": "a", "seed": "abc"}, "input 'seed' is 'abc', an integer is expected"),
        ({"prompt": "a", "num_images_per_prompt": True}, "input 'num_images_per_prompt' is True, an integer"),
        ({"prompt": "a", "guidance": 3}, "StableDiffusionPipeline takes no argument 'guidance'"),
    ],
)
def test_arguments_that_the_pipeline_cannot_take_are_named(entry: dict[str, Any], told: str, make: Make) -> None:
    with pytest.raises(RecordingError, match=told):
        record_calls(make("bundled"), [entry] * 4)


def test_features_are_what_went_into_the_middle_at_every_step_of_the_first_run(
    kind: str, denoiser_of: Make, recordings: Recordings
) -> None:
    denoiser, recording = denoiser_of(kind), recordings(kind)
    features, run_of_first = recording.features, recording.calls[0].run
    seen: list[torch.Tensor] = []
    middle = denoiser.get_submodule(family_of(denoiser).middle(denoiser))
    middle.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for call in recording.calls:
        if call.run == run_of_first:
            run(denoiser, recording.batch(call))
    expected = torch.stack([x if x.dim() == 4 else x.transpose(1, 2)[..., None] for x in seen])
    assert features is not None
    assert features.dtype == torch.float32
    assert torch.equal(features, expected)
    assert not torch.equal(features[0], features[-1])


def test_features_are_recorded_only_where_they_are_read_and_leave_no_hooks(make: Make, inputs_of: Inputs) -> None:
    pipe = make("pixel")
    for selection in ("first-step", "uniform", "normal", "tdac"):
        recording = record_calls(pipe, inputs_of("pixel"), selection=selection)
        assert (recording.features is not None) == (selection == "tdac")
        assert len(recording.only("calibrate").timesteps()) == (1 if selection == "first-step" else 3)
    assert not any(hooks(module) for module in pipe.unet.modules())


class TwicePipeline(NestedPipeline):
    """A sampler that calls its denoiser twice at every timestep, and without guidance at the last."""

    def __call__(self, batch_size: int = 1, generator: Any = None) -> None:
        latents = torch.cat([torch.randn((1, 4, 8, 8), generator=g) for g in generator])
        for timestep, halves in ((900, 2), (500, 2), (100, 1)):
            for scale in (0.5, 1.0):
                rows = scale * latents.repeat(halves, 1, 1, 1)
                conditions = {"text_embeds": torch.ones(len(rows), 8), "time_ids": torch.zeros(len(rows), 6)}
                texts = torch.ones(len(rows), 3, 8)
                self.unet(rows, timestep, encoder_hidden_states=texts, added_cond_kwargs=conditions)


def test_a_steps_last_call_and_the_rows_of_every_step_are_its_features() -> None:
    unet, seen = nested_unet(), []
    recording = record_calls(TwicePipeline(unet, DDIMScheduler()), [{"batch_size": 2}] * 4, selection="tdac")
    middle = unet.get_submodule(family_of(unet).middle(unet))
    middle.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for call in recording.calls[:6]:
        run(unet, recording.batch(call))
    assert recording.features is not None
    assert torch.equal(recording.features, torch.stack([seen[1][-2:], seen[3][-2:], seen[5]]))


class GrowingPipeline(NestedPipeline):
    """A sampler whose latents grow, as those of multi-stage models do."""

    def __call__(self, batch_size: int = 1, generator: Any = None) -> None:
        conditions = {"text_embeds": torch.ones(1, 8), "time_ids": torch.zeros(1, 6)}
        for timestep, size in ((900, 8), (100, 16)):
            latents = torch.ones(1, 4, size, size)
            self.unet(latents, timestep, encoder_hidden_states=torch.ones(1, 3, 8), added_cond_kwargs=conditions)


def test_steps_that_cannot_be_compared_are_refused_where_features_are_asked_for() -> None:
    pipe = GrowingPipeline(nested_unet(), DDIMScheduler())
    assert record_calls(pipe, [{}], selection="uniform").features is None
    with pytest.raises(RecordingError, match=r"mid_block\S+ changes its shape between steps.*'uniform'"):
        record_calls(pipe, [{}], selection="tdac")


def test_an_unknown_selection_is_refused_before_anything_runs(make: Make) -> None:
    with pytest.raises(LDMQError, match="unknown selection 'all'; known: first-step, normal, tdac, uniform"):
        record_calls(make("pixel"), [{"batch_size": "no number"}], selection="all")


@pytest.mark.parametrize("name", sorted(TINY_INPUTS))
def test_every_kind_of_pipeline_has_features(name: str) -> None:
    recording = record_calls(TINY_MAKERS[name](), TINY_INPUTS[name][:1], selection="tdac")
    calibrating = recording.only("calibrate")
    steps = {call.step for call in calibrating.calls if call.run == calibrating.calls[0].run}
    assert recording.features is not None
    assert recording.features.ndim == 5
    assert len(recording.features) == len(steps)
    assert recording.features.shape[1] == recording.tensors[calibrating.calls[0].output].shape[0]
