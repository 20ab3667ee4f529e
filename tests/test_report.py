"""The HTML report: complete, escaped, in words and units, and alone in one file."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusers_ldmq import LDMQError, Profile, Report, make_plan
from diffusers_ldmq.artifacts import LayerChoice
from diffusers_ldmq.report import SHOWN_SIDE, ReportInputs, write_report
from diffusers_ldmq.tables import LayerTimes

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'"


@dataclass(frozen=True)
class Trial:
    layer: str
    correction: str
    layer_db: tuple[float, float]
    output_db: tuple[float, float] | None
    kept: bool
    reason: str


class Page(HTMLParser):
    """Tags and text of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def report_of(profile: Profile, noise: float = 1.0) -> Report:
    facts = {"selection": "first-step", "observer": "mse", "samples": 4, "forward_calls": 2, "sampler_calls": 2}
    schemes = make_plan(profile).counts()
    backends = {"w8a8 on cpu": 9}
    return Report(
        (900.0, 1.0), (1000.0,) * 2, (noise, 10 * noise), "float32", schemes, backends, 0.8, 30, 100, facts, speedup=1.1
    )


def bare_inputs(profile: Profile) -> ReportInputs:
    return ReportInputs("some/model", profile.table, make_plan(profile, planner="uniform"), report_of(profile))


def full_inputs(profile: Profile) -> ReportInputs:
    plan = make_plan(profile)
    row = {"float": 2.0, "w8a8": 1.0, "w8a8-dyn": 1.25, "w8a16": 1.5}
    red, dark = (Image.new("RGB", (64, 48), colour) for colour in ((255, 0, 0), (250, 0, 0)))
    first = profile.table.layers[0].name
    trials = (
        Trial(first, "smooth", (31.0, 34.5), (30.0, 30.5), True, "raises both"),
        Trial(first, "bias", (31.0, 30.5), None, False, "no gain at the layer"),
    )
    return ReportInputs(
        model="some/model",
        table=profile.table,
        plan=replace(plan, target="sqnr>=20dB", reasons={**plan.reasons, "predicted_curve_db": {"900": 31.5}}),
        report=replace(report_of(profile), corrections=trials),
        profile=replace(profile, layers=tuple(replace(n, own={s: (1e-3,) for s in n.noise}) for n in profile.layers)),
        times=LayerTimes("cpu", "bfloat16", 2, 1000.0, {i.name: row for i in profile.table.layers}, 1000.0, "bfloat16"),
        others={"every layer W8A8": report_of(profile, 30.0)},
        pictures={"float": [red, red], "quantized": [red, dark]},
        captions=("red apple", "rocket"),
    )


def written(folder: Path, inputs: ReportInputs, **options: Any) -> Page:
    write_report(folder / "report.html", inputs, **options)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full_page(profiles: Callable[[str], Profile], tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of `full_inputs`, written once."""
    folder = tmp_path_factory.mktemp("full")
    page = written(folder, full_inputs(profiles("pixel")))
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return page


def test_a_full_report_shows_everything(full_page: Page) -> None:
    page = full_page
    for told in (
        "some/model",
        "22.6 dB",  # 10 log10(2000 / 11)
        "20.0 dB",
        "SQNR at timestep 1",
        "0.300× of fp32",
        "80.0 %",
        "holds, 2.6 dB to spare",
        "PSNR equal, SSIM 1.000",
        "every layer W8A8",
        "31.5 dB",
        "not predicted",  # the timestep that the predicted curve lacks
        "31.0 dB → 34.5 dB",
        "no gain at the layer",
        "2 denoiser calls to calibrate",
        "observer mse",
        "torch",
    ):
        assert told in page.text, told
    assert len(page.of("img")) == 7 + 4
    assert "absent" not in [attributes.get("class") for _, attributes in page.tags]


def test_the_file_needs_nothing_else(full_page: Page) -> None:
    page = full_page
    links = [a[key] for _, a in page.tags for key in ("src", "href") if a.get(key)]
    assert links
    assert all(str(link).startswith(("data:image/png;base64,", "#")) for link in links)
    assert not page.of("link")
    assert all(image["alt"] for image in page.of("img"))
    anchors = {attributes["id"] for _, attributes in page.tags if attributes.get("id")}
    assert {link[1:] for link in links if link and link.startswith("#")} <= anchors


def test_what_is_missing_is_said(profiles: Callable[[str], Profile], tmp_path: Path) -> None:
    page = written(tmp_path, bare_inputs(profiles("pixel")))
    for told in (
        "No pictures",
        "written without a profile",
        "No other plan was measured",
        "predicted no output SQNR",
        "Milliseconds per layer were not measured",
        "None were tried",
        "gave no reasons beyond",
        "no target was asked for",
        "not predicted",
        "not timed",
    ):
        assert told in page.text, told


def test_foreign_text_stays_text(profiles: Callable[[str], Profile], tmp_path: Path) -> None:
    inputs = full_inputs(profiles("pixel"))
    name = inputs.table.layers[0].name
    plan = replace(
        inputs.plan,
        planner=HOSTILE,
        target=HOSTILE,
        layers={**inputs.plan.layers, name: LayerChoice("w8a8", HOSTILE)},
        reasons={HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}},
    )
    trial = Trial(HOSTILE, HOSTILE, (1.0, 2.0), None, False, HOSTILE)
    inputs = replace(
        inputs,
        model=HOSTILE,
        plan=plan,
        captions=(HOSTILE, "rocket"),
        others={HOSTILE: inputs.report},
        report=replace(inputs.report, corrections=(trial,)),
    )
    page = written(tmp_path, inputs)
    assert len(page.of("script")) == 1
    assert all(str(image["src"]).startswith("data:") for image in page.of("img"))
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    assert page.text.count(HOSTILE) >= 8


def test_infinite_and_missing_decibels_are_words(profiles: Callable[[str], Profile], tmp_path: Path) -> None:
    inputs = full_inputs(profiles("pixel"))
    exact = replace(inputs.report, noise=(0.0, 0.0))
    plan = replace(
        inputs.plan, predicted_sqnr_db=math.inf, reasons={"a": math.inf, "b": math.nan, "c": "inf", "d": None}
    )
    trial = replace(exact.corrections[0], layer_db=(math.nan, math.inf), output_db=(math.inf, math.nan))
    page = written(tmp_path, replace(inputs, report=replace(exact, corrections=(trial,)), plan=plan))
    assert "not measured → exact" in page.text
    visible = re.sub(r'"use strict".*', "", page.text, flags=re.DOTALL)
    assert not re.findall(r"(?<![a-z])-?(?:inf|nan)(?![a-z])", visible, flags=re.IGNORECASE)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("sqnr>=30dB", "missed by 7.4 dB"),
        ("size<=1KB", "holds: 0.0 MB were allowed"),
        ("size<=0.000001x", "missed: 0.0 MB were allowed"),
        ("speed>=1.2x", "missed: 1.10x the fastest float"),
        ("int8>=10%, sqnr>=30dB", "missed by 7.4 dB; holds: 80.0 % integer work"),
        ("fast please", "cannot be checked"),
    ],
)
def test_a_target_is_held_against_what_was_measured(
    target: str, told: str, profiles: Callable[[str], Profile], tmp_path: Path
) -> None:
    inputs = bare_inputs(profiles("pixel"))
    assert told in written(tmp_path, replace(inputs, plan=replace(inputs.plan, target=target))).text


def test_every_layer_stands_in_the_table_with_its_numbers(full_page: Page, profiles: Callable[[str], Profile]) -> None:
    inputs, page = full_inputs(profiles("pixel")), full_page
    rows = [attributes for attributes in page.of("tr") if "data-scheme" in attributes]
    assert [row["data-scheme"] for row in rows] == [c.scheme for c in inputs.plan.layers.values()]
    for info in inputs.table.layers:
        assert info.name in page.text
        assert "×".join(map(str, info.shape)) in page.text


def test_figures_are_written_beside_the_page_only_when_asked_for(
    profiles: Callable[[str], Profile], tmp_path: Path
) -> None:
    inputs = full_inputs(profiles("pixel"))
    (tmp_path / "with").mkdir()
    written(tmp_path / "with", inputs, pngs=True)
    names = ("block-curve", "bytes", "layer-ranking", "milliseconds", "noise-map", "output-sqnr", "plan-map")
    found = sorted(path.name for path in (tmp_path / "with").iterdir())
    assert found == sorted(["report.html", *(f"report-{name}.png" for name in names)])
    assert all(Image.open(tmp_path / "with" / name).width > 1000 for name in found if name.endswith(".png"))


def test_the_same_inputs_give_the_same_file(profiles: Callable[[str], Profile], tmp_path: Path) -> None:
    for name in ("one.html", "two.html"):
        write_report(tmp_path / name, bare_inputs(profiles("pixel")))
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_large_pictures_are_shown_reduced_and_the_page_says_so(
    profiles: Callable[[str], Profile], tmp_path: Path
) -> None:
    large = Image.new("RGB", (2 * SHOWN_SIDE, 64), "teal")
    inputs = replace(bare_inputs(profiles("pixel")), pictures={"float": [large], "quantized": [large]})
    page = written(tmp_path, inputs)
    assert "shown reduced" in page.text
    assert f"{2 * SHOWN_SIDE}×64 pixels" in page.text
    assert large.size == (2 * SHOWN_SIDE, 64)


def test_pictures_that_do_not_pair_are_refused(profiles: Callable[[str], Profile], tmp_path: Path) -> None:
    red = Image.new("RGB", (64, 64), "red")
    inputs = bare_inputs(profiles("pixel"))
    with pytest.raises(LDMQError, match="1 pictures with 0"):
        write_report(tmp_path / "r.html", replace(inputs, pictures={"float": [red]}))
    pair = {"float": [red], "quantized": [red]}
    with pytest.raises(LDMQError, match="1 pictures for 2 captions"):
        write_report(tmp_path / "r.html", replace(inputs, pictures=pair, captions=("a", "b")))
    assert not list(tmp_path.iterdir())


def test_steps_chosen_by_scores_are_drawn_and_damaged_scores_are_named(
    profiles: Callable[[str], Profile], tmp_path: Path
) -> None:
    given = bare_inputs(profiles("pixel"))
    scores = {"density": [0.0, 1.0], "variety": [1.0, 0.0], "counts": [3, 1], "radius": 0.5}
    shown = replace(given, report=replace(given.report, calibration={**given.report.calibration, "scores": scores}))
    write_report(tmp_path / "a.html", shown, pngs=True)
    assert "each step gets" in (tmp_path / "a.html").read_text()
    assert Image.open(tmp_path / "a-chosen-steps.png").width > 1000
    write_report(tmp_path / "b.html", given, pngs=True)
    assert not (tmp_path / "b-chosen-steps.png").exists()
    for damaged in ({**scores, "counts": [3]}, {**scores, "counts": "many"}, {"density": [1.0]}, 5):
        facts = {**given.report.calibration, "scores": damaged}
        with pytest.raises(LDMQError, match="scores"):
            write_report(tmp_path / "c.html", replace(given, report=replace(given.report, calibration=facts)))
