"""Stopping work that is not ComfyUI's own: a check before every module that runs, so that even one slow step ends."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def interruptible(check: Callable[[], None]) -> Iterator[None]:
    """While open, call `check` before every module that this thread runs; what it raises ends the work.

    Of pipelines that are made inside a call nobody has the modules beforehand, so the hook is torch's global one; other
    threads' modules pass it untouched.
    """
    thread = threading.get_ident()

    def before(module: Any, args: Any) -> None:
        if threading.get_ident() == thread:
            check()

    hook = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()
