"""Draw trainings with matplotlib: one for `TrainingHistory.plot` and a run's picture, several for `cylora plot`.

A long history is thinned without hiding anything: of each small range of steps the lowest and the highest value are
kept (`envelope`), so that a spike of one step among a million is in the picture.
"""

import importlib
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cylora import checks
from cylora.errors import ConfigError, InputError

__all__ = [
    "ENDINGS",
    "LARGEST",
    "Curves",
    "bucket_means",
    "check_ending",
    "draw",
    "envelope",
    "png",
    "rendered",
    "smoothed",
]

# Okabe & Ito 2008: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":", "-.")  # for more runs than colours, and for the measures of several runs
MARKERS = (".", "s", "^", "D", "v", "P")
BUCKETS = 1000  # more than a panel has columns of pixels
# What is beyond is marked like infinity, what is nearer to 0 (float32 ends at 1e-45) counts as 0: matplotlib looks for
# ticks of a logarithmic axis twice as far out as its values lie, and would overflow.
LARGEST, SMALLEST = 1e100, 1e-50
ENDINGS = (".pdf", ".png", ".svg")
Floats = NDArray[np.float64]


class Curves(NamedTuple):
    """What is drawn of one run.

    Attributes
    ----------
    label : name in the legend.
    steps : int64 (n,), counted from 1.
    loss, grad_norm, learning_rate : float64 (n,)
    skipped : bool (n,)
    measures : evaluations: how many steps were done, and values by name. The same names in each.
    max_grad_norm : where gradients were clipped; infinity or None draws no line.
    """

    label: str
    steps: NDArray[np.int64]
    loss: Floats
    grad_norm: Floats
    learning_rate: Floats
    skipped: NDArray[np.bool_]
    measures: Sequence[tuple[int, Mapping[str, float]]] = ()
    max_grad_norm: float | None = None


def envelope(steps: NDArray[np.int64], values: Floats, buckets: int = BUCKETS) -> tuple[NDArray[np.int64], Floats]:
    """Return at most 2 x ``buckets`` + 2 of the points: of each bucket its lowest and its highest, and both ends.

    Parameters
    ----------
    steps : int64 (n,), rising.
    values : float64 (n,), finite.
    buckets : int >= 1, of equal numbers of points.
    """
    size = -(-len(values) // buckets)
    if size <= 2:
        return steps, values
    whole = len(values) // size
    table = values[: whole * size].reshape(whole, size)
    starts = np.arange(whole) * size
    rest = whole * size
    chosen = [[0], starts + table.argmin(axis=1), starts + table.argmax(axis=1), [len(values) - 1]]
    if rest < len(values):
        chosen.append([rest + int(values[rest:].argmin()), rest + int(values[rest:].argmax())])
    places = np.unique(np.concatenate(chosen))
    return steps[places], values[places]


def bucket_means(values: NDArray[Any], size: int) -> Floats:
    """Return the mean of each ``size`` values; the last of what is left over. Each is summed by itself, in float64."""
    whole = len(values) // size
    means = values[: whole * size].reshape(whole, size).mean(axis=1, dtype=np.float64)
    rest = values[whole * size :]
    return np.append(means, rest.mean(dtype=np.float64)) if len(rest) else means


def smoothed(steps: NDArray[np.int64], values: Floats, width: int) -> tuple[Floats, Floats]:
    """Return the running mean over ``width`` steps, at the middle of each; of a long history to about 0.1 % of it.

    A sum that runs over everything would be quicker to write, and after a spike of 1e30 it would be wrong for ever.
    """
    size = max(min(-(-len(values) // (4 * BUCKETS)), width), 1)
    middles, means = bucket_means(steps, size), bucket_means(values, size)
    window = min(max(width // size, 1), len(means))
    if window < 2:
        return middles, means
    kernel = np.full(window, 1 / window)
    return np.convolve(middles, kernel, "valid"), np.convolve(means, kernel, "valid")


def draw(
    runs: Sequence[Curves],
    *,
    title: str = "",
    smooth: int | None = None,
    log: bool | None = None,
    axes: Any = None,
) -> Any:
    """Draw the runs and return the matplotlib Figure.

    Parameters
    ----------
    runs : at least one.
    title : above everything; "" for none.
    smooth : int >= 0 or None
        Steps of the running mean that is drawn over the values; 0 draws the values alone. None: a fiftieth of each run.
    log : whether the axes of loss and norm are logarithmic. None: where all values are above 0.
    axes : one matplotlib Axes for the loss, a sequence of three for loss, gradient norm and learning rate, or None
        A figure of its own by None: on Agg, without pyplot, so that no backend is chosen and no window opened.

    Raises
    ------
    ConfigError   If ``smooth`` or ``axes`` breaks its rule.
    InputError    If matplotlib is not there.
    """
    if smooth is not None:
        smooth = checks.integer("smooth (if not None)", smooth, 0)
    if axes is None:
        return _draw_figure(runs, title, smooth, log)
    panels: list[Any] = np.ravel(np.asarray(axes, dtype=object)).tolist()
    if len(panels) not in (1, 3) or not all(hasattr(panel, "plot") for panel in panels):
        raise ConfigError(f"axes must be one matplotlib Axes, or three, got {axes!r:.80}")
    for panel, drawn in zip(panels, (_draw_loss, _draw_norm, _draw_rate), strict=False):
        drawn(panel, runs, smooth, log)
        panel.set_xlabel("step")
        _finish(panel)
    if title:
        panels[0].set_title(_literal(title))
    return panels[0].figure


def png(figure: Any) -> bytes:
    """Return the figure as a PNG."""
    return _rendered(figure, "png")


def rendered(figure: Any, path: str | os.PathLike[str]) -> bytes:
    """Return what a file ``path`` (.pdf, .png or .svg) holds; another ending is a ConfigError."""
    return _rendered(figure, check_ending(path)[1:])


def check_ending(path: str | os.PathLike[str]) -> str:
    """Return how ``path`` ends, if a picture may end so."""
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise ConfigError(f"a picture's path must end in {', '.join(ENDINGS)}, got {os.fspath(path)!r}")
    return ending


def _rendered(figure: Any, kind: str) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph ")  # a name may use characters that the font has not
        figure.savefig(stream, format=kind, dpi=120)
    return stream.getvalue()


def _draw_figure(runs: Sequence[Curves], title: str, smooth: int | None, log: bool | None) -> Any:
    try:
        figure_type = importlib.import_module("matplotlib.figure").Figure
        canvas_type = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg
    except ImportError as error:
        raise InputError(f"drawing needs matplotlib ({error}): pip install 'cylora[plot]'") from error
    figure = figure_type(figsize=(10, 6.5), layout="constrained")
    canvas_type(figure)
    figure._repr_png_ = lambda: png(figure)  # what notebooks show of an object; pyplot would do it in another way
    if title:
        figure.suptitle(_literal(title))
    has_measures = any(run.measures for run in runs)
    if has_measures:
        ((loss, measures), (norm, rate)) = figure.subplots(2, 2, sharex=True)
        _draw_measures(measures, runs)
        measures.set_title("evaluation")
    else:
        loss, norm, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.3))
    _draw_loss(loss, runs, smooth, log)
    _draw_norm(norm, runs, smooth, log)
    _draw_rate(rate, runs, smooth, log)
    for panel, words in ((loss, "loss"), (norm, "gradient norm before clipping"), (rate, "learning rate")):
        panel.set_title(words)
    for panel in figure.axes:
        _finish(panel)
    for panel in (norm, rate) if has_measures else (rate,):
        panel.set_xlabel("step")
    if len(runs) > 1:
        lines = [loss.plot([], [], **_style(place))[0] for place in range(len(runs))]
        names = [_literal(run.label) for run in runs]
        figure.legend(lines, names, loc="outside upper center", ncols=min(len(runs), 4), frameon=False)
    return figure


def _draw_loss(axes: Any, runs: Sequence[Curves], smooth: int | None, log: bool | None) -> None:
    for place, run in enumerate(runs):
        _draw_noisy(axes, run.steps, run.loss, smooth, _style(place))
    _draw_marks(axes, runs)
    _scale(axes, [run.loss for run in runs], log)


def _draw_norm(axes: Any, runs: Sequence[Curves], smooth: int | None, log: bool | None) -> None:
    for place, run in enumerate(runs):
        _draw_noisy(axes, run.steps, run.grad_norm, smooth, _style(place))
    limits = {run.max_grad_norm for run in runs}
    limit = limits.pop()
    if limit is not None and not limits and SMALLEST <= limit <= LARGEST:
        axes.axhline(limit, color="0.4", linestyle="--", linewidth=1, label=f"clipped above {limit:g}")
        axes.legend()
    _scale(axes, [run.grad_norm for run in runs], log)


def _draw_rate(axes: Any, runs: Sequence[Curves], smooth: int | None, log: bool | None) -> None:
    for place, run in enumerate(runs):
        _draw_line(axes, *envelope(*_drawable(run.steps, run.learning_rate)), _style(place))


def _draw_noisy(axes: Any, steps: NDArray[np.int64], values: Floats, smooth: int | None, style: Any) -> None:
    """Draw the values faintly and their running mean strongly."""
    steps, values = _drawable(steps, values)
    width = max(len(values) // 50, 1) if smooth is None else smooth
    if width < 2 or len(values) < 2:
        _draw_line(axes, *envelope(steps, values), style)
        return
    axes.plot(*envelope(steps, values), color=style["color"], alpha=0.3, linewidth=0.8)
    axes.plot(*smoothed(steps, values, width), **style)


def _draw_line(axes: Any, steps: NDArray[np.int64], values: Floats, style: dict[str, Any]) -> None:
    axes.plot(steps, values, **style, marker="." if len(values) == 1 else None)  # a line through one point is none


def _draw_marks(axes: Any, runs: Sequence[Curves]) -> None:
    """Mark the steps that changed nothing, and losses that no axis has a place for, at the panel's edges."""
    skipped = [run.steps[run.skipped] for run in runs]
    outside = [run.steps[~(np.abs(run.loss) <= LARGEST)] for run in runs]  # NaN too
    for words, height, marker, marked in (("skipped", 0.02, "|", skipped), ("not finite", 0.97, "x", outside)):
        for place, steps in enumerate(marked):
            colour = COLOURS[1] if len(runs) == 1 else COLOURS[place % len(COLOURS)]
            shown = steps[:: max(-(-len(steps) // BUCKETS), 1)]
            across = axes.get_xaxis_transform()  # x in steps, y in heights of the panel
            heights = np.full(len(shown), height)
            # Not in the layout, which without any marks would take them to be anywhere and leave the panels no room.
            axes.plot(shown, heights, marker, color=colour, transform=across, clip_on=False, in_layout=False)
        count = sum(map(len, marked))
        if count:
            axes.plot([], [], marker, color=COLOURS[1] if len(runs) == 1 else "0.4", label=f"{words}: {count:,}")
            axes.legend()


def _draw_measures(axes: Any, runs: Sequence[Curves]) -> None:
    """One run: a colour for each measure. Several: the colours are the runs', and a measure has a line and a marker."""
    names = list(dict.fromkeys(name for run in runs for _, measures in run.measures for name in measures))
    for number, name in enumerate(names):
        shape: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "markersize": 4}
        for place, run in enumerate(runs):
            points = [(step, measures[name]) for step, measures in run.measures if name in measures]
            colour = COLOURS[(number if len(runs) == 1 else place) % len(COLOURS)]
            line = "-" if len(runs) == 1 else DASHES[number % len(DASHES)]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, linestyle=line, linewidth=1.2, **shape)
        colour, line = (
            (COLOURS[number % len(COLOURS)], "-") if len(runs) == 1 else ("0.4", DASHES[number % len(DASHES)])
        )
        axes.plot([], [], color=colour, linestyle=line, label=_literal(name), **shape)
    axes.legend()


def _drawable(steps: NDArray[np.int64], values: Floats) -> tuple[NDArray[np.int64], Floats]:
    shown = np.abs(values) <= LARGEST
    return steps[shown], np.where(np.abs(values[shown]) < SMALLEST, 0.0, values[shown])


def _scale(axes: Any, columns: Sequence[Floats], log: bool | None) -> None:
    """Make the axis logarithmic where that is asked for and possible, or fits all values."""
    shown = np.concatenate([values[np.abs(values) <= LARGEST] for values in columns])
    if len(shown) and (shown.max() if log else shown.min()) >= SMALLEST and log is not False:
        axes.set_yscale("log", nonpositive="mask")


def _style(place: int) -> dict[str, Any]:
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[place // len(COLOURS) % len(DASHES)],
        "linewidth": 1.4,
    }


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)


def _literal(text: str) -> str:
    """Keep matplotlib from reading $...$ as mathematics, and from hiding labels that begin with an underscore."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
