"""`ldmq push`: the same from the command line, a dry run that asks nobody, one line for every mistake."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from diffusers_ldmq import QuantizedLDMPipeline


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_pushed_with_pictures_of_both_models(hub, made: Path, float_folder: Path, ldmq) -> None:
    before = {name: (made / name).read_bytes() for name in files_in(made)}
    common = ("--float", float_folder, "--images", 2, "--steps", 2, "--license", "mit", "--private", "--json")
    result = ldmq("push", made, "me/x", *common)
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["url"].startswith(f"{hub.url}/me/x/commit/")
    assert (data["repo_id"], data["license"], data["base_model"]) == ("me/x", "mit", None)
    files = hub.repos["me/x"].files()
    assert hub.repos["me/x"].private
    assert files.keys() == {*before, ".gitattributes", "README.md", "samples.png", "sqnr.png"}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert files[weights] == before[weights]
    assert b"Float above, quantized below" in files["README.md"]
    assert {name: (made / name).read_bytes() for name in files_in(made)} == before
    assert "note: the card names no base model" in result.err


def test_a_dry_run_writes_what_would_be_pushed_and_asks_nobody(hub, made: Path, tmp_path: Path, ldmq, picture) -> None:
    out = tmp_path / "look"
    result = ldmq("push", made, "me/x", "--dry-run", "-o", out, "--images", 1, "--steps", 2, "--base-model", "you/base")
    assert result.code == 0, result.err
    assert str(out) in result.out
    assert hub.requests == []
    assert hub.repos == {}
    assert files_in(out) == files_in(made) | {"README.md", "samples.png", "sqnr.png"}
    assert ModelCard.load(out / "README.md").data.to_dict()["base_model"] == "you/base"
    assert "a dry run does not ask the hub" in result.err
    assert not any(path.is_symlink() for path in out.rglob("*"))
    loaded, original = QuantizedLDMPipeline.from_pretrained(out), QuantizedLDMPipeline.from_pretrained(made)
    assert torch.equal(picture(loaded), picture(original))


def test_a_dry_run_goes_to_a_folder_of_the_models_name(made: Path, tmp_path: Path, ldmq, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ldmq("push", made, "me/x", "--dry-run", "--images", 0).code == 0
    assert os.listdir(tmp_path) == ["x-dry-run"]
    ldmq("push", made, "me/x", "--dry-run", "--images", 0).is_refused("x-dry-run: the folder exists and is not empty")


def test_an_edited_card_is_pushed_as_it_is(hub, made: Path, tmp_path: Path, ldmq) -> None:
    folder = shutil.copytree(made, tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    result = ldmq("push", folder, "me/x", "--images", 0)
    assert result.code == 0, result.err
    assert hub.repos["me/x"].files()["README.md"] == (folder / "README.md").read_bytes()
    assert "README.md is taken as it is; delete it to have the card written anew" in result.err
    (folder / "README.md").write_text("---\nlicense: mit\n---\nBetter words.\n")
    assert ldmq("push", folder, "me/x", "--images", 0).code == 0
    assert b"Better words" in hub.repos["me/x"].files()["README.md"]


def test_a_branch_from_the_command_line(hub, made: Path, ldmq) -> None:
    assert ldmq("push", made, "me/x", "--revision", "try", "--images", 0).code == 0
    assert hub.repos["me/x"].files().keys() == {".gitattributes"}
    assert "unet/config.json" in hub.repos["me/x"].files("try")


def test_hidden_files_stay_here(hub, made: Path, tmp_path: Path, ldmq) -> None:
    folder = shutil.copytree(made, tmp_path / "model")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("token")
    (folder / ".env").write_text("SECRET=1")
    assert ldmq("push", folder, "me/x", "--images", 0).code == 0
    assert hub.repos["me/x"].files().keys() == {*files_in(made), ".gitattributes", "README.md", "sqnr.png"}


def test_what_is_no_folder_of_ours_is_refused_before_the_hub_is_asked(
    hub, made: Path, float_folder: Path, tmp_path: Path, ldmq
) -> None:
    ldmq("push", tmp_path / "none", "me/x").is_refused("none: no such folder; give one that `ldmq quantize`")
    ldmq("push", "me/y", "me/x").is_refused("me/y: no such folder")
    (tmp_path / "empty").mkdir()
    ldmq("push", tmp_path / "empty", "me/x").is_refused("is no diffusers pipeline folder")
    ldmq("push", float_folder, "me/x").is_refused("is a float pipeline; quantize it first with `ldmq quantize`")
    ldmq("push", made, "a/b/c").is_refused("a/b/c: it is no hub id; one looks like owner/name")
    ldmq("push", made, "me/x", "-o", tmp_path / "o").is_refused("only --dry-run writes a folder")
    ldmq("push", made, "me/x", "--create-pr", "--revision", "b").is_refused("a pull request always goes to main")
    ldmq("push", made, "me/x", "--prompts", tmp_path / "none.txt").is_refused("none.txt: no such file")
    ldmq("push", made, "me/x", "--base-model", "float").is_refused("base model 'float': is no hub id")
    assert hub.requests == []


def test_what_the_hub_refuses_is_one_line_before_anything_is_drawn(hub, made: Path, ldmq, monkeypatch) -> None:
    ldmq("push", made, "you/x").is_refused("you/x: the hub does not let your account or token do this")
    ldmq("push", made, "me/x", "--token", "hf_wrong").is_refused("me/x: the hub does not know you")
    monkeypatch.delenv("HF_TOKEN")
    ldmq("push", made, "me/x").is_refused("me/x: the hub does not know you", "hf auth login")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    ldmq("push", made, "me/x").is_refused("me/x: the hub cannot be reached", "refused")
    assert hub.repos == {}


def test_the_float_model_must_be_the_one_that_was_quantized(hub, made: Path, ldmq) -> None:
    result = ldmq("push", made, "me/x", "--float", "emoji-sd", "--dry-run", "--steps", 2)
    result.is_refused("has other layers than this model; give its original")


LOADING = {
    "info": (),
    "sample": ("-o", "{tmp}/out.png", "--steps", 2),
    "quantize": ("--out", "{tmp}/q", "--steps", 2),
}


@pytest.mark.parametrize("command", LOADING)
def test_a_download_cut_half_way_is_one_line_and_can_be_repeated(
    command: str, hub, made: Path, tmp_path: Path, ldmq, impatient
) -> None:
    source = made.parent / "float" if command == "quantize" else made
    hub.add("you/x", {name: (source / name).read_bytes() for name in files_in(source)})
    options = [str(option).replace("{tmp}", str(tmp_path)) for option in LOADING[command]]
    hub.cut = (".safetensors",)
    ldmq(command, "you/x", *options).is_refused("you/x: the hub cannot be reached, or the connection was lost")
    hub.cut = ()
    assert ldmq(command, "you/x", *options).code == 0


def test_gated_and_missing_models_are_one_line_on_the_command_line(hub, made: Path, ldmq) -> None:
    hub.add("you/x", {name: (made / name).read_bytes() for name in files_in(made)}, gated=True)
    ldmq("info", "you/x").is_refused("you/x: the model is gated: accept its conditions", "hf auth login")
    ldmq("info", "you/y").is_refused("you/y: neither a folder here nor a model that the hub shows you")
