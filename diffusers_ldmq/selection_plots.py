"""Figure of the steps that calibrate: how dense and how varied they are, and how many samples each gets."""

from typing import Any

from .drawing import COLOURS, Drawing
from .selections import TDACScores


def chosen_steps(scores: TDACScores) -> Drawing:
    """Density, variety and the number of samples of every sampling step."""
    told = (
        f"TDAC (EDA-DM) compares what goes into the denoiser's middle at all {len(scores.counts)} sampling steps. "
        f"Density: how many other steps look alike; variety: how unlike all others a step is; both stretched to 0..1. "
        f"Bars: how many of the {sum(scores.counts)} calibrating samples each step gets."
    )
    return Drawing("chosen-steps", "Which steps calibrate", told, (11, 4.6), lambda figure: _draw(figure, scores))


def _draw(figure: Any, scores: TDACScores) -> None:
    axes, steps = figure.subplots(), range(len(scores.counts))
    samples = axes.twinx()
    samples.bar(steps, scores.counts, color=COLOURS[6], alpha=0.3, label="samples (right axis)")
    samples.set_ylim(0, max(1, 1.25 * max(scores.counts)))
    samples.yaxis.get_major_locator().set_params(integer=True)
    samples.set_ylabel("samples")
    samples.spines["right"].set_visible(True)
    axes.plot(steps, scores.density, "o-", color=COLOURS[0], markersize=4, label="density D")
    axes.plot(steps, scores.variety, "s-", color=COLOURS[1], markersize=4, label="variety V")
    axes.set_zorder(samples.get_zorder() + 1)  # the curves stand before the bars
    axes.patch.set_visible(False)
    axes.set_xlim(-0.7, len(scores.counts) - 0.3)
    axes.set_ylim(-0.05, 1.25)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("sampling step (pure noise on the left, finished picture on the right)")
    axes.set_ylabel("score, 0 = the least of all steps, 1 = the most")
    axes.grid(axis="y")
    handles, labels = axes.get_legend_handles_labels()
    more, names = samples.get_legend_handles_labels()
    axes.legend([*handles, *more], [*labels, *names], fontsize=9, loc="upper center", ncols=3)
