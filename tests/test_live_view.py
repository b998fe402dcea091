"""What a person sees of a run while it runs: the live view on a terminal, lines elsewhere, nothing when quiet."""

import io
import math
import os
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from screen import Screen

from cylora import TrainingHistory, TrainingStep
from cylora.tasks import live_view
from cylora.tasks.live_view import ASCII, BLOCKS, LiveView, Trace, sparkline
from cylora.tasks.progress import Progress

RECORD = TrainingStep(step=9, loss=0.123456, learning_rate=0.01, grad_norm=1.5, perplexity=1.1)


class Terminal(io.TextIOBase):
    """A stream that takes itself for a terminal, with a screen to look at."""

    def __init__(self, columns: int = 100, rows: int = 24, encoding: str = "utf-8") -> None:
        self.screen = Screen(columns or 80, rows or 24)
        self.size = os.terminal_size((columns, rows))
        self.text = ""
        self.frames = 0
        self._encoding = encoding

    @property
    def encoding(self) -> str:
        return self._encoding

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def write(self, text: str) -> int:
        text.encode(self._encoding)
        self.text += text
        self.frames += 1
        self.screen.write(text)
        return len(text)


class Clock:
    """A time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(live_view, "perf_counter", made)
    return made


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Any:
    """Return a function that makes the terminal that this test is about."""

    def make(*size: int, **options: Any) -> Terminal:
        made = Terminal(*size, **options)
        monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: made.size)
        return made

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    return make


def run_of(steps: int = 0, *, skipped: int = 0, measures: Any = ()) -> Any:
    history = TrainingHistory()
    for step in range(steps):
        history.append(loss=1.0, learning_rate=0.1, grad_norm=1.0, skipped=step < skipped)
    return SimpleNamespace(history=history, steps_done=steps, measures=list(measures))


def records(count: int, first: int = 0) -> list[TrainingStep]:
    return [
        TrainingStep(step, loss=2.0 ** -(step / 8), learning_rate=0.01 * step, grad_norm=2.0, perplexity=1.0)
        for step in range(first, first + count)
    ]


# ---------------------------------------------------------------------- the course of a number


@pytest.mark.parametrize("count", [0, 1, 5, 511, 512, 513, 1024, 5000])
def test_trace_keeps_the_whole_course_in_bounded_memory(count: int) -> None:
    trace = Trace()
    for value in range(count):
        trace.add(float(value))
    assert len(trace._means) < Trace.CAPACITY
    points = trace.points(50)
    assert len(points) == min(50, len(trace._means))
    assert points == sorted(points)
    if count >= 512:  # equal parts of the whole: the means of 0 .. count
        for place, point in enumerate(points):
            assert point == pytest.approx((place + 0.5) * count / 50, abs=count / 30 + 1)


def test_trace_has_gaps_where_nothing_was_finite() -> None:
    trace = Trace()
    for value in (1.0, math.nan, math.inf, 4.0):
        trace.add(value)
    first, *gaps, last = trace.points(9)
    assert (first, last) == (1.0, 4.0)
    assert all(map(math.isnan, gaps))
    assert trace.points(2) == [1.0, 4.0]


@pytest.mark.parametrize(
    ("values", "log", "expected"),
    [
        ([], True, ""),
        ([5.0], True, "▁"),
        ([5.0, 5.0], False, "▁▁"),
        ([0.0, 3.5, 7.0], False, "▁▅█"),
        ([1.0, 10.0, 100.0], True, "▁▅█"),
        ([1.0, 10.0, 100.0], False, "▁▂█"),
        ([0.0, 10.0, 100.0], True, "▁▂█"),  # nothing has the magnitude of 0
        ([0.0, math.nan, 7.0], False, "▁ █"),
        ([math.nan], True, " "),
        ([-1e308, 1e308], False, "▁▁"),  # too far apart to tell
    ],
)
def test_sparkline_goes_from_the_lowest_to_the_highest(values: list[float], log: bool, expected: str) -> None:
    assert sparkline(values, BLOCKS, log=log) == expected
    assert sparkline(values, ASCII, log=log) == "".join(
        " " if character == " " else ASCII[BLOCKS.index(character)] for character in expected
    )


# ---------------------------------------------------------------------- the view


def test_view_shows_bar_loss_norm_rate_skips_and_evaluation(terminal: Any, clock: Clock) -> None:
    stream = terminal()
    with Progress(stream, "digits", 20, quiet=False) as progress:
        progress.follow(run_of(0))
        progress._view._run = run_of(3, skipped=2, measures=[(0, {"a": 0.0}), (5, {"share": 0.25, "准确率": 1})])
        for record in records(10):
            clock.now += 0.5
            progress.show(record)
            progress.log(record)
        blank, bar, loss, norm, rate, skipped, evaluation, *rest = stream.screen.lines
        assert (stream.screen.row, stream.screen.column) == (0, 0)
    assert blank == ""
    assert bar.startswith("digits  50%|█████")
    assert bar.endswith("| 10/20 [2 steps/s, 00:05 left]")
    assert loss.split() == [
        "loss",
        f"{sum(0.98**i * 2.0 ** -((9 - i) / 8) for i in range(10)) / sum(0.98**i for i in range(10)):.4g}",
        "█▇▆▆▅▄▃▃▂▁",
    ]
    assert norm.split() == ["norm", "2", "▁" * 10]
    assert rate.split() == ["rate", "0.09", "▁▂▃▃▄▅▆▆▇█"]
    assert skipped.split() == ["skipped", "2"]
    assert evaluation.split(None, 1) == ["eval", "share 0.25, 准确率 1 (step 5)"]
    assert rest == [""]
    assert "step 10/20" not in stream.text


def test_closing_leaves_the_last_step_above_the_cursor(terminal: Any, clock: Clock) -> None:
    stream = terminal()
    with Progress(stream, "digits", 20, quiet=False) as progress:
        for record in records(20):
            progress.show(record)  # no time passes: only the first is drawn
        assert "1/20" in stream.screen.lines[1]
    lines = stream.screen.lines
    assert lines[0].startswith("digits 100%|")
    assert [line.split()[0] for line in lines[1:4]] == ["loss", "norm", "rate"]
    assert (stream.screen.row, stream.screen.column) == (len(lines) - 1, 0)
    assert lines[-1] == ""


def test_run_that_ends_before_its_first_step_leaves_the_terminal_as_it_was(terminal: Any) -> None:
    stream = terminal()
    with Progress(stream, "digits", 20, quiet=False) as progress:
        progress.follow(run_of())
    assert stream.text == ""


def test_frames_are_at_most_ten_a_second(terminal: Any, clock: Clock) -> None:
    stream = terminal()
    view = LiveView(stream, "digits", 100_000, colour=True)
    for record in records(10_000):
        clock.now += 0.001
        view.show(record)
    assert 90 <= stream.frames <= 101


def test_slow_terminal_takes_a_twentieth_of_the_time(terminal: Any, clock: Clock) -> None:
    stream = terminal()
    write = stream.write

    def slow(text: str) -> int:
        clock.now += 0.05
        return write(text)

    stream.write = slow
    view, before = LiveView(stream, "digits", 100_000, colour=True), clock.now
    for record in records(10_000):
        clock.now += 0.001
        view.show(record)
    assert stream.frames * 0.05 <= 0.06 * (clock.now - before)


def test_what_the_task_prints_stays_above_the_view(terminal: Any, clock: Clock) -> None:
    stream = terminal()
    view = LiveView(stream, "digits", 20, colour=True)
    for record in records(3):
        view.show(record)
        stream.screen.write(f"word {record.step}\n")
        clock.now += 1
    view.close()
    lines = stream.screen.lines
    assert lines[:3] == ["word 0", "word 1", "word 2"]
    assert lines[3].startswith("digits  15%|")
    assert sum("digits" in line for line in lines) == 1


@pytest.mark.parametrize("columns", [1, 5, 17, 18, 25, 26, 40, 41, 56, 57, 80, 300])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 24])
def test_view_fits_any_terminal(terminal: Any, clock: Clock, columns: int, rows: int) -> None:
    stream = terminal(columns, rows)
    stream.screen.write("before\n")
    view = LiveView(stream, "digits", 200, colour=True)
    view.follow(run_of(1, skipped=1, measures=[(1, {"a long name of a measure": 0.5})]))
    for record in records(60):
        clock.now += 1
        view.show(record)
    before = (len("before") - 1) // columns  # where that wrapped
    assert stream.screen.wraps == before
    lines = stream.screen.lines[before + 1 :]
    assert len(lines) <= rows
    assert all(len(line) < max(columns, 2) for line in lines)
    assert lines[0] == ""
    assert any("30%" in line for line in lines) == (rows >= 3 and columns >= 5)
    view.close()
    assert stream.screen.lines[-1] == ""
    assert stream.screen.wraps == before


def test_terminal_that_gets_narrower_is_drawn_anew(terminal: Any, clock: Clock) -> None:
    stream = terminal(100)
    view = LiveView(stream, "digits", 20, colour=False)
    widths = []
    for columns in (100, 40, 70):
        stream.size = os.terminal_size((columns, 24))
        clock.now += 1
        view.show(records(1, first=columns)[0])
        widths.append(max(map(len, stream.screen.lines)))
    assert widths == [99, 39, 69]
    assert stream.screen.lines[0] == ""
    assert sum("digits" in line for line in stream.screen.lines) == 1


def test_terminal_without_a_size_is_taken_for_80_by_24(terminal: Any, clock: Clock) -> None:
    stream = terminal(0, 0)
    LiveView(stream, "digits", 20, colour=False).show(RECORD)
    assert len(stream.screen.lines[1]) == 79


def test_ascii_terminal_gets_ascii(terminal: Any, clock: Clock) -> None:
    stream = terminal(encoding="ascii")
    view = LiveView(stream, "mine:Ta\u0161k", 20, colour=True)
    view.follow(run_of(measures=[(0, {"准": 0.5})]))
    for record in records(10):
        clock.now += 1
        view.show(record)
    assert stream.text.isascii()
    assert stream.screen.lines[2].split()[2] == "#*++=~--._"
    assert "##" in stream.screen.lines[1]
    assert stream.screen.lines[1].startswith(r"mine:Ta\u0161k ")
    assert r"\u51c6 0.5" in stream.screen.lines[-2]


def test_loss_that_is_not_finite_is_shown_as_it_is_and_not_averaged(terminal: Any, clock: Clock) -> None:
    stream = terminal()
    view = LiveView(stream, "digits", 20, colour=False)
    for loss, shown in ((math.nan, "nan"), (4.0, "4"), (math.inf, "inf"), (4.0, "4")):
        clock.now += 1
        view.show(RECORD._replace(loss=loss))
        assert stream.screen.lines[2].split()[1] == shown


def test_run_that_goes_on_shows_its_course_and_the_speed_of_now(terminal: Any, clock: Clock) -> None:
    stream = terminal()
    with Progress(stream, "digits", 2000, quiet=False) as progress:
        progress.follow(run_of(1000))
        clock.now += 10
        for record in records(100, first=1000):
            progress.show(record)
        clock.now += 10
    assert "1100/2000 [5 steps/s, 03:00 left]" in stream.screen.lines[0]
    assert len(stream.screen.lines[1].split()[2]) == 81, "a curve over the whole width"


def test_first_step_of_a_run_knows_no_speed(terminal: Any, clock: Clock) -> None:
    stream = terminal()
    LiveView(stream, "digits", 20, colour=False).show(RECORD)
    assert "10/20 [0 steps/s, ? left]" in stream.screen.lines[1]


def test_fast_runs_have_a_speed_without_decimals(terminal: Any, clock: Clock) -> None:
    stream = terminal()
    view = LiveView(stream, "digits", 200_000, colour=False)
    for first in (0, 12_345):
        view.show(records(1, first)[0])
        clock.now += 1
    assert "[12,345 steps/s, 00:15 left]" in stream.screen.lines[1]


@pytest.mark.parametrize(("name", "value", "coloured"), [("NO_COLOR", "1", False), ("NO_COLOR", "", True)])
def test_colours_can_be_turned_off(
    terminal: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str, coloured: bool
) -> None:
    monkeypatch.setenv(name, value)
    stream = terminal()
    with Progress(stream, "digits", 20, quiet=False) as progress:
        progress.follow(run_of(1, skipped=1))
        progress.show(RECORD)
    assert stream.screen.colours - {"0"} == ({"32", "36", "33"} if coloured else set())
    assert "digits" in stream.text


# ---------------------------------------------------------------------- warnings and messages


def test_warnings_stand_above_the_view(terminal: Any, clock: Clock) -> None:
    stream = terminal()
    with Progress(stream, "digits", 20, quiet=False) as progress:
        progress.show(RECORD)
        progress.warn("a disk is full")
        progress.show(RECORD)  # at once: the view must not be gone until it is due
        lines = stream.screen.lines
        assert lines[:2] == ["warning: a disk is full", ""]
        assert lines[2].startswith("digits")
    assert stream.screen.lines[0] == "warning: a disk is full"


def test_message_of_ones_own_clears_the_view_first(terminal: Any) -> None:
    stream = terminal()
    with Progress(stream, "digits", 20, quiet=False) as progress:
        progress.show(RECORD)
        stream.screen.write("^C")  # the terminal's echo
        stream.screen.write(progress.before_message.decode() + "stopping\n")
        assert stream.screen.lines == ["stopping", ""]
    assert stream.screen.lines[1].startswith("digits")


def test_warnings_are_lines_elsewhere_and_nothing_when_quiet() -> None:
    for quiet, expected in ((False, "warning: a warning\n"), (True, "")):
        stream = io.StringIO()
        with Progress(stream, "a run", 10, quiet=quiet) as progress:
            progress.follow(run_of(7))
            progress.warn("a warning")
            assert progress.before_message == b"\n"
        assert stream.getvalue() == expected


# ---------------------------------------------------------------------- other streams


def show(stream: Any, *, quiet: bool = False) -> None:
    with Progress(stream, "digits", 20, quiet=quiet) as progress:
        progress.show(RECORD)
        progress.log(RECORD)
        progress.log(RECORD._replace(skipped=True))


LINE = "step 10/20, loss 0.1235, rate 1.00e-02, grad norm 1.5"
LINES = f"{LINE}\n{LINE}, skipped\n"


def test_other_streams_get_lines() -> None:
    stream = io.StringIO()
    show(stream)
    assert stream.getvalue() == LINES


@pytest.mark.parametrize("name", ["dumb", "unknown"])
def test_terminal_that_cannot_move_its_cursor_gets_lines(
    terminal: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TERM", name)
    stream = terminal()
    show(stream)
    assert stream.text == LINES


def test_quiet_gets_nothing(terminal: Any) -> None:
    for stream in (io.StringIO(), terminal()):
        show(stream, quiet=True)
    assert stream.text == ""


def test_stream_that_breaks_ends_the_lines_not_the_training() -> None:
    class Broken(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise BrokenPipeError

    stream = Broken()
    show(stream)
    assert stream.writes == 1


def test_terminal_that_breaks_ends_the_view_not_the_training(terminal: Any) -> None:
    def fail(text: str) -> int:
        raise OSError(5, "Input/output error")

    stream = terminal()
    with Progress(stream, "digits", 20, quiet=False) as progress:
        stream.write = fail
        progress.warn("nobody reads this")
        progress.show(RECORD)
        progress.show(RECORD)
    stream = terminal()
    with Progress(stream, "digits", 20, quiet=False) as progress:
        progress.show(RECORD)
        stream.write = fail


def test_blocks_and_ascii_have_as_many_levels() -> None:
    assert len(BLOCKS) == len(ASCII)
    assert all(ord(low) < ord(high) for low, high in pairwise(BLOCKS))
