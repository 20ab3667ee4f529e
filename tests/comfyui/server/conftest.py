"""A real ComfyUI server for the tests of this folder, by COMFYUI_PATH and COMFYUI_PYTHON; skipped in words without."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from comfyui.server.comfy_server import HERE, REPOSITORY, Installation, Server
from comfyui.server.facts import Facts
from comfyui.server.prompts import small_run

PACK = "diffusers-ldmq"
SKIPPED = (
    "COMFYUI_PATH and COMFYUI_PYTHON are not both set, so no ComfyUI server was started and nothing was tested end to "
    "end (set them to a ComfyUI folder and to the Python that has its requirements)"
)


@pytest.fixture(scope="session")
def installation() -> Installation:
    """The ComfyUI that the environment names."""
    path, python = os.environ.get("COMFYUI_PATH"), os.environ.get("COMFYUI_PYTHON")
    if not path or not python:
        pytest.skip(SKIPPED)
    assert (Path(path) / "main.py").is_file(), f"COMFYUI_PATH is {path}, which holds no ComfyUI"
    return Installation(Path(path), python)


@pytest.fixture(scope="session")
def facts(request: pytest.FixtureRequest, installation: Installation) -> Iterator[Facts]:
    """What the tests measure; written to docs/comfyui-tested.md where LDMQ_RECORD_COMFYUI=1 and all of them passed."""
    found = Facts(installation)
    yield found
    if os.environ.get("LDMQ_RECORD_COMFYUI") == "1" and request.session.testsfailed == 0:
        found.write()


@pytest.fixture(scope="session")
def stock_models(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with a small random SD 1.5 checkpoint and a LoRA, under the names that the workflows use."""
    folder = tmp_path_factory.mktemp("stock") / "models"
    command = [installation.python, str(HERE / "stock_files.py"), str(installation.path), str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def start(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """(custom nodes by name, options ...) -> a server with a base folder of its own; all are stopped in the end."""
    running: list[Server] = []

    def begin(packs: dict[str, Path], *options: str, environment: dict[str, str] | None = None) -> Server:
        server = Server(installation, tmp_path_factory.mktemp("comfyui"), *options, environment=environment)
        for name, source in packs.items():
            (server.base / "custom_nodes" / name).symlink_to(source, target_is_directory=True)
        running.append(server.start())
        return server

    yield begin
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def server(start: Callable[..., Server]) -> Server:
    """One server with this repository linked into custom_nodes, for all tests that do not harm it."""
    return start({PACK: REPOSITORY, "probe": HERE / "probe"})


@pytest.fixture(scope="session")
def stock_server(server: Server, stock_models: Path) -> Server:
    """The same, with the stock checkpoint and LoRA."""
    for kind in ("checkpoints", "loras"):
        target = server.base / "models" / kind
        target.mkdir(parents=True, exist_ok=True)
        for file in (stock_models / kind).iterdir():
            (target / file.name).symlink_to(file)
    return server


@pytest.fixture
def survivor(server: Server) -> Iterator[Server]:
    """The server, for a test that mistreats it: afterwards it lives, and a small run works."""
    yield server
    assert server.is_alive()
    assert server.run(small_run()).error is None
