"""Figures of a plan: the coloured map, bytes and milliseconds."""

from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
from PIL import Image, ImageColor

from diffusers_ldmq import Profile, make_plan
from diffusers_ldmq.drawing import SCHEME_COLOURS, Drawing, in_precision_order, scheme_colour
from diffusers_ldmq.network_plots import amounts, byte_bars, plan_map, time_bars
from diffusers_ldmq.planners import layer_bytes, plan_bytes
from diffusers_ldmq.specs import SCHEMES
from diffusers_ldmq.tables import LayerTable, LayerTimes


def found_colours(drawing: Drawing) -> set[Any]:
    picture = Image.open(BytesIO(drawing.png())).convert("RGB")
    return {colour for _, colour in picture.getcolors(1 << 24) or []}


def times_of(table: LayerTable, *, without: str = "") -> LayerTimes:
    row = {"float": 2.0, "w8a8": 1.0, "w8a8-dyn": 1.25, "w8a16": 1.5}
    return LayerTimes(
        "cpu", "bfloat16", 2, 1000.0, {i.name: row for i in table.layers if i.name != without}, 1000.0, "bfloat16"
    )


def test_every_scheme_has_a_colour_of_its_own_and_groups_share_it() -> None:
    assert set(SCHEMES) <= set(SCHEME_COLOURS)
    assert len(set(SCHEME_COLOURS.values())) == len(SCHEME_COLOURS)
    assert scheme_colour("w4a16-g64") == scheme_colour("w4a16")
    assert in_precision_order(["w8a8", "w4a16-g8", "float", "w8a8"]) == ["float", "w8a8", "w4a16-g8"]


@pytest.mark.parametrize("kind", ["pixel", "dit"], indirect=True)
def test_the_map_shows_every_scheme_of_the_plan(
    kind: str, mixed_plan: Any, denoiser_of: Any, profiles: Callable[[str], Profile]
) -> None:
    plan = mixed_plan(denoiser_of(kind))
    drawing = plan_map(profiles(kind).table, plan)
    wanted = {ImageColor.getrgb(scheme_colour(choice.scheme)) for choice in plan.layers.values()}
    assert wanted <= found_colours(drawing)


def test_bars_add_up_to_the_plan(profiles: Callable[[str], Profile]) -> None:
    profile = profiles("pixel")
    table, plan = profile.table, make_plan(profile)
    layers = {info.name: info for info in table.layers}
    rows, schemes = amounts(table, plan, lambda name, scheme: layer_bytes(layers[name], scheme))
    whole = sum(sum(row.values()) for row in rows.values()) + 2 * table.other_parameters
    assert whole == plan_bytes(table, plan.quantized())
    assert set(schemes) == set(plan.counts())
    drawing = byte_bars(table, plan)
    assert f"{whole / 1e6:.1f} MB" in drawing.explanation
    assert len(found_colours(drawing)) > 20


def test_milliseconds_name_the_device_and_what_was_not_timed(profiles: Callable[[str], Profile]) -> None:
    profile = profiles("pixel")
    table, plan = profile.table, make_plan(profile)
    assert "not timed" not in time_bars(table, plan, times_of(table)).explanation
    missing = time_bars(table, plan, times_of(table, without=table.layers[0].name))
    assert "1 layers were not timed" in missing.explanation
    assert "2 rows on cpu" in missing.explanation
    assert len(found_colours(missing)) > 20
