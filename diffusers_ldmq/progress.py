"""How stages tell how far they are."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, all) as one stage goes on."""

StageProgress = Callable[[str, int, int], None]
"""Called with (stage, done, all) as a job of several stages goes on."""
