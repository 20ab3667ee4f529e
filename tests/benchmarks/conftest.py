"""What the tests of the training scripts share: the scripts as modules, a few pictures, an interruption."""

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "train"


@pytest.fixture(scope="module")
def training_script() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a training script by its name, on one thread: the networks are too small to gain from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def draw_picture() -> Callable[[Path, int], None]:
    """Writes a picture of random blocks, another for each seed."""

    def draw(path: Path, seed: int) -> None:
        blocks = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)  # not square on purpose
        Image.fromarray(blocks).resize((32, 24), Image.Resampling.NEAREST).save(path)

    return draw


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, draw_picture: Callable[[Path, int], None]) -> Path:
    """Eight pictures in Hugging Face's imagefolder layout."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for index in range(8):
        draw_picture(folder / f"{index}.png", index)
        rows.append(json.dumps({"file_name": f"{index}.png", "text": f"Square number {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="session")
def same_weights() -> Callable[[Path, Path], list[Path]]:
    """Asserts that two output folders hold the same tensors, bit for bit; gives the files compared."""

    def compare(one: Path, other: Path) -> list[Path]:
        found = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
        for path in found:
            expected, measured = load_file(one / path), load_file(other / path)
            assert expected.keys() == measured.keys()
            for name in expected:
                assert torch.equal(expected[name], measured[name]), f"{path}: {name}"
        return found

    return compare


@pytest.fixture(scope="module")
def interrupted(
    training_script: Callable[[str], ModuleType],
) -> Callable[[int], AbstractContextManager[None]]:
    """Within it, training ends as Ctrl-C would end it, after so many steps."""
    run_class = training_script("training_loop").Run
    advance = run_class.advance

    @contextmanager
    def after(steps: int) -> Iterator[None]:
        def advance_or_end(run: object) -> float:
            if run.step == steps:  # type: ignore[attr-defined]
                raise KeyboardInterrupt
            return advance(run)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_class, "advance", advance_or_end)
            yield

    return after
