"""Stopping work that is not ComfyUI's own: a check before every module that runs, so that even one slow step ends, and
before every model that is saved."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
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


@contextmanager
def told_of_saving(models: Sequence[Any], progress: Callable[[int, int], None]) -> Iterator[None]:
    """While open, call progress(how many before it, all) before each of the models is saved; what it raises ends the
    work. models: with a `save_pretrained`, in the order in which they are saved."""
    for index, model in enumerate(models):
        model.save_pretrained = _told_before(model.save_pretrained, progress, index, len(models))
    try:
        yield
    finally:
        for model in models:
            del model.save_pretrained


def _told_before(
    save: Callable[..., Any], progress: Callable[[int, int], None], index: int, total: int
) -> Callable[..., Any]:
    @wraps(save)  # diffusers reads the signature
    def told(*args: Any, **kwargs: Any) -> Any:
        progress(index, total)
        return save(*args, **kwargs)

    return told
