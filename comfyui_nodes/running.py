"""A node at work: progress with the stage's name, interrupts, and errors that say one clear thing."""

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils

from .memory import is_out_of_memory
from .texts import in_node_words

TOLD_EVERY = 0.25
"""Seconds between two texts on a node: the browser need not draw more."""


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
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(total)
        self._bar.update_absolute(done, total)
        now = time.monotonic()
        if now - self._told >= TOLD_EVERY:
            self._told = now
            show_text(self.node, f"{self.name}: {100 * done // max(total, 1)} %")

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

    Import what is heavy inside. LDMQErrors come out in the words of nodes; running out of memory and missing
    requirements become one message; ComfyUI's interrupt and every other error pass.
    """
    show_text(node, f"{name} ...")
    try:
        yield Task(node, name)
    except ImportError as error:
        raise ImportError(_missing(error)) from error
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


def _missing(error: ImportError) -> str:
    requirements = Path(__file__).resolve().parent.parent / "requirements.txt"
    what = f"-r {requirements}" if requirements.is_file() else "diffusers-ldmq"
    return (
        f"LDM-Q's requirements are not installed in ComfyUI's Python ({error}); "
        f"run {sys.executable} -m pip install {what} and restart ComfyUI"
    )
