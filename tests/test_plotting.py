"""Pictures of trainings: what is thinned and smoothed, against plain loops; and what the panels hold."""

import math
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from training import same_bits

from cylora import ConfigError, InputError, TrainingHistory, plotting
from cylora.plotting import Curves, draw, envelope, smoothed

PNG = b"\x89PNG\r\n\x1a\n"


def curves(loss: Any, label: str = "a run", **fields: Any) -> Curves:
    loss = np.asarray(loss, float)
    steps = np.arange(1, len(loss) + 1)
    columns = {"grad_norm": loss + 1, "learning_rate": loss / 100, "skipped": np.zeros(len(loss), bool)}
    return Curves(label, steps, loss, **{**columns, **fields})


def history(losses: list[float], skipped: tuple[int, ...] = ()) -> TrainingHistory:
    made = TrainingHistory()
    for step, loss in enumerate(losses):
        made.append(loss=loss, learning_rate=0.01, grad_norm=1.0, skipped=step in skipped)
    return made


def panels(figure: Any) -> dict[str, Any]:
    return {axes.get_title(): axes for axes in figure.axes}


def shown(axes: Any, place: int = 0) -> list[tuple[float, float]]:
    """Return the points of a panel's line."""
    return list(zip(*axes.lines[place].get_data(), strict=True))


# ---------------------------------------------------------------- thinning


@pytest.mark.parametrize("count", [0, 1, 2, 7, 20, 21, 22, 37, 1000, 1003])
@pytest.mark.parametrize("buckets", [1, 10])
def test_envelope_keeps_the_extremes_of_every_bucket_and_both_ends(count: int, buckets: int) -> None:
    rng = np.random.default_rng(count)
    steps, values = np.arange(count) * 3 + 5, rng.normal(size=count)
    kept_steps, kept = envelope(steps, values, buckets)
    assert len(kept) <= 2 * buckets + 2
    pairs = set(zip(kept_steps.tolist(), kept.tolist(), strict=True))
    assert pairs <= set(zip(steps.tolist(), values.tolist(), strict=True)), "every point drawn is a point that was"
    assert (np.diff(kept_steps) > 0).all()
    size = max(math.ceil(count / buckets), 1)
    for start in range(0, count, size):
        bucket = values[start : start + size]
        assert {bucket.min(), bucket.max()} <= set(kept.tolist())
    if count:
        assert {values[0], values[-1]} <= set(kept.tolist())


def test_short_histories_are_not_thinned() -> None:
    steps, values = np.arange(2000), np.random.default_rng(0).normal(size=2000)
    assert all(same_bits(*pair) for pair in zip(envelope(steps, values), (steps, values), strict=True))


@pytest.mark.parametrize(("count", "width"), [(1, 1), (10, 3), (10, 50), (100, 7), (4000, 80)])
def test_smoothed_is_the_running_mean(count: int, width: int) -> None:
    values, steps = np.random.default_rng(1).normal(size=count), np.arange(count) + 1
    width_used = min(width, count)
    expected = [math.fsum(values[i : i + width_used]) / width_used for i in range(count - width_used + 1)]
    middles = [math.fsum(steps[i : i + width_used]) / width_used for i in range(count - width_used + 1)]
    got_steps, got = smoothed(steps, values, width)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(got_steps, middles, rtol=1e-12)


def test_smoothed_long_history_forgets_a_spike() -> None:
    """A mean by differences of one running sum would be off by the spike's rounding error for all that follows."""
    values = np.full(100_000, 2.0)
    values[500] = 1e30
    steps, means = smoothed(np.arange(100_000), values, 1000)
    assert len(means) <= 4000
    np.testing.assert_allclose(means[steps > 2500], 2.0, rtol=1e-14)
    assert means[:40].max() == pytest.approx(1e27, rel=0.01)


# ---------------------------------------------------------------- one run


def test_a_spike_of_one_step_in_a_million_is_drawn() -> None:
    losses = np.full(1_000_000, 1.0)
    losses[654_321] = 9.0
    losses[654_400] = 0.5
    loss = panels(draw([curves(losses)]))["loss"]
    points = shown(loss)
    assert len(points) < 3000
    assert {(654_322.0, 9.0), (654_401.0, 0.5)} <= set(points)


def test_history_draws_loss_norm_and_rate_with_steps_from_one() -> None:
    figure = history([3.0, 2.0, 1.0]).plot(title="a $title")
    assert isinstance(figure, Figure)
    drawn = panels(figure)
    assert list(drawn) == ["loss", "gradient norm before clipping", "learning rate"]
    assert shown(drawn["loss"]) == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert shown(drawn["gradient norm before clipping"]) == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert shown(drawn["learning rate"]) == [(1, 0.01), (2, 0.01), (3, 0.01)]
    assert drawn["learning rate"].get_xlabel() == "step"
    assert figure.get_suptitle() == r"a \$title"
    assert figure._repr_png_().startswith(PNG)  # what a notebook shows


def test_history_that_dropped_steps_is_drawn_from_where_it_begins() -> None:
    ring = TrainingHistory(2)
    for loss in (4.0, 3.0, 2.0):
        ring.append(loss=loss, learning_rate=0.1, grad_norm=1.0)
    assert shown(panels(ring.plot())["loss"]) == [(2, 3.0), (3, 2.0)]


def test_drawing_opens_no_window_and_chooses_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = dict.get(mpl.rcParams, "backend")
    history([1.0, 2.0]).plot()
    assert dict.get(mpl.rcParams, "backend") is before
    assert "matplotlib.pyplot" not in sys.modules


def test_skipped_steps_and_losses_that_are_not_finite_are_marked() -> None:
    loss = panels(history([1.0, math.nan, math.inf, 2.0, 3.0], skipped=(1, 4)).plot())["loss"]
    marks = {line.get_marker(): line.get_xdata().tolist() for line in loss.lines if len(line.get_xdata())}
    assert marks["|"] == [2, 5]
    assert marks["x"] == [2, 3]
    assert shown(loss) == [(1, 1.0), (4, 2.0), (5, 3.0)]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["skipped: 2", "not finite: 2"]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("measures", [(), ((1, {"accuracy": 0.5}), (30, {"accuracy": 0.9}))])
@pytest.mark.parametrize("skipped", [0, 7])
def test_panels_fill_the_picture_whatever_is_marked(count: int, measures: Any, skipped: int) -> None:
    losses = np.geomspace(2.3, 1e-3, 30)
    losses[:skipped:3] = np.nan
    runs = [
        curves(losses, f"run {i}", measures=measures, skipped=np.arange(30) < skipped, max_grad_norm=1.0)
        for i in range(count)
    ]
    figure = draw(runs)
    plotting.png(figure)  # the layout is made when it is drawn
    heights = [axes.get_position().height for axes in figure.axes]
    assert sum(heights[::2] if measures else heights) > 0.7


def test_many_marks_are_thinned_and_counted() -> None:
    run = curves(np.ones(10_000), skipped=np.ones(10_000, bool))
    loss = panels(draw([run]))["loss"]
    (marks,) = [line for line in loss.lines if line.get_marker() == "|" and len(line.get_xdata())]
    assert len(marks.get_xdata()) == 1000
    assert loss.get_legend().get_texts()[0].get_text() == "skipped: 10,000"


def test_run_without_marks_has_no_legend() -> None:
    assert panels(history([1.0, 2.0]).plot())["loss"].get_legend() is None


@pytest.mark.parametrize(
    ("losses", "log", "scale"),
    [
        ([1.0, 2.0], None, "log"),
        ([0.0, 2.0], None, "linear"),
        ([-1.0, 2.0], None, "linear"),
        ([1e-60, 2.0], None, "linear"),
        ([1.0, 2.0], False, "linear"),
        ([-1.0, 2.0], True, "log"),
        ([-1.0, -2.0], True, "linear"),
        ([math.nan, math.nan], None, "linear"),
        ([], True, "linear"),
    ],
)
def test_scale_is_logarithmic_where_it_fits_or_is_asked_for(losses: list[float], log: Any, scale: str) -> None:
    assert panels(history(losses).plot(log=log))["loss"].get_yscale() == scale


def test_smoothing_draws_a_second_line_and_can_be_turned_off() -> None:
    run = history([float(loss) for loss in range(1, 11)])
    assert len([line for line in panels(run.plot(smooth=0))["loss"].lines if len(line.get_xdata())]) == 1
    values, means = panels(run.plot(smooth=5))["loss"].lines[:2]
    assert values.get_alpha() == 0.3
    assert means.get_ydata().tolist() == pytest.approx([3, 4, 5, 6, 7, 8])
    assert means.get_xdata().tolist() == pytest.approx([3, 4, 5, 6, 7, 8])


def test_single_step_is_a_dot() -> None:
    figure = history([1.0]).plot()
    assert [axes.lines[0].get_marker() for axes in figure.axes] == ["."] * 3


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-300, 1e99, -1e99, 1e307, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("log", [None, True, False])
def test_any_float_gives_a_picture(value: float, log: bool | None) -> None:
    made = TrainingHistory()
    for step in range(3):
        made.append(loss=value * (step % 2), learning_rate=value, grad_norm=abs(value))
    assert plotting.png(made.plot(log=log)).startswith(PNG)


@pytest.mark.parametrize("low", [5e-324, 1e-100, 1e-50])
@pytest.mark.parametrize("log", [None, True])
def test_any_range_of_magnitudes_gives_a_picture(low: float, log: bool | None) -> None:
    run = history([low, 1e100])
    assert plotting.png(run.plot(log=log)).startswith(PNG)
    assert plotting.png(draw([run.curves(max_grad_norm=low)], log=log)).startswith(PNG)


# ---------------------------------------------------------------- the user's axes


def test_one_axes_gets_the_loss_and_three_get_all() -> None:
    run = history([3.0, 2.0])
    figure = Figure()
    axes = figure.subplots()
    assert run.plot(axes, title="_mine") is figure
    assert shown(axes) == [(1, 3.0), (2, 2.0)]
    assert (axes.get_xlabel(), axes.get_title()) == ("step", " _mine")
    three = Figure().subplots(1, 3)
    assert run.plot(three) is three[0].figure
    assert [shown(axes)[0] for axes in three] == [(1, 3.0), (1, 1.0), (1, 0.01)]


@pytest.mark.parametrize("axes", ["loss", 3, [], [1, 2, 3]])
def test_axes_that_are_none_are_refused(axes: Any) -> None:
    with pytest.raises(ConfigError, match="axes must be one matplotlib Axes, or three, got "):
        history([1.0]).plot(axes)


def test_two_axes_are_refused() -> None:
    figure = Figure()
    with pytest.raises(ConfigError, match="axes must be one matplotlib Axes, or three, got "):
        history([1.0]).plot(figure.subplots(2))
    assert [len(axes.lines) for axes in figure.axes] == [0, 0]


@pytest.mark.parametrize("smooth", [-1, 1.5, True, "5"])
def test_smooth_is_checked(smooth: Any) -> None:
    with pytest.raises(ConfigError, match=r"smooth \(if not None\) must be an integer"):
        history([1.0]).plot(smooth=smooth)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(("name", "start"), [("a.png", PNG), ("a.PNG", PNG), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")])
def test_path_is_written_in_the_form_its_ending_says(tmp_path: Path, name: str, start: bytes) -> None:
    history([1.0, 2.0]).plot(path=tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["a", "a.txt", "history.jsonl", ".png"])
def test_path_with_another_ending_is_refused_before_anything_is_drawn(tmp_path: Path, name: str) -> None:
    axes = Figure().subplots()
    with pytest.raises(ConfigError, match=r"a picture's path must end in .pdf, .png, .svg, got '.*'"):
        history([1.0]).plot(axes, path=tmp_path / name)
    assert len(axes.lines) == 0
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"drawing needs matplotlib \(.*\): pip install 'cylora\[plot\]'"):
        history([1.0]).plot(path=tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- several runs


def test_runs_of_different_lengths_share_panels_and_a_legend() -> None:
    runs = [curves([3.0, 2.0, 1.0], "long"), curves([4.0], "_short of $")]
    figure = draw(runs)
    loss = panels(figure)["loss"]
    assert [shown(loss, place) for place in (0, 1)] == [[(1, 3.0), (2, 2.0), (3, 1.0)], [(1, 4.0)]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["long", r" _short of \$"]
    assert [line.get_color() for line in legend.get_lines()] == [loss.lines[place].get_color() for place in (0, 1)]
    assert len({line.get_color() for line in legend.get_lines()}) == 2
    assert plotting.png(figure).startswith(PNG)


def test_every_run_of_two_dozen_looks_different() -> None:
    (legend,) = draw([curves([1.0, 2.0], str(place)) for place in range(24)]).legends
    assert len({(line.get_color(), line.get_linestyle()) for line in legend.get_lines()}) == 24


def test_marks_of_several_runs_have_the_runs_colours_and_one_count() -> None:
    runs = [curves([1.0, 2.0], skipped=np.array(flags)) for flags in ([True, False], [True, True], [False, False])]
    loss = panels(draw(runs))["loss"]
    marks = [line for line in loss.lines if line.get_marker() == "|" and len(line.get_xdata())]
    assert [line.get_color() for line in marks] == [loss.lines[place].get_color() for place in (0, 1)]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["skipped: 3"]


def test_measures_of_one_run_differ_in_colour_and_of_several_in_line() -> None:
    measures = [(0, {"a": 0.1, "b": 0.2}), (2, {"a": 0.3, "b": 0.4})]
    one = panels(draw([curves([1.0, 2.0], measures=measures)]))["evaluation"]
    assert shown(one, 0) == [(0, 0.1), (2, 0.3)]
    assert [text.get_text() for text in one.get_legend().get_texts()] == ["a", "b"]
    assert len({line.get_color() for line in one.get_legend().get_lines()}) == 2
    other = [(0, {"b": 0.5})]
    several = panels(draw([curves([1.0, 2.0], measures=measures), curves([1.0], measures=other), curves([1.0])]))[
        "evaluation"
    ]
    drawn = [line for line in several.lines if len(line.get_xdata())]
    assert [line.get_xdata()[-1] for line in drawn] == [2, 2, 0]
    assert len({line.get_color() for line in drawn}) == 2
    assert [line.get_linestyle() for line in drawn] == ["-", "--", "--"]


@pytest.mark.parametrize(
    ("limits", "labels"),
    [
        ([1.0], ["clipped above 1"]),
        ([2.0, 2.0], ["clipped above 2"]),
        ([1.0, 2.0], []),
        ([math.inf], []),
        ([1e-60], []),
        ([None], []),
    ],
)
def test_limit_of_the_norm_is_drawn_where_all_runs_have_it(limits: list[Any], labels: list[str]) -> None:
    norm = panels(draw([curves([1.0, 2.0], max_grad_norm=limit) for limit in limits]))["gradient norm before clipping"]
    legend = norm.get_legend()
    assert ([] if legend is None else [text.get_text() for text in legend.get_texts()]) == labels
