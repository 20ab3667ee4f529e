"""The report in a real browser: nothing missing, no error, no request, and every control does its work.

Without Chromium these tests are skipped, saying so; with LDMQ_REQUIRE_BROWSER=1 (as in .ci/run) they fail instead.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from PIL import Image
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import sync_playwright

from diffusers_ldmq import Profile, Report, make_plan
from diffusers_ldmq.report import ReportInputs, write_report
from diffusers_ldmq.tables import LayerTimes

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
HOSTILE = "<script>window.hacked = true</script><img src=x onerror='window.hacked = true'>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium that the system has."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        do_without(f"none of {', '.join(NAMES)} is installed")
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        except PlaywrightError as cause:  # Ubuntu's chromium-browser may be a stub that asks for snap
            do_without(f"{path} does not start ({str(cause).splitlines()[0]})")
        yield browser
        browser.close()


def do_without(reason: str) -> NoReturn:
    """Skip in words, or fail where a browser is demanded."""
    told = f"{reason}: the report was not opened in a browser"
    if os.environ.get("LDMQ_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{told}, though LDMQ_REQUIRE_BROWSER=1 demands it")
    pytest.skip(told)


@pytest.fixture(scope="module")
def inputs(profiles: Callable[[str], Profile]) -> ReportInputs:
    """A report with everything in it, foreign text included."""
    profile = profiles("pixel")
    plan = make_plan(profile)
    first = profile.table.layers[0].name
    last = list(plan.quantized())[-1]
    choices = {**plan.layers, first: replace(plan.layers[first], reason=HOSTILE)}
    report = Report((900.0, 1.0), (1e3, 1e3), (1.0, 10.0), "float32", plan.counts(), {"w8a8 on cpu": 9}, 0.8, 30, 100)
    red, dark = (Image.new("RGB", (64, 48), colour) for colour in ((255, 0, 0), (0, 90, 0)))
    row = {"float": 2.0, "w8a8": 1.0, "w8a8-dyn": 1.25, "w8a16": 1.5}
    return ReportInputs(
        model="some/model",
        table=profile.table,
        plan=replace(plan, layers=choices, target="sqnr>=20dB"),
        report=report,
        profile=replace(profile, layers=tuple(replace(n, own={}) if n.name == last else n for n in profile.layers)),
        times=LayerTimes("cpu", "bfloat16", 2, 1000.0, {i.name: row for i in profile.table.layers}, 1000.0, "bfloat16"),
        others={"every layer W8A8": report},
        pictures={"float": [red, red], "quantized": [dark, red]},
        captions=("red apple", HOSTILE),
    )


@pytest.fixture(scope="module")
def url(inputs: ReportInputs, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of the written report."""
    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, inputs)
    return path.as_uri()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The report, opened; afterwards it has logged no error and asked for nothing but itself."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    logged: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: logged.append(message.text))
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    yield page
    assert logged == []
    assert [address for address in asked if not address.startswith("data:")] == [url]
    page.close()


def names(page: Any) -> list[str]:
    """Names of the layers that the table shows, in its order."""
    return page.evaluate(
        "[...document.querySelectorAll('#layers tbody tr')].filter(r => !r.hidden).map(r => r.cells[0].textContent)"
    )


def keys(page: Any, column: int) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll('#layers tbody tr')].map(r => r.cells[{column}].dataset.key)")


def test_every_picture_is_there_and_foreign_text_does_nothing(page: Any) -> None:
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 7 + 4
    assert all(width > 0 for width in widths)
    assert page.evaluate("window.hacked") is None
    assert page.get_by_text("<script>window.hacked").count() >= 2


def test_the_slider_moves_with_mouse_and_keyboard(page: Any) -> None:
    slider = page.locator(".stage input").first
    clip = "getComputedStyle(document.querySelector('.stage .after')).clipPath"
    assert "50%" in page.evaluate(clip)
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert "55%" in page.evaluate(clip)
    box = slider.bounding_box()
    page.mouse.click(box["x"] + 0.1 * box["width"], box["y"] + 0.5 * box["height"])
    left = float(page.evaluate(clip).rsplit(" ", 1)[1].rstrip("%)"))
    assert 5 <= left <= 15


def test_the_line_shows_float_on_the_left_and_quantized_on_the_right(page: Any, tmp_path: Path) -> None:
    page.locator(".stage").first.screenshot(path=tmp_path / "stage.png")
    picture = Image.open(tmp_path / "stage.png").convert("RGB")
    width, height = picture.size
    assert picture.getpixel((width // 4, height // 2)) == (255, 0, 0)
    assert picture.getpixel((3 * width // 4, height // 2)) == (0, 90, 0)


def test_blinking_can_be_turned_on_and_off(page: Any) -> None:
    button, stage = page.locator(".blink").first, page.locator(".stage").first
    whole = page.locator("#blink-all")
    clip = "getComputedStyle(document.querySelector('.stage .after')).clipPath"
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    seen = set()
    for _ in range(40):
        seen.add(page.evaluate(clip))
        if len(seen) == 2:
            break
        page.wait_for_timeout(50)
    assert len(seen) == 2, "the two pictures take turns"
    button.click()
    assert "blinking" not in (stage.get_attribute("class") or "")
    assert "50%" in page.evaluate(clip)
    whole.click()
    assert page.locator(".blinking").count() == 2
    whole.click()
    assert page.locator(".blinking").count() == 0


def test_the_table_sorts_by_number_and_by_name(page: Any, inputs: ReportInputs) -> None:
    assert names(page) == [info.name for info in inputs.table.layers]
    head = page.locator("#layers th").nth(7)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    sizes = [float(key) for key in keys(page, 7)]
    assert sizes == sorted(sizes)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(key) for key in keys(page, 7)] == sizes[::-1]
    page.locator("#layers th button").first.click()
    assert names(page)[0] == min(names(page))
    page.locator("#layers th").nth(6).locator("button").click()  # an own effect that was not measured comes last
    found = keys(page, 6)
    assert "" in found
    assert "" not in found[: found.index("")]
    assert set(found[found.index("") :]) == {""}


def test_the_table_can_be_searched_and_filtered(page: Any, inputs: ReportInputs) -> None:
    page.fill("#filter", "CONV_IN")
    assert names(page) == [info.name for info in inputs.table.layers if "conv_in" in info.name]
    assert page.locator("#shown").text_content() == f"{len(names(page))} of {len(inputs.table.layers)} layers"
    page.fill("#filter", "")
    page.select_option("#scheme", "float")
    assert names(page) == [name for name, choice in inputs.plan.layers.items() if choice.scheme == "float"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 800, 1600])
def test_the_page_fits_and_can_be_read(page: Any, width: int, scheme: Any) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert contrast(page, "body") >= 7
    assert contrast(page, ".soft", behind="body") >= 4.5
    assert contrast(page, "nav a", behind="body") >= 4.5


def contrast(page: Any, ink: str, behind: str | None = None) -> float:
    """Contrast of text to its background as WCAG counts it, 1 to 21."""
    style = "getComputedStyle(document.querySelector('{}')).{}.match(/[\\d.]+/g).slice(0, 3).map(Number)"
    first = page.evaluate(style.format(ink, "color"))
    second = page.evaluate(style.format(behind or ink, "backgroundColor"))
    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
