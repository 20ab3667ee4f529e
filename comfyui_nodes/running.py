"""A node at work: progress with the stage's name, interrupts, and errors that say one clear thing."""

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import comfy.model_management
import comfy.utils

from .memory import is_out_of_memory
from .texts import in_node_words

TOLD_EVERY = 0.25
"""Seconds between two texts on a node: the browser need not draw more."""
MODULES = frozenset(
    {
        "PIL",
        "accelerate",
        "comfy_kitchen",
        "diffusers",
        "diffusers_ldmq",
        "huggingface_hub",
        "jinja2",
        "matplotlib",
        "numpy",
        "rich",
        "safetensors",
        "scipy",
        "torch",
        "torchmetrics",
        "transformers",
        "typer",
        "yaml",
    }
)
"""What must be installed, by the names that are imported."""
TRANSFORMERS = 5
"""The oldest major version that will do. ComfyUI is content with 4, so it is not among the requirements to install."""


class Task:
    """Tells how far one node is, and stops it when the user says so.

    An instance is a diffusers_ldmq Progress: task(done, total); `stage` is a StageProgress.
    """

    def __init__(self, node: type, name: str) -> None:
        self.node, self.name = node, name
        self._bar: Any = None
        self._told = 0.0

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` parts of the stage are finished. Raises ComfyUI's interrupt if the user asked for it."""
        self.check()
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(total)
        self._bar.update_absolute(done, total)
        now = time.monotonic()
        if now - self._told >= TOLD_EVERY:
            self._told = now
            show_text(self.node, f"{self.name}: {100 * done // max(total, 1)} %")

    def check(self) -> None:
        """Raises ComfyUI's interrupt if the user asked for it: between parts that are not counted."""
        comfy.model_management.throw_exception_if_processing_interrupted()

    def stage(self, name: str, done: int, total: int) -> None:
        """The same for a job of several stages."""
        if name != self.name:
            self.name, self._told = name, 0.0
        self(done, total)

    def preview(self, done: int, total: int, image: Any) -> None:
        """The same with a picture to show beneath the node. image: ("JPEG", PIL image, longest side in pixels)."""
        self(done, total)
        self._bar.update_absolute(done, total, image)


@contextmanager
def running(node: type, name: str) -> Iterator[Task]:
    """Around all that a node does. node: the class that ComfyUI runs; name: of the (first) stage, shown on the node.

    Import what is heavy inside. LDMQErrors come out in the words of nodes; running out of memory, missing requirements
    and what the system says about files become one message; ComfyUI's interrupt and every other error pass.
    """
    show_text(node, f"{name} ...")
    try:
        _check_transformers()
        yield Task(node, name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in MODULES:
            raise
        raise ModuleNotFoundError(_missing(error), name=error.name) from error
    except OSError as error:
        _raise_in_words(name, error)
    except ValueError as error:
        _raise_in_node_words(error)
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _make_room(error)
        from diffusers_ldmq.errors import LDMQError

        raise LDMQError(
            f"{name}: out of memory. All models were unloaded, so the next run starts clean; use a smaller latent "
            "(batch 1; half the width and height measure nearly the same), fewer steps, or close other programs"
        ) from None


def show_text(node: type, text: str) -> None:
    """Write `text` on the node, where a server and a browser are there."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    unique_id = getattr(getattr(node, "hidden", None), "unique_id", None)
    send = getattr(server, "send_progress_text", None)
    if unique_id is not None and send is not None:
        send(text, unique_id)


def _raise_in_node_words(error: ValueError) -> None:
    """Raise an LDMQError again with its advice about commands turned into advice about nodes."""
    from diffusers_ldmq.errors import LDMQError

    if isinstance(error, LDMQError) and in_node_words(str(error)) != str(error):
        raise type(error)(in_node_words(str(error))) from error


def _make_room(error: BaseException) -> None:
    """Let go of what the failed computation holds, then of ComfyUI's models."""
    traceback.clear_frames(error.__traceback__)
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def _raise_in_words(name: str, error: OSError) -> NoReturn:
    """Raise what the system says about a file or a connection as one LDMQError."""
    from diffusers_ldmq.errors import LDMQError

    raise LDMQError(
        f"{name}: {error}; check the name that was given, the space on the disk and the rights of the folder"
    ) from error


def _check_transformers() -> None:
    """Raises ImportError if transformers is too old for LDM-Q; one that is missing is told when it is imported."""
    try:
        found = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return
    if int(found.partition(".")[0]) < TRANSFORMERS:
        raise ImportError(
            f"LDM-Q needs transformers {TRANSFORMERS} or newer and ComfyUI's Python has {found}; "
            f"run {sys.executable} -m pip install -U transformers and restart ComfyUI"
        )


def _missing(error: ImportError) -> str:
    if (error.name or "").partition(".")[0] == "transformers":
        what = "-U transformers"
    else:
        requirements = Path(__file__).resolve().parent.parent / "requirements.txt"
        what = f"-r {requirements}" if requirements.is_file() else "diffusers-ldmq"
    return (
        f"LDM-Q's requirements are not installed in ComfyUI's Python ({error}); "
        f"run {sys.executable} -m pip install {what} and restart ComfyUI"
    )
