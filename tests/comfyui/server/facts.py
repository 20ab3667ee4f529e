"""What tests on a real server measured, for docs/comfyui-tested.md."""

import os
import platform
import subprocess
from datetime import UTC, datetime

from comfyui.server.comfy_server import REPOSITORY, Installation

FILE = REPOSITORY / "docs" / "comfyui-tested.md"
HEAD = """# Tested on real ComfyUI servers

Written by the tests themselves (`tests/comfyui/server`): each section is one run on one version of ComfyUI, without a
GPU (`--cpu`). To test and write anew:

```bash
LDMQ_RECORD_COMFYUI=1 COMFYUI_PATH=/path/to/ComfyUI COMFYUI_PYTHON=/path/to/its/python pytest tests/comfyui/server
```

The native workflows ran on a random checkpoint of SD 1.5's kind (one short level of 320 channels), with 2 steps and
64x64 pixels instead of 20 and 512x512; the bundled model ran as in its workflow. Times are of a machine that did other
work too. Not tested: CUDA, dynamic VRAM, several GPUs, downloads from the hub.
"""
PACKAGES = ("torch", "diffusers", "transformers", "comfy-kitchen", "comfyui-frontend-package")


class Facts:
    """Rows (what ran, what came out) of one version."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.rows: list[tuple[str, str]] = []

    def add(self, what: str, result: str) -> None:
        """Remember a row; call it when the checks have passed."""
        self.rows.append((what, result))

    def write(self) -> None:
        """Put this version's section into the file, in place of an earlier one."""
        text = FILE.read_text(encoding="utf-8") if FILE.is_file() else HEAD
        parts = text.split("\n## ")
        title = f"ComfyUI {self.installation.version()}"
        others = [part for part in parts[1:] if not part.startswith(f"{title}\n")]
        sections = sorted([*others, self._section(title)], reverse=True)
        FILE.write_text("\n## ".join([HEAD, *(part.rstrip("\n") + "\n" for part in sections)]), encoding="utf-8")

    def _section(self, title: str) -> str:
        rows = "\n".join(f"| {what} | {result} |" for what, result in self.rows)
        return (
            f"{title}\n\n{datetime.now(UTC):%Y-%m-%d}, {platform.system()} {platform.machine()}, "
            f"{os.cpu_count()} cores; {self._versions()}.\n\n| what ran | result |\n|---|---|\n{rows}\n"
        )

    def _versions(self) -> str:
        code = f"from importlib.metadata import version as v; print(', '.join(f'{{n}} {{v(n)}}' for n in {PACKAGES!r}))"
        found = subprocess.run([self.installation.python, "-c", code], capture_output=True, text=True, check=True)
        python = subprocess.run([self.installation.python, "-V"], capture_output=True, text=True, check=True)
        return f"{python.stdout.strip()}, {found.stdout.strip()}"
