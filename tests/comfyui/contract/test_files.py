"""Names that stay inside ComfyUI's folders, and folders that list what they should."""

import os
import time
from pathlib import Path

import pytest
from comfyui.contract.standin import StandIn

from diffusers_ldmq.errors import CheckpointError, OutputError

HOSTILE = [
    "../../x",
    "a/../../x",
    "..",
    "/etc/x",
    "\\x",
    "..\\..\\x",
    "C:x",
    "a|b",
    "x\x00y",
    ".hidden",
    "a/.b",
    "",
    " ",
    "a/",
    "x" * 300,
    "é" * 101,
    "a\ud800",
    "\udcff",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leaves_the_folder_or_cannot_be_is_refused_in_words(stand_in: StandIn, name: str) -> None:
    from comfyui_nodes.files import MODELS, name_problem, new_file

    assert name_problem(name)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"choose another|write"):
            new_file(MODELS, name, overwrite=overwrite)
    assert not [path for path in stand_in.base.rglob("*") if path.is_file()]


def test_the_longest_name_can_be_written_and_a_file_is_no_folder(stand_in: StandIn) -> None:
    from comfyui_nodes.files import LONGEST, MODELS, new_file
    from diffusers_ldmq.output import file_beside

    for overwrite in (False, True):
        path = new_file(MODELS, "x" * LONGEST, overwrite=overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_beside(path) as beside:
            beside.write_bytes(b"")
        assert path.is_file()
        (path.parent / "taken").write_bytes(b"")
        for name in ("taken/x", "taken/x/y"):
            with pytest.raises(OutputError, match=r"is a file; choose another name"):
                new_file(MODELS, name, overwrite=overwrite)


@pytest.mark.parametrize("named", ["x" * 400, "a\ud800", "a\x00b", f"~/{'x' * 256}"])
def test_what_is_neither_folder_nor_hub_id_is_refused_in_words(stand_in: StandIn, named: str) -> None:
    from comfyui_nodes.files import folder_fingerprint, source
    from comfyui_nodes.pipeline_folders import BUNDLED, model_of

    assert folder_fingerprint(named) == ""
    for read in (source, lambda text: model_of(BUNDLED, text)):
        with pytest.raises(CheckpointError, match=r"neither a folder nor a hub id.*owner/name") as caught:
            read(named)
        assert str(caught.value).isprintable()
    assert source(" owner/name ") == "owner/name"
    assert source("~/x") == str(Path.home() / "x")


def test_a_link_that_leads_outside_is_refused(stand_in: StandIn, tmp_path_factory: pytest.TempPathFactory) -> None:
    from comfyui_nodes.files import MODELS, new_file

    outside = tmp_path_factory.mktemp("outside")
    folder = stand_in.base / "models" / MODELS
    folder.mkdir(parents=True)
    (folder / "link").symlink_to(outside)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="through a link"):
            new_file(MODELS, "link/x", overwrite=overwrite)
    assert not list(outside.iterdir())


@pytest.mark.parametrize("name", ["model", "sd15/model", "model.safetensors", "v1.5 (final)"])
def test_files_count_up_and_are_replaced_only_when_asked(stand_in: StandIn, name: str) -> None:
    from comfyui_nodes.files import MODELS, listed, new_file

    folder = stand_in.base / "models" / MODELS
    stem = name.removesuffix(".safetensors")
    for number in (1, 2, 3):
        path = new_file(MODELS, name)
        assert path == folder / f"{stem}_{number:05}_.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    exact = new_file(MODELS, name, overwrite=True)
    assert exact == folder / f"{stem}.safetensors"
    exact.write_bytes(b"")
    assert new_file(MODELS, name, overwrite=True) == exact
    assert len(listed(MODELS)) == 4


def test_models_for_the_stock_loader_go_to_the_folder_of_that_name(stand_in: StandIn) -> None:
    from comfyui_nodes.files import STOCK_MODELS, new_file

    assert new_file(STOCK_MODELS, "x").parent == stand_in.base / "models" / "diffusion_models"


def test_combos_list_finished_files_of_the_right_kind(stand_in: StandIn) -> None:
    from comfyui_nodes.files import MODELS, PLANS, existing, listed

    for kind, names in (
        (PLANS, ["a.json", "b.txt"]),
        (MODELS, ["sub/m.safetensors", ".m.partial-1.safetensors", "x.ckpt"]),
    ):
        for name in names:
            path = stand_in.base / "models" / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
    assert listed(PLANS) == ["a.json"]
    assert listed(MODELS) == [os.path.join("sub", "m.safetensors")]
    assert existing(PLANS, "a.json") == stand_in.base / "models" / PLANS / "a.json"
    for name in ("missing.json", "../ldmq_plans/a.json", str(stand_in.base / "models" / PLANS / "a.json")):
        with pytest.raises(OutputError, match="press R"):
            existing(PLANS, name)


def test_folders_named_in_extra_model_paths_stay(stand_in: StandIn) -> None:
    from comfyui_nodes.files import PLANS, listed, register_folders

    paths = stand_in.modules["folder_paths"]
    paths.folder_names_and_paths[PLANS] = ([str(stand_in.base / "elsewhere")], set())
    (stand_in.base / "elsewhere").mkdir()
    (stand_in.base / "elsewhere" / "theirs.json").write_text("")
    register_folders()
    assert listed(PLANS) == ["theirs.json"]
    assert str(stand_in.base / "models" / PLANS) in paths.folder_names_and_paths[PLANS][0]


def test_a_fingerprint_changes_with_the_file(stand_in: StandIn) -> None:
    from comfyui_nodes.files import NO_FILE, PLANS, fingerprint, folder_fingerprint

    path = stand_in.base / "models" / PLANS / "a.json"
    path.parent.mkdir(parents=True)
    path.write_text("1")
    first = fingerprint(PLANS, "a.json")
    assert first == fingerprint(PLANS, "a.json")
    _changed(path, "2")
    assert fingerprint(PLANS, "a.json") != first
    assert fingerprint(PLANS, NO_FILE) == fingerprint(PLANS, "missing.json") == fingerprint(PLANS, "../a.json") == ""
    before = folder_fingerprint(str(stand_in.base / "models"))
    _changed(path, "3")
    assert before != folder_fingerprint(str(stand_in.base / "models")) != ""
    before = folder_fingerprint(str(path.parent))
    _changed(path, "of the folder itself")
    assert before != folder_fingerprint(str(path.parent)) != ""
    assert folder_fingerprint("") == folder_fingerprint("name/model") == ""


def _changed(path: Path, text: str) -> None:
    path.write_text(text)
    later = time.time_ns() + 10**9
    os.utime(path, ns=(later, later))
