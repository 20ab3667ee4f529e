"""Results are complete or not there: errors, interrupts, no space, folders that may not be replaced."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from diffusers_ldmq.errors import OutputError
from diffusers_ldmq.output import file_beside, folder_beside, folder_into, refuse_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def filled(folder: Path) -> Path:
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    return folder


@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
def test_a_complete_folder_takes_the_place_of_a_new_or_empty_one(existing: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
    with folder_beside(out) as beside:
        (beside / "new.txt").write_text("new")
        assert not (out / "new.txt").exists()
    assert (out / "new.txt").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    with folder_beside(tmp_path / "a" / "b" / "out") as beside:
        (beside / "new.txt").write_text("new")
    assert names(tmp_path / "a" / "b") == ["out"]


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = filled(tmp_path / "out")
    with folder_beside(out, overwrite=True) as beside:
        (beside / "new.txt").write_text("new")
    assert names(out) == ["new.txt"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("interrupt", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupt_leaves_nothing_half_written_and_the_old_folder_as_it_was(
    interrupt: type[BaseException], overwrite: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if overwrite:
        filled(out)
    with pytest.raises(interrupt), folder_beside(out, overwrite=overwrite) as beside:  # noqa: PT012
        (beside / "half.txt").write_text("half")
        raise interrupt
    assert names(tmp_path) == (["out"] if overwrite else [])
    if overwrite:
        assert (out / "old.txt").read_text() == "old"


@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.ENOSPC, "no space left on the disk"), (errno.EDQUOT, "no space left"), (errno.EIO, "error")],
)
def test_a_failing_disk_is_told_in_one_line(number: int, told: str, tmp_path: Path) -> None:
    match = rf"could not be written \(.*{told}.*\); nothing was changed"
    with pytest.raises(OutputError, match=match), folder_beside(tmp_path / "out"):
        raise OSError(number, "as the system says it")
    assert names(tmp_path) == []


def test_a_folder_with_content_is_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    out = filled(tmp_path / "out")
    with pytest.raises(OutputError, match=r"exists and is not empty; pass --overwrite"), folder_beside(out):
        pytest.fail("nothing may run")  # pragma: no cover
    assert names(out) == ["old.txt"]
    refuse_folder(out, overwrite=True)


def test_a_file_in_the_folders_place_or_above_it_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OutputError, match="is a file, a folder is expected"):
        refuse_folder(file, overwrite=True)
    with pytest.raises(OutputError, match="is not a writable folder"):
        refuse_folder(file / "out", overwrite=True)
    assert file.read_text() == "mine"


SAVE_WITH_LITTLE_SPACE = """
import resource, sys
from pathlib import Path
import torch
from diffusers import DDPMPipeline, DDIMScheduler, UNet2DModel
from diffusers_ldmq.errors import OutputError
from diffusers_ldmq.pipeline import save_pipeline

unet = UNet2DModel(sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                   up_block_types=("UpBlock2D",), norm_num_groups=8, layers_per_block=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_pipeline(DDPMPipeline(unet, DDIMScheduler()), Path(sys.argv[1]), overwrite=True)
except OutputError as error:
    sys.stderr.write(f"refused: {error}")
    sys.exit(2)
"""


def test_a_real_save_that_runs_out_of_space_leaves_the_old_folder(tmp_path: Path) -> None:
    out = filled(tmp_path / "out")
    command = [sys.executable, "-W", "ignore", "-c", SAVE_WITH_LITTLE_SPACE, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr
    assert "nothing was changed" in done.stderr
    assert names(tmp_path) == ["out"]
    assert names(out) == ["old.txt"]


@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
def test_a_new_or_empty_folder_is_filled_at_once_or_stays_as_it_was(existing: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()

    def interrupted() -> None:
        with folder_into(out) as place:
            (place / "half.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == (["out"] if existing else [])
    assert not existing or names(out) == []
    with folder_into(out) as place:
        (place / "part").mkdir()
        (place / "part" / "new.txt").write_text("new")
        assert not (out / "part").exists()
    assert (out / "part" / "new.txt").read_text() == "new"
    assert names(tmp_path) == ["out"]
    assert names(out) == ["part"]


def test_an_empty_folder_stays_the_folder_that_it_was(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    before = (tmp_path / "real").stat().st_ino
    with folder_into(tmp_path / "link") as place:
        (place / "new.txt").write_text("new")
    assert names(tmp_path / "real") == ["new.txt"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_ino == before


def test_a_folder_with_files_keeps_those_of_other_names(tmp_path: Path) -> None:
    out = filled(tmp_path / "out")
    with folder_into(out) as place:
        (place / "new.txt").write_text("new")
    assert names(out) == ["new.txt", "old.txt"]


def test_places_that_cannot_be_written_into_are_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: is a file, a folder is expected"), folder_into(tmp_path / "file"):
        pass
    below = tmp_path / "file" / "out"
    with pytest.raises(OutputError, match="out: cannot be created, .*is not a writable folder"), folder_into(below):
        pass


@pytest.mark.parametrize("existing", [False, True], ids=["new", "with files"])
def test_no_space_while_writing_into_a_folder_is_one_line(existing: bool, tmp_path: Path) -> None:
    out = filled(tmp_path / "out") if existing else tmp_path / "out"
    with pytest.raises(OutputError, match=r"could not be written \(no space left on the disk\)"), folder_into(out):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_safetensors_finds_full_is_told_and_the_earlier_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "unit.safetensors"
    path.write_bytes(b"earlier")

    def write() -> None:
        with file_beside(path) as beside:
            beside.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OutputError, match="no space left on the disk"):
        write()
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("unit.safetensors", b"earlier")]
