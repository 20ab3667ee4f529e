"""Loading from a hub that refuses, breaks off, or is not there: one line each, and nothing half-loaded is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from huggingface_hub import constants
from tiny_pipelines import INPUTS, MAKERS

from diffusers_ldmq import QuantizedLDMPipeline
from diffusers_ldmq.cache import SWITCH, cache_folder, find_entry
from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.pipeline import load_pipeline
from diffusers_ldmq.request import Request

Picture = Callable[[Any], torch.Tensor]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


LOADERS = {
    "quantized pipeline": lambda **options: QuantizedLDMPipeline.from_pretrained("you/x", **options),
    "any pipeline": lambda **options: load_pipeline("you/x", **options),
}


@pytest.fixture(params=LOADERS)
def load(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return LOADERS[request.param]


def refused(load: Callable[..., Any], expected: str, **options: Any) -> None:
    with pytest.raises(LDMQError, match=expected) as caught:
        load(**options)
    assert "\n" not in str(caught.value)


def test_a_gated_model_says_where_to_accept_its_conditions(hub, made: Path, load) -> None:
    hub.add("you/x", files_of(made), gated=True)
    refused(load, r"you/x: the model is gated: accept its conditions on its page of the hub, then log in")


def test_a_missing_model_and_a_private_one_say_the_same(hub, made: Path, load) -> None:
    expected = "you/x: neither a folder here nor a model that the hub shows you: check the name, or log in"
    refused(load, expected)
    hub.add("you/x", files_of(made), private=True)
    refused(load, expected)
    refused(load, expected, token=False)


def test_a_missing_revision_is_named_as_such(hub, made: Path, load) -> None:
    hub.add("you/x", files_of(made))
    refused(load, "you/x: the hub has no such revision of it; give one of its branches", revision="nope")


def test_a_model_of_another_kind_is_named_as_such(hub, load) -> None:
    hub.add("you/x", {"README.md": b"", "config.json": b"{}"})
    refused(load, "you/x: the hub has the model, but not a file that a diffusers pipeline has")


def test_a_wrong_token_is_named_as_such(hub, made: Path, load) -> None:
    hub.add("you/x", files_of(made))
    refused(load, "you/x: the hub does not know you, or does not accept the token", token="hf_wrong")  # noqa: S106


def test_a_hub_that_is_not_there_is_one_line(hub, load, monkeypatch, impatient) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    refused(load, r"you/x: the hub cannot be reached, or the connection was lost \(.*refused")


def test_what_is_not_in_the_cache_is_not_asked_for_when_that_is_forbidden(hub, made: Path, load) -> None:
    hub.add("you/x", files_of(made))
    refused(
        load, "you/x: neither a folder here nor in the cache, and the hub was not to be asked", local_files_only=True
    )
    assert hub.requests == []


def test_a_connection_cut_half_way_keeps_no_half_file_and_the_second_try_succeeds(
    hub, made: Path, load, picture: Picture, tmp_path: Path, impatient
) -> None:
    hub.add("you/x", files_of(made))
    cache = tmp_path / "cache"
    hub.cut = (".safetensors",)
    refused(load, "you/x: the hub cannot be reached, or the connection was lost")
    assert any(cache.rglob("*.json"))
    assert [path for path in cache.rglob("*") if path.suffix in (".safetensors", ".incomplete")] == []
    asked = [path for method, path, _ in hub.requests if method == "GET" and path.endswith(".safetensors")]
    assert len(asked) > 1  # it was tried again before it was given up
    hub.cut = ()
    assert torch.equal(picture(load()), picture(QuantizedLDMPipeline.from_pretrained(made)))


def test_a_connection_cut_once_is_resumed_by_itself(hub, made: Path, pipe, picture: Picture, monkeypatch) -> None:
    hub.add("you/x", files_of(made))
    hub.cut = (".safetensors",)
    monkeypatch.setattr("time.sleep", lambda seconds: setattr(hub, "cut", ()))
    assert torch.equal(picture(QuantizedLDMPipeline.from_pretrained("you/x")), picture(pipe))


def test_plan_report_and_profile_come_along_and_may_be_missing(hub, made: Path, pipe, picture: Picture) -> None:
    files = files_of(made)
    hub.add("you/x", files)
    loaded = QuantizedLDMPipeline.from_pretrained("you/x")
    assert (loaded.plan, loaded.report, loaded.profile) == (pipe.plan, pipe.report, pipe.profile)
    hub.add("you/bare", {name: data for name, data in files.items() if "/" in name or name == "model_index.json"})
    bare = QuantizedLDMPipeline.from_pretrained("you/bare")
    assert (bare.plan, bare.report, bare.profile) == (None, None, None)
    assert torch.equal(picture(bare), picture(pipe))


def test_the_description_that_is_sent_along_with_a_download_tells_no_paths(hub, made: Path) -> None:
    """Trap G33: the quantizer's config goes to the hub in the user-agent header."""
    hub.add("you/x", files_of(made))
    UNet2DModel.from_pretrained("you/x", subfolder="unet")
    sent = "\n".join(hub.headers)
    assert "quant" in sent
    for secret in ("jane-doe", str(Path.home()) + "/", str(made.parent)):
        assert secret not in sent


def test_once_loaded_no_hub_is_needed(hub, made: Path, pipe, picture: Picture) -> None:
    hub.add("you/x", files_of(made))
    QuantizedLDMPipeline.from_pretrained("you/x")
    hub.requests.clear()
    assert torch.equal(picture(QuantizedLDMPipeline.from_pretrained("you/x", local_files_only=True)), picture(pipe))
    assert torch.equal(picture(DiffusionPipeline.from_pretrained("you/x", local_files_only=True)), picture(pipe))
    assert hub.requests == []


@pytest.fixture
def checked(hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], set[str]]:
    """On the hub as you/sd: a Stable Diffusion whose safety checker cannot be loaded, with weights in both formats. The
    cache of results is on. Gives: files below a folder that were asked for."""
    MAKERS["sd"]().save_pretrained(tmp_path / "sd")
    files = files_of(tmp_path / "sd")
    index = json.loads(files["model_index.json"])
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    files["model_index.json"] = json.dumps(index).encode()
    files |= {f"safety_checker/{name}": b"junk" for name in ("config.json", "model.safetensors", "pytorch_model.bin")}
    files |= {"unet/diffusion_pytorch_model.bin": b"junk", "vae/diffusion_pytorch_model.bin": b"junk"}
    files |= {"text_encoder/pytorch_model.bin": b"junk"}
    hub.add("you/sd", files)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(SWITCH)

    def asked(folder: str) -> set[str]:
        paths = (path.partition("/resolve/")[2].partition("/")[2] for _, path, _ in hub.requests)
        return {path for path in paths if path.startswith(f"{folder}/")}

    return asked


def test_a_component_that_was_left_out_is_not_downloaded_to_look_a_result_up(checked) -> None:
    common: Any = {"plan": "uniform", "inputs": INPUTS["sd"], "safety_checker": None}
    pipe = QuantizedLDMPipeline.from_pretrained("you/sd", **common)
    assert pipe.safety_checker is None
    assert checked("safety_checker") == set()
    assert "unet/diffusion_pytorch_model.safetensors" in checked("unet")
    assert len(list(cache_folder().iterdir())) == 1
    again = QuantizedLDMPipeline.from_pretrained("you/sd", **common)
    assert again.report == pipe.report
    assert len(list(cache_folder().iterdir())) == 1


def test_looking_a_result_up_downloads_the_format_that_was_asked_for(checked) -> None:
    entry = find_entry("you/sd", Request.taken({}, None, None, inputs=None, settings=None), {"use_safetensors": False})
    assert entry is not None
    assert "unet/diffusion_pytorch_model.bin" in checked("unet")
    assert not [path for name in ("unet", "vae", "text_encoder") for path in checked(name) if "safetensors" in path]
