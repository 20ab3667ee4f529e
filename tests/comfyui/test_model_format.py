"""Our model file without ComfyUI: what is written is read back, and no damaged or foreign file is taken for one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfyui.model_files import SCHEMES, SHAPES, corrected_state, edited, state_of, tensors_of, written
from safetensors.torch import save_file

from comfyui_nodes.native.file_writer import Entry, entry, write_tensors
from comfyui_nodes.native.model_format import PREFIX, Content, read_description, read_model
from diffusers_ldmq.errors import CheckpointError, LDMQError
from diffusers_ldmq.specs import LayerState

LINEAR = f"{PREFIX}blocks.0.linear"
CONV = f"{PREFIX}blocks.0.conv"


def states(scheme: str = "w8a8") -> dict[str, LayerState]:
    return {name: state_of(shape, scheme) for name, shape in SHAPES.items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "model.safetensors", states())


def assert_same(content: Content, expected: dict[str, LayerState]) -> None:
    assert set(content.states) == set(expected)
    for name, state in expected.items():
        found = content.states[name]
        assert found.scheme == state.scheme
        assert found.rotation == state.rotation
        assert set(found.tensors()) == set(state.tensors())
        for leaf, value in state.tensors().items():
            assert found.tensors()[leaf].dtype == value.dtype
            assert torch.equal(found.tensors()[leaf], value), (name, leaf)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_states_come_back_bit_for_bit(scheme: str, tmp_path: Path):
    content = read_model(written(tmp_path / "model.safetensors", states(scheme)))
    assert_same(content, states(scheme))
    assert content.shapes == SHAPES
    assert content.dtype == torch.float16
    assert (content.model_type, content.sampling) == ("EPS", {"linear_start": 0.001})
    assert set(content.floats) == {"norm.weight", "time_embed.0.weight"}


def test_layers_without_bias_and_corrected_ones_come_back(tmp_path: Path):
    made = {
        "blocks.0.linear": state_of(SHAPES["blocks.0.linear"], "w8a16", bias=False),
        "blocks.0.conv": corrected_state(SHAPES["blocks.0.conv"]),
    }
    content = read_model(written(tmp_path / "model.safetensors", made))
    assert_same(content, made)
    assert (content.states["blocks.0.conv"].rotation, content.states["blocks.0.conv"].rank) == (4, 2)


def test_progress_tells_every_layer(file: Path):
    told: list[tuple[int, int]] = []
    read_model(file, lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


DAMAGE: dict[str, tuple[str, Callable[[], torch.Tensor | None], str]] = {
    "missing scale": (f"{LINEAR}.weight_scale", lambda: None, "the file lacks this tensor"),
    "missing float": (f"{PREFIX}norm.weight", lambda: None, "the file lacks this tensor"),
    "extra tensor": (f"{LINEAR}.lora_up", lambda: torch.zeros(2), "which its header does not name"),
    "scale too short": (f"{LINEAR}.weight_scale", lambda: torch.ones(5), r"shape \[5\], expected \[6\]"),
    "codes of another shape": (f"{CONV}.weight", lambda: torch.zeros(8, 4, 3, 1, dtype=torch.int8), "expected"),
    "codes as floats": (f"{CONV}.weight", lambda: torch.zeros(8, 4, 3, 3), "dtype torch.float32, expected torch.int8"),
    "half scale": (f"{LINEAR}.weight_scale", lambda: torch.ones(6).half(), "expected torch.float32"),
    "NaN scale": (f"{LINEAR}.weight_scale", lambda: torch.full((6,), torch.nan), "NaN or Inf"),
    "zero scale": (f"{LINEAR}.weight_scale", lambda: torch.zeros(6), "zero or negative"),
    "negative input scale": (f"{LINEAR}.input_scale", lambda: torch.tensor(-1.0), "zero or negative"),
    "zero point out of range": (
        f"{LINEAR}.input_zero_point",
        lambda: torch.tensor(128, dtype=torch.int32),
        "zero point 128",
    ),
    "code -128": (f"{CONV}.weight", lambda: torch.full((8, 4, 3, 3), -128, dtype=torch.int8), "the code -128"),
    "infinite bias": (f"{LINEAR}.bias", lambda: torch.full((6,), torch.inf), "NaN or Inf"),
    "NaN in a float layer": (f"{PREFIX}norm.weight", lambda: torch.full((4,), torch.nan), "NaN or Inf"),
    "integers in a float layer": (f"{PREFIX}norm.weight", lambda: torch.ones(4, dtype=torch.int8), "a floating one"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_naming_file_and_tensor(kind: str, file: Path):
    name, value, told = DAMAGE[kind]
    edited(file, name, value())
    with pytest.raises(CheckpointError, match=told) as caught:
        read_model(file)
    module, _, tensor = name.removeprefix(PREFIX).rpartition(".")
    assert str(file) in str(caught.value)
    assert f"module {module!r}, tensor {tensor!r}" in str(caught.value)


def test_large_codes_are_looked_at_when_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from diffusers_ldmq import loading

    monkeypatch.setattr(loading, "LARGE", 1)  # as the codes of a real model are
    file = written(tmp_path / "model.safetensors", states("w8a16"))
    assert_same(read_model(file), states("w8a16"))
    edited(file, f"{CONV}.weight", torch.full((8, 4, 3, 3), -128, dtype=torch.int8))
    with pytest.raises(CheckpointError, match="code -128"):
        read_model(file)


def test_a_padding_nibble_that_is_not_8_is_refused(tmp_path: Path):
    file = written(tmp_path / "model.safetensors", states("w4a16"))
    codes = states("w4a16")["blocks.0.linear"].weight.clone()
    codes[0, -1] &= 15
    with pytest.raises(CheckpointError, match="padding nibble"):
        read_model(edited(file, f"{LINEAR}.weight", codes))


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01, 0.0])
def test_a_truncated_file_is_refused(kept: float, file: Path):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        read_model(file)


def test_foreign_files_are_refused_naming_the_node_to_use(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    save_file({"input_blocks.0.0.weight": torch.zeros(4)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="stock Load Diffusion Model.*LDM-Q Quantize"):
        read_description(file)
    save_file({"input_blocks.0.0.weight": torch.zeros(4)}, file)
    with pytest.raises(CheckpointError, match="was not written by LDM-Q Save model"):
        read_description(file)
    with pytest.raises(CheckpointError, match="pickle"):
        read_description(tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        read_description(tmp_path / "absent.safetensors")


def header_with(file: Path, **changes: object) -> Path:
    data = json.loads(read_description(file).metadata()["ldmq"]) | changes
    return edited(file, None, None, {"ldmq": json.dumps(data)})


ENTRY = {"scheme": "w8a16", "tensors": ["bias", "weight", "weight_scale"]}
HEADERS: dict[str, tuple[dict[str, object], str]] = {
    "no layers": ({"layers": {}, "shapes": {}}, "names no quantized layer"),
    "layers of another kind": ({"layers": []}, "expected an object"),
    "unknown scheme": ({"layers": {"a": {"scheme": "w2a2", "tensors": ["weight"]}}}, "unknown scheme"),
    "entry with more keys": ({"layers": {"a": {"scheme": "w8a16"}}}, "expected scheme and tensors"),
    "rotation that is none": ({"layers": {"a": ENTRY | {"rotation": -4}}}, "expected a positive integer"),
    "layers without shapes": ({"shapes": {}}, "name different layers"),
    "shape of three dimensions": ({"shapes": {name: [2, 2, 2] for name in SHAPES}}, "which no layer has"),
    "negative shape": ({"shapes": {name: [-1, 4] for name in SHAPES}}, "which no layer has"),
    "enormous shape": ({"shapes": {name: [2**30, 2**30] for name in SHAPES}}, "which no layer has"),
    "shape of text": ({"shapes": {name: ["a", "b"] for name in SHAPES}}, "expected int"),
    "unknown dtype": ({"dtype": "float8_e4m3fn"}, "expected one of"),
    "unknown key": ({"author": "me"}, "unknown keys"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_makes_no_sense_is_refused(kind: str, file: Path):
    changes, told = HEADERS[kind]
    with pytest.raises(CheckpointError, match=told) as caught:
        read_model(header_with(file, **changes))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "null", "[" * 100_000])
def test_a_header_that_is_no_json_is_refused(text: str, file: Path):
    with pytest.raises(CheckpointError, match="header is damaged"):
        read_model(edited(file, None, None, {"ldmq": text}))


@pytest.mark.parametrize("names", [("a.b", "a.b.c"), ("a.b.c", "a.b"), ("a..b",), ("",), ("a.forward",)])
def test_names_that_no_layer_can_have_are_refused(names: tuple[str, ...], file: Path):
    header_with(file, layers=dict.fromkeys(names, ENTRY), shapes=dict.fromkeys(names, [6, 9]))
    with pytest.raises(CheckpointError, match="the header is damaged"):
        read_model(file)


def test_an_entry_that_its_scheme_does_not_allow_is_refused(file: Path):
    layers = read_description(file).layers
    layers["blocks.0.linear"]["tensors"].remove("input_scale")
    with pytest.raises(CheckpointError, match=r"layer 'blocks.0.linear': a w8a8 layer has tensors"):
        read_model(header_with(file, layers=layers))


def test_a_later_version_is_refused(file: Path):
    with pytest.raises(CheckpointError, match="format_version '2'.*pip install -U"):
        read_model(edited(file, None, None, {"format_version": "2"}))


def test_the_writer_writes_the_same_bytes_and_aligned_tensors(tmp_path: Path):
    first = written(tmp_path / "a.safetensors", states()).read_bytes()
    assert written(tmp_path / "b.safetensors", states()).read_bytes() == first
    header = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])
    sizes = {"F32": 4, "F16": 2, "I32": 4, "I8": 1}
    del header["__metadata__"]
    assert set(header) == set(tensors_of(states()))
    assert all(said["data_offsets"][0] % sizes[said["dtype"]] == 0 for said in header.values())


def test_an_interrupt_leaves_nothing_and_an_earlier_file_as_it_was(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"earlier")

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    entries = [entry(f"t{i}", torch.zeros(3)) for i in range(4)]
    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, entries, {}, interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == b"earlier"


def test_a_tensor_that_is_not_what_was_announced_stops_the_writer(tmp_path: Path):
    wrong = Entry("codes", torch.int8, (3,), lambda: torch.zeros(3))
    with pytest.raises(LDMQError, match="tensor 'codes'.*run the node again"):
        write_tensors(tmp_path / "model.safetensors", [wrong], {})
    assert list(tmp_path.iterdir()) == []
