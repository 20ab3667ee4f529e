"""Recordings: nested arguments, equal tensors stored once, replay of some rows, files."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusers_ldmq import Recording
from diffusers_ldmq.calls import (
    Batch,
    Call,
    InMemory,
    SampleId,
    flatten,
    parts,
    repeated,
    run,
    tensor_key,
    unflatten,
)
from diffusers_ldmq.errors import RecordingError

Recordings = Callable[[str], Recording]

NESTED = {
    "sample": torch.ones(2, 3),
    "added_cond_kwargs": {"text_embeds": torch.zeros(2, 4), "deep": {"flag": True, "names": ["a", "b"]}},
    "residuals": [torch.full((1,), 2.0), None, [3, 4.5]],
}


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def test_nested_arguments_survive_flattening() -> None:
    flat = flatten(NESTED)
    assert "added_cond_kwargs/deep/names/#1" in flat
    assert not any(isinstance(value, (dict, list)) for value in flat.values())
    assert same(unflatten(flat), NESTED)


def test_more_than_ten_list_entries_keep_their_order() -> None:
    assert unflatten(flatten({"many": list(range(12))})) == {"many": list(range(12))}


def test_tuples_come_back_as_lists_and_empty_containers_not_at_all() -> None:
    assert unflatten(flatten({"pair": (1, 2), "none": {}})) == {"pair": [1, 2]}


def test_an_argument_that_is_no_data_is_refused_by_its_path() -> None:
    with pytest.raises(RecordingError, match=r"'outer/inner/#1' is a object"):
        flatten({"outer": {"inner": [1, object()]}})


@pytest.mark.parametrize(
    ("other", "equal"),
    [
        (torch.arange(6.0).reshape(2, 3), True),
        (torch.arange(6.0).reshape(3, 2).t().contiguous().t().reshape(2, 3), True),
        (torch.arange(6.0).reshape(3, 2), False),
        (torch.arange(6).reshape(2, 3), False),
        (torch.arange(6.0).reshape(2, 3) + 1e-6, False),
    ],
    ids=["copy", "strides", "shape", "dtype", "values"],
)
def test_a_tensor_key_stands_for_content_shape_and_dtype(other: Tensor, equal: bool) -> None:
    assert (tensor_key(other) == tensor_key(torch.arange(6.0).reshape(2, 3))) is equal


def test_equal_tensors_are_stored_once(recordings: Recordings) -> None:
    recording = recordings("bundled")
    for number in {call.run for call in recording.calls}:
        calls = [call for call in recording.calls if call.run == number]
        assert len(calls) == 4
        assert len({call.tensors["encoder_hidden_states"] for call in calls}) == 1
    assert len({tensor_key(value) for value in recording.tensors.values()}) == len(recording.tensors)


def test_timesteps_run_from_the_noisiest_and_at_keeps_only_those_asked_for(recordings: Recordings) -> None:
    recording = recordings("pixel")
    timesteps = recording.timesteps()
    assert len(timesteps) == 3
    assert list(timesteps) == sorted(timesteps, reverse=True)
    assert {call.timestep for call in recording.at(timesteps[1:]).calls} == set(timesteps[1:])


def test_a_set_without_calls_is_named(recordings: Recordings) -> None:
    recording = recordings("pixel")
    assert {call.set for call in recording.only("verify").calls} == {"verify"}
    with pytest.raises(RecordingError, match="no calls for the set 'select'"):
        replace(recording, calls=recording.only("verify").calls).only("select")


def test_samples_are_one_per_image_and_step(recordings: Recordings) -> None:
    samples = recordings("pixel").samples()
    assert len(samples) == len(set(samples)) == 4 * 3 * 2  # runs, steps, images
    assert SampleId((3, 1), 2) in samples


def test_a_batch_of_one_image_holds_both_its_guidance_halves(recordings: Recordings) -> None:
    recording = recordings("bundled")
    call = recording.calls[0]
    whole, second = recording.batch(call), recording.batch(call, [1])
    rows = [1, 3]  # images 0, 1 without the prompt, then 0, 1 with it
    assert whole.output.shape[0] == 4
    assert torch.equal(second.output, whole.output[rows])
    assert torch.equal(second.kwargs["sample"], whole.kwargs["sample"][rows])
    assert torch.equal(second.kwargs["encoder_hidden_states"], whole.kwargs["encoder_hidden_states"][rows])


def test_batches_hold_exactly_the_chosen_samples(recordings: Recordings) -> None:
    recording = recordings("pixel")
    chosen = [SampleId((0, 1), 0), SampleId((2, 0), 1), SampleId((2, 1), 1)]
    batches = list(recording.batches(chosen))
    assert [batch.output.shape[0] for batch in batches] == [1, 2]
    assert torch.equal(batches[0].output, recording.batch(recording.calls[0]).output[1:])
    assert len(list(recording.batches())) == len(recording.calls)


def test_replay_at_another_dtype_casts_inputs_but_not_timesteps(
    denoiser_of: Callable[[str], Any], recordings: Recordings
) -> None:
    denoiser = denoiser_of("pixel").to(torch.bfloat16)
    seen: dict[str, Any] = {}
    denoiser.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    recording = recordings("pixel")
    batch = recording.batch(recording.calls[0])
    output = run(denoiser, batch)
    assert seen["sample"].dtype == torch.bfloat16
    assert torch.equal(torch.as_tensor(seen["timestep"]), torch.as_tensor(batch.kwargs["timestep"]))
    assert output.dtype == torch.float32


def test_a_saved_recording_comes_back_whole(kind: str, recordings: Recordings, tmp_path: Path) -> None:
    recording = recordings(kind)
    recording.save(tmp_path)
    loaded = Recording.load(tmp_path)
    assert loaded.calls == recording.calls
    assert (loaded.denoiser, loaded.sampler_calls) == (recording.denoiser, recording.sampler_calls)
    assert same(loaded.tensors, recording.tensors)
    assert loaded.features is not None
    assert recording.features is not None
    assert torch.equal(loaded.features, recording.features)


def test_a_recording_without_features_as_older_versions_wrote_it_is_read(
    recordings: Recordings, tmp_path: Path
) -> None:
    old = replace(recordings("pixel"), features=None)
    old.save(tmp_path)
    loaded = Recording.load(tmp_path)
    assert loaded.features is None
    assert same(loaded.tensors, old.tensors)


def test_files_that_are_no_recording_are_refused(recordings: Recordings, tmp_path: Path) -> None:
    head, data = tmp_path / "recording.json", tmp_path / "recording.safetensors"
    with pytest.raises(RecordingError, match="no such file"):
        Recording.load(tmp_path)
    recordings("pixel").save(tmp_path)
    good_head, good_data = head.read_text(), data.read_bytes()

    def refused(text: str, content: bytes, match: str) -> None:
        head.write_text(text)
        data.write_bytes(content)
        with pytest.raises(RecordingError, match=match):
            Recording.load(tmp_path)

    newer = json.loads(good_head) | {"format_version": 2}
    typo = json.loads(good_head)
    typo["calls"][0]["stepp"] = typo["calls"][0].pop("step")
    stranger = json.loads(good_head)
    stranger["calls"][0]["output"] = "absent"
    refused("[1, 2]", good_data, "not a recording of format_version 1")
    refused(json.dumps(newer), good_data, "not a recording of format_version 1")
    refused(json.dumps(typo), good_data, r"calls\[0\]: unknown keys \['stepp'\]")
    refused(json.dumps(stranger), good_data, "lacks 1 tensors")
    refused(good_head, good_data[: len(good_data) // 2], "recording.safetensors: cannot be read")
    refused(good_head, b"version https://git-lfs.github.com/spec/v1", "recording.safetensors: cannot be read")


def in_memory(rows: int) -> tuple[Recording, Call]:
    """A recording of one call of so many rows, whose options hold a function and a name for every row."""
    options = InMemory(
        {"function": print, "names": list("abcdefgh")[:rows]},
        lambda value, keep, whole: {**value, "names": [value["names"][int(row)] for row in keep]},
    )
    tensors = {"x": torch.arange(rows).float()[:, None], "out": torch.ones(rows, 1)}
    call = Call("select", 0, 0, 5.0, rows, {"x": "x"}, {"options": options, "object": InMemory(print)}, "out")
    return Recording("Model", (call,), tensors), call


def test_an_argument_in_memory_follows_the_rows() -> None:
    recording, call = in_memory(4)
    assert recording.batch(call, [1, 3]).kwargs["options"].value["names"] == ["b", "d"]
    batch = recording.batch(call)
    assert [part.kwargs["options"].value["names"] for part in parts(batch, 3)] == [["a", "b", "c"], ["d"]]
    assert repeated(batch, 2).kwargs["options"].value["names"] == list("abcdabcd")
    assert repeated(batch, 2).kwargs["object"].value is print


class Writing(nn.Module):
    """Gives a plain tensor and writes into its options."""

    def forward(self, x: Tensor, options: dict[str, Any], object: Any) -> Tensor:
        options["written"] = True
        assert object is print
        return x + len(options["names"])


def test_a_denoiser_may_write_into_options_and_give_a_plain_tensor() -> None:
    recording, call = in_memory(2)
    batch: Batch = recording.batch(call)
    assert torch.equal(run(Writing(), batch), torch.tensor([[2.0], [3.0]]))
    assert "written" not in batch.kwargs["options"].value


def test_a_recording_with_arguments_in_memory_is_refused_by_save(tmp_path: Path) -> None:
    recording, _ = in_memory(2)
    with pytest.raises(RecordingError, match="'options' of the recorded Model holds Python objects"):
        recording.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
