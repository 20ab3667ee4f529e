"""A real ComfyUI server: started on a free port with folders of its own, talked to as its browser does, and ended."""

import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from comfyui.server.web_socket import Listener

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
FOLDERS = ("custom_nodes", "models", "input", "output", "user", "temp")
START_SECONDS, RUN_SECONDS = 120, 900


@dataclass(frozen=True, slots=True)
class Installation:
    """A ComfyUI folder and the Python that runs it."""

    path: Path
    python: str

    def version(self) -> str:
        """Such as 0.29.0."""
        text = (self.path / "comfyui_version.py").read_text(encoding="utf-8")
        return text.split('__version__ = "')[1].split('"')[0]


@dataclass
class Ran:
    """One prompt that was run. outputs: node id -> what the browser got of it; error: of the node that failed, as
    ComfyUI tells it ('exception_message', 'exception_type', 'node_type', 'traceback'), or None; interrupted: whether
    the user's stop ended it."""

    outputs: dict[str, Any]
    error: dict[str, Any] | None = None
    interrupted: bool = False
    seconds: float = 0.0
    refused: dict[str, Any] = field(default_factory=dict)

    def message(self) -> str:
        """What the failed node says."""
        return "" if self.error is None else str(self.error["exception_message"]).strip()


class Server:
    """A running server. base: its folders; log: what it has printed so far."""

    def __init__(
        self, installation: Installation, base: Path, *options: str, environment: dict[str, str] | None = None
    ) -> None:
        self.installation, self.base, self.options = installation, base, options
        self.environment = environment or {}
        for name in FOLDERS:
            (base / name).mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.client = f"test-{self.port}"
        self._log = (base / "server.log").open("w+", encoding="utf-8")
        self.imported_at_start: set[str] = set()
        self._process: subprocess.Popen[str] | None = None

    @property
    def log(self) -> str:
        """What the server has printed."""
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    def start(self) -> "Server":
        """Wait until it answers. Raises AssertionError with the end of its log if it does not."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE / "only_this_tree"),
            "HF_HOME": str(self.base / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "LDMQ_CACHE": "1",  # the other tests turn it off
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            **self.environment,
        }
        command = [self.installation.python, str(self.installation.path / "main.py"), "--cpu", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), *self.options]
        self._process = subprocess.Popen(
            command, cwd=self.base, env=environment, stdout=self._log, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self.get("/system_stats")
            except (URLError, ConnectionError):
                time.sleep(0.2)
            else:
                if "probe" in os.listdir(self.base / "custom_nodes"):
                    self.imported_at_start = set(self.get("/probe/modules"))
                return self
        self.stop()
        raise AssertionError(f"ComfyUI {self.installation.version()} did not start:\n{self.log[-3000:]}")

    def stop(self) -> None:
        """End the server."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def is_alive(self) -> bool:
        """Whether it still runs and answers."""
        return self._process is not None and self._process.poll() is None and "system" in self.get("/system_stats")

    def memory(self) -> int:
        """Resident bytes of the server's process."""
        assert self._process is not None
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def worked(self) -> float:
        """CPU seconds that the server's process has used: on a machine that does other work too, the fair clock."""
        assert self._process is not None
        times = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")

    def get(self, path: str) -> Any:
        """JSON of a GET."""
        return json.loads(self.read(path))

    def read(self, path: str) -> bytes:
        """Body of a GET."""
        with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read()

    def send(self, path: str, data: Any = None) -> Any:
        """JSON of a POST; of one that is refused, what it says."""
        body = json.dumps(data or {}).encode()
        request = Request(f"http://127.0.0.1:{self.port}{path}", body, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=60) as answer:
                text = answer.read()
        except HTTPError as refusal:
            text = refusal.read()
        return json.loads(text) if text else None

    def listen(self) -> Listener:
        """A WebSocket on which the server tells what it does."""
        return Listener(self.port, self.client)

    def queue(self, prompt: dict[str, Any]) -> str:
        """Ask for a run of an API-format workflow; its id. Raises AssertionError if any node is refused."""
        answer = self.send("/prompt", {"prompt": prompt, "client_id": self.client})
        assert "prompt_id" in answer, answer
        assert not answer["node_errors"], answer["node_errors"]
        return answer["prompt_id"]

    def result(self, ident: str) -> Ran:
        """Wait until the run with that id is over."""
        begun = time.monotonic()
        while time.monotonic() < begun + RUN_SECONDS:
            entry = self.get(f"/history/{ident}").get(ident)
            # success is told a moment before the outputs are there
            if entry and entry["status"] and (entry["outputs"] or entry["status"]["status_str"] == "error"):
                return _ran(entry)
            assert self._process is None or self._process.poll() is None, f"the server died:\n{self.log[-3000:]}"
            time.sleep(0.1)
        raise AssertionError(f"no result after {RUN_SECONDS} s:\n{self.log[-3000:]}")

    def run(self, prompt: dict[str, Any]) -> Ran:
        """Run a workflow to its end. Raises AssertionError if any node is refused before it starts."""
        return self.result(self.queue(prompt))

    def stopped(self, ident: str) -> tuple[float, float]:
        """Press Stop while the run with that id is at work; seconds and CPU seconds until it is over."""
        begun, worked = time.monotonic(), self.worked()
        self.send("/interrupt")
        ran = self.result(ident)
        assert ran.interrupted
        assert ran.error is None
        return time.monotonic() - begun, self.worked() - worked

    def refusals(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """What is said about the nodes of a prompt that must not start, or of which an output node is dropped."""
        answer = self.send("/prompt", {"prompt": prompt, "client_id": self.client})
        if "prompt_id" in answer:
            self.result(answer["prompt_id"])
        return answer.get("node_errors", {})


def _ran(entry: dict[str, Any]) -> Ran:
    times = {kind: data.get("timestamp", 0) for kind, data in entry["status"]["messages"]}
    events = dict(entry["status"]["messages"])
    end = max(times.values(), default=0)
    return Ran(
        outputs=entry["outputs"],
        error=events.get("execution_error"),
        interrupted="execution_interrupted" in events,
        seconds=(end - times.get("execution_start", end)) / 1000,
    )


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
