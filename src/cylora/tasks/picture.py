"""Draw a run: loss, learning rate, gradient norm and the task's measures over the steps."""

import importlib
import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cylora.tasks.run import TrainingRun

__all__ = ["draw"]

# Okabe & Ito 2008: told apart with any colour vision.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


def draw(run: TrainingRun, title: str, max_grad_norm: float) -> bytes:
    """Return a PNG of the run so far; ``max_grad_norm`` is drawn as the line above which gradients were clipped."""
    # The figure's own canvas, not pyplot: no global backend is chosen, no window system touched.
    figure_type = importlib.import_module("matplotlib.figure").Figure
    canvas_type = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg
    figure = figure_type(figsize=(10, 6.5), layout="constrained")
    canvas_type(figure)
    figure.suptitle(title)
    ((loss_axes, measure_axes), (norm_axes, rate_axes)) = figure.subplots(2, 2, sharex=True)
    steps = run.history.column("step") + 1

    _draw_noisy(loss_axes, steps, run.history.column("loss"), "loss")
    _draw_noisy(norm_axes, steps, run.history.column("grad_norm"), "gradient norm before clipping")
    if np.isfinite(max_grad_norm):
        norm_axes.axhline(max_grad_norm, color=COLOURS[1], linestyle="--", label=f"clipped above {max_grad_norm:g}")
        norm_axes.legend()
    rate_axes.plot(steps, run.history.column("learning_rate"), color=COLOURS[0])
    rate_axes.set_title("learning rate")
    _draw_measures(measure_axes, run)
    for axes in (norm_axes, rate_axes):
        axes.set_xlabel("step")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a measure's name may use characters that the font has not
        figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def _draw_noisy(axes: Any, steps: NDArray[Any], values: NDArray[Any], title: str) -> None:
    """Draw every value faintly and their running mean strongly, on a logarithmic axis where all are above 0."""
    shown = np.isfinite(values)
    steps, values = steps[shown], values[shown]
    axes.plot(steps, values, color=COLOURS[0], alpha=0.3, linewidth=0.8)
    width = max(len(values) // 50, 1)
    if width > 1:
        means = np.convolve(values, np.full(width, 1 / width), mode="valid")
        axes.plot(steps[width // 2 : width // 2 + len(means)], means, color=COLOURS[0])
    if len(values) and values.min() > 0:
        axes.set_yscale("log")
    axes.set_title(title)


def _draw_measures(axes: Any, run: TrainingRun) -> None:
    axes.set_title("evaluation")
    for number, name in enumerate(run.measures[0][1] if run.measures else []):
        points = [(step, measures[name]) for step, measures in run.measures]
        # matplotlib reads $...$ as mathematics and hides labels that begin with an underscore.
        label = name.replace("$", r"\$")
        label = f" {label}" if label.startswith("_") else label
        axes.plot(*zip(*points, strict=True), color=COLOURS[number % len(COLOURS)], marker=".", label=label)
    if axes.lines:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "this task has no evaluation", ha="center", transform=axes.transAxes)
