"""A headless Chromium that the system has."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")


@contextmanager
def browser_or_reason() -> Iterator[Any]:
    """The browser, or why there is none."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        yield f"none of {', '.join(NAMES)} is installed"
        return
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        except PlaywrightError as cause:  # Ubuntu's chromium-browser may be a stub that asks for snap
            yield f"{path} does not start ({str(cause).splitlines()[0]})"
            return
        yield browser
        browser.close()
