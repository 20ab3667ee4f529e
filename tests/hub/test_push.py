"""Pushing a quantized pipeline to a hub and loading it from there, over HTTP."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_ldmq import QuantizedLDMPipeline
from diffusers_ldmq.card import MARK
from diffusers_ldmq.errors import LDMQError

SIDE = {"README.md", "plan.json", "report.json", "profile.json", "sqnr.png"}
Picture = Callable[[Any], torch.Tensor]


def test_a_pushed_pipeline_loads_from_the_hub_with_the_same_pictures(hub, pipe, picture: Picture, fresh_cache) -> None:
    url = pipe.push_to_hub("me/x", images=2, steps=2)
    assert url == f"{hub.url}/me/x/commit/{hub.repos['me/x'].branches['main']}"
    assert hub.repos["me/x"].files().keys() >= SIDE | {"samples.png", "model_index.json", "unet/config.json"}
    expected = picture(pipe)
    fresh_cache()
    assert torch.equal(picture(DiffusionPipeline.from_pretrained("me/x")), expected)
    fresh_cache()
    loaded = QuantizedLDMPipeline.from_pretrained("me/x")
    assert torch.equal(picture(loaded), expected)
    assert (loaded.plan, loaded.report, loaded.profile) == (pipe.plan, pipe.report, pipe.profile)


IN_A_NEW_PROCESS = """
import sys, torch
from diffusers_ldmq.__main__ import main
try:
    main(["push", sys.argv[1], "me/x", "--images", "0"])
except SystemExit as stop:
    assert not stop.code, stop.code
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("me/x")
generator = torch.Generator().manual_seed(0)
made = pipe(batch_size=1, generator=generator, num_inference_steps=2, output_type="numpy")
torch.save(torch.as_tensor(made.images), sys.argv[2])
"""


def test_with_nothing_but_the_environment_set_it_works_too(hub, pipe, made, picture, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(made), str(tmp_path / "picture.pt")]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=root, env={**os.environ, **settings}
    )
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.url}/me/x/commit/" in done.stdout
    assert torch.equal(torch.load(tmp_path / "picture.pt", weights_only=True), picture(pipe))


def test_a_private_repository_is_created_as_private_and_hidden_from_others(hub, pipe, monkeypatch, fresh_cache) -> None:
    pipe.push_to_hub("me/secret", private=True, images=0)
    assert hub.repos["me/secret"].private
    pipe.push_to_hub("me/open", private=False, images=0)
    assert not hub.repos["me/open"].private
    fresh_cache()
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(LDMQError, match="me/secret: neither a folder here nor a model that the hub shows you"):
        QuantizedLDMPipeline.from_pretrained("me/secret")
    assert QuantizedLDMPipeline.from_pretrained("me/secret", token="hf_write").report is not None  # noqa: S106


def test_private_is_never_taken_for_a_public_repository_that_is_there(hub, pipe) -> None:
    hub.add("me/x", {"README.md": b"mine"})
    with pytest.raises(LDMQError, match=r"me/x: exists already and is public; change that in its settings"):
        pipe.push_to_hub("me/x", private=True, images=0)
    assert hub.repos["me/x"].files() == {"README.md": b"mine"}


def test_a_revision_is_a_branch_that_leaves_main_alone(hub, pipe, picture: Picture, fresh_cache) -> None:
    hub.add("me/x", {"README.md": b"mine"})
    pipe.push_to_hub("me/x", revision="w8a8", images=0)
    pipe.push_to_hub("me/x", revision="w8a8", images=0, commit_message="again")
    assert hub.repos["me/x"].files() == {"README.md": b"mine"}
    assert "unet/config.json" in hub.repos["me/x"].files("w8a8")
    fresh_cache()
    loaded = QuantizedLDMPipeline.from_pretrained("me/x", revision="w8a8")
    assert torch.equal(picture(loaded), picture(pipe))


def test_a_pull_request_leaves_main_alone(hub, pipe) -> None:
    hub.add("me/x", {"a.txt": b"a"})
    pipe.push_to_hub("me/x", create_pr=True, images=0)
    assert hub.repos["me/x"].files() == {"a.txt": b"a"}
    assert hub.repos["me/x"].files("refs/pr/1").keys() >= SIDE


def test_saving_with_push_to_hub_takes_everything_along(hub, pipe, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "named", push_to_hub=True, private=True, images=0)
    assert hub.repos["me/named"].private
    assert hub.repos["me/named"].files().keys() >= SIDE
    pipe.save_pretrained(tmp_path / "named", push_to_hub=True, repo_id="me/other", images=0, max_shard_size="10KB")
    assert hub.repos["me/other"].files().keys() >= SIDE | {"unet/diffusion_pytorch_model.safetensors.index.json"}
    assert (tmp_path / "named" / "plan.json").is_file()


def test_a_name_without_owner_is_the_users_own(hub, pipe) -> None:
    assert "/me/x/commit/" in pipe.push_to_hub("x", images=0)
    assert 'from_pretrained("me/x")' in hub.repos["me/x"].files()["README.md"].decode()


def test_our_card_is_written_anew_and_somebodys_stays(hub, pipe, fresh_cache) -> None:
    pipe.push_to_hub("me/x", images=0, license="mit")
    fresh_cache()
    pipe.push_to_hub("me/x", images=0, license="apache-2.0")
    card = hub.repos["me/x"].files()["README.md"].decode()
    assert "license: apache-2.0" in card
    mine = card.replace(MARK, "") + "\nMy own words."
    hub.repos["me/x"].commit("main", {**hub.repos["me/x"].files(), "README.md": mine.encode()})
    fresh_cache()
    pipe.push_to_hub("me/x", images=0, license="mit")
    assert hub.repos["me/x"].files()["README.md"].decode() == mine


def test_weights_of_an_earlier_push_do_not_stay_beside_the_new_ones(hub, pipe, picture: Picture, fresh_cache) -> None:
    first = {
        "unet/diffusion_pytorch_model.safetensors.index.json": b"{}",
        "unet/old.safetensors": b"",
        "notes.txt": b"n",
    }
    hub.add("me/x", first)
    pipe.push_to_hub("me/x", images=0)
    files = hub.repos["me/x"].files()
    names = {name for name in files if name.startswith("unet/")}
    assert names == {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert files["notes.txt"] == b"n"
    fresh_cache()
    assert torch.equal(picture(QuantizedLDMPipeline.from_pretrained("me/x")), picture(pipe))


def test_nothing_that_is_pushed_tells_paths_users_or_tokens(hub, made: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(made.parent)
    pipe = QuantizedLDMPipeline.from_pretrained(made)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.register_to_config(_name_or_path=str(made / "unet"))
    pipe.push_to_hub("me/x", images=1, steps=2, token="hf_write")  # noqa: S106
    secrets = ["jane-doe", str(made.parent), str(tmp_path), "hf_write", f"{Path.home()}/"]
    for name, data in hub.repos["me/x"].files().items():
        for secret in secrets:
            assert secret.encode() not in data, f"{name} holds {secret}"
    assert json.loads(hub.repos["me/x"].files()["unet/config.json"])["_name_or_path"] == "unet"


def test_what_a_model_was_made_of_survives_loading_and_pushing(hub, pipe, made: Path) -> None:
    pipe.push_to_hub("me/x", images=0)
    assert json.loads((made / "model_index.json").read_text())["_name_or_path"] == "float"
    assert json.loads(hub.repos["me/x"].files()["model_index.json"])["_name_or_path"] == "float"


REFUSED = {
    "no login": ({"token": False}, "me/x", r"me/x: the hub does not know you, .* log in with `hf auth login`"),
    "wrong token": ({"token": "hf_wrong"}, "me/x", "me/x: the hub does not know you, or does not accept the token"),
    "another's name": ({}, "you/x", "you/x: the hub does not let your account or token do this"),
    "no hub id": ({}, "a/b/c", "a/b/c: it is no hub id; one looks like owner/name"),
    "odd letters": ({}, "me/ü", "me/ü: it is no hub id"),
    "request beside revision": ({"create_pr": True, "revision": "b"}, "me/x", "a pull request always goes to main"),
    "base model a path": ({"base_model": "./float"}, "me/x", "base model './float': is no hub id"),
    "unknown keyword": ({"licence": "mit"}, "me/x", "push_to_hub takes no keyword 'licence'"),
    "unknown license": ({"license": "nonsense"}, "me/x", 'the hub refused it .*"license" must be one of'),
    "prompts that it does not take": ({"prompts": ["a"]}, "me/x", "takes neither prompts nor labels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_or_the_card_refuses_is_one_line(name: str, hub, pipe) -> None:
    options, repo_id, expected = REFUSED[name]
    with pytest.raises(LDMQError, match=expected) as caught:
        pipe.push_to_hub(repo_id, **{"images": 0, **options})
    assert "\n" not in str(caught.value)
    assert all("unet/config.json" not in repo.files() for repo in hub.repos.values())


def test_a_hub_that_is_not_there_is_one_line(hub, pipe, monkeypatch, impatient) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LDMQError, match=r"me/x: the hub cannot be reached, or the connection was lost \(.*refused"):
        pipe.push_to_hub("me/x", images=0)


def test_an_upload_that_breaks_off_leaves_no_half_model_and_can_be_repeated(hub, pipe, impatient, fresh_cache) -> None:
    hub.cut_uploads = True
    with pytest.raises(LDMQError, match="me/x: the hub cannot be reached, or the connection was lost"):
        pipe.push_to_hub("me/x", images=0)
    assert hub.repos["me/x"].files().keys() == {".gitattributes"}
    hub.cut_uploads = False
    pipe.push_to_hub("me/x", images=0)
    assert QuantizedLDMPipeline.from_pretrained("me/x").plan == pipe.plan
