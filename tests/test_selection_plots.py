"""The figure of the steps that calibrate: every count and both scores are drawn."""

from io import BytesIO
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from diffusers_ldmq.selection_plots import chosen_steps
from diffusers_ldmq.selections import TDACScores

SCORES = TDACScores((0.0, 1.0, 0.5), (1.0, 0.25, 0.0), (4, 0, 3), 0.1)


def test_bars_are_the_counts_and_lines_the_scores() -> None:
    figure: Any = Figure()
    drawing = chosen_steps(SCORES)
    drawing.draw(figure)
    curves, bars = figure.axes
    assert [bar.get_height() for bar in bars.patches] == [4, 0, 3]
    assert [tuple(line.get_ydata()) for line in curves.lines] == [SCORES.density, SCORES.variety]
    assert len(curves.get_legend().get_texts()) == 3
    assert "3 sampling steps" in drawing.explanation
    assert "7 calibrating samples" in drawing.explanation


def test_it_is_a_picture_for_a_single_step_too() -> None:
    for scores in (SCORES, TDACScores((0.0,), (0.0,), (1,), 0.0)):
        assert Image.open(BytesIO(chosen_steps(scores).png(titled=True))).width > 1000
