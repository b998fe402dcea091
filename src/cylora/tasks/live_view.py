"""Show a run on a terminal, in place: a bar, and the curves of loss, gradient norm and rate as small lines of blocks.

(a) tqdm makes the bar's text, which it does well on any width and encoding. It knows one line; the rest is here. rich
    would draw several, as one more package; it rests its cursor at the bottom and takes thrice as long for a frame.
(b) The cursor rests on an empty line above the view. So a terminal that gets narrower and wraps the old lines leaves it
    there, what the task prints comes above the next frame, and nothing is to be put right when the process is killed.
(c) A frame is drawn at most ten times a second and takes at most a twentieth of the time, on a slow terminal too. One
    of 100 columns takes 0.3 ms, and a step without a frame about 1 us.
"""

import importlib
import math
import os
from collections import deque
from itertools import pairwise
from time import perf_counter
from typing import Any, TextIO

from cylora.history import TrainingStep
from cylora.tasks.run import TrainingRun

__all__ = ["CLEAR", "LiveView", "Trace", "sparkline"]

CLEAR = "\r\x1b[J"  # from where the cursor rests, all of the view
INTERVAL, SHARE = 0.1, 20
BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-~=+*#"
GREEN, CYAN, YELLOW = 32, 36, 33
LABEL = 18  # columns of a line's name and number
LEAST_CURVE = 8  # columns; in fewer nothing is to be seen
WINDOW = 50  # frames over which the speed is measured: five seconds and more
SMOOTHING = 0.02  # the newest loss's share in the mean that is shown


class Trace:
    """The whole course of a number in bounded memory: means of equally many values, of ever more the longer it is."""

    CAPACITY = 512

    def __init__(self) -> None:
        self._means: list[float] = []
        self._each = 1  # values in a mean
        self._sum, self._finite, self._seen = 0.0, 0, 0

    def add(self, value: float) -> None:
        """Take one more value; those that are not finite are gaps."""
        if math.isfinite(value):
            self._sum += value
            self._finite += 1
        self._seen += 1
        if self._seen == self._each:
            self._means.append(self._sum / self._finite if self._finite else math.nan)
            self._sum, self._finite, self._seen = 0.0, 0, 0
            if len(self._means) == self.CAPACITY:
                self._means = _merged(self._means, self.CAPACITY // 2)
                self._each *= 2

    def points(self, most: int) -> list[float]:
        """Return the course as at most ``most`` means, oldest first; NaN for a gap."""
        return _merged(self._means, most) if len(self._means) > most else list(self._means)


def _merged(values: list[float], parts: int) -> list[float]:
    bounds = [len(values) * part // parts for part in range(parts + 1)]
    return [_mean(values[first:end]) for first, end in pairwise(bounds)]


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def sparkline(values: list[float], levels: str, *, log: bool) -> str:
    """Return a character for each value, from the lowest to the highest level; ``log``: by magnitude if all are > 0."""
    finite = [value for value in values if math.isfinite(value)]
    if log and min(finite, default=0.0) > 0:
        values, finite = [math.log(value) for value in values], [math.log(value) for value in finite]
    lowest = min(finite, default=0.0)
    span = max(finite, default=0.0) - lowest
    top = len(levels) - 1
    return "".join(
        levels[round(top * ((value - lowest) / span)) if 0 < span < math.inf else 0] if math.isfinite(value) else " "
        for value in values
    )


class LiveView:
    """A few lines on a terminal that follow a run. An OSError from a terminal that has gone reaches the caller.

    Parameters
    ----------
    stream : TextIO, a terminal that can move its cursor
    title : str
    total : int, the steps of the whole run
    colour : bool
    """

    def __init__(self, stream: TextIO, title: str, total: int, *, colour: bool) -> None:
        tqdm = importlib.import_module("tqdm")
        self._bar_text: Any = tqdm.tqdm.format_meter
        self._interval_text: Any = tqdm.tqdm.format_interval
        self._trim: Any = importlib.import_module("tqdm.utils").disp_trim
        self._stream, self._total, self._colour = stream, total, colour
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._title = self._visible(title)
        self._blocks = _encodes(BLOCKS, self._encoding)
        self._loss, self._norm, self._rate = Trace(), Trace(), Trace()
        self._mean_loss, self._weight = 0.0, 0.0
        self._record: TrainingStep | None = None
        self._run: TrainingRun | None = None
        self._frames: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._due = -math.inf

    def follow(self, run: TrainingRun) -> None:
        """Take what was before from ``run``, later its skipped steps and evaluations, and the time from now on."""
        self._run = run
        for trace, name in ((self._loss, "loss"), (self._norm, "grad_norm"), (self._rate, "learning_rate")):
            for value in run.history.column(name).tolist():
                trace.add(value)
        self._frames.append((perf_counter(), run.steps_done))

    def show(self, record: TrainingStep) -> None:
        """Take one step; draw if it is time."""
        self._record = record
        self._loss.add(record.loss)
        self._norm.add(record.grad_norm)
        self._rate.add(record.learning_rate)
        if math.isfinite(record.loss):
            self._weight += SMOOTHING * (1 - self._weight)  # so that the first losses count as much as they should
            self._mean_loss += (record.loss - self._mean_loss) * (SMOOTHING / self._weight)
        now = perf_counter()
        if now >= self._due:
            self._draw(record)
            self._due = now + max(INTERVAL, SHARE * (perf_counter() - now))

    def write_line(self, text: str) -> None:
        """Write a line above the view."""
        self._write(f"{CLEAR}{text}\n")
        self._due = -math.inf

    def close(self) -> None:
        """Draw the last step and leave the view there, the cursor below it."""
        if self._record is not None:
            self._draw(self._record, last=True)

    def _draw(self, record: TrainingStep, *, last: bool = False) -> None:
        size = os.get_terminal_size(self._stream.fileno())
        # Some terminals (serial lines, containers) say they have no columns and rows.
        columns, rows = size if size.columns > 0 and size.lines > 0 else (80, 24)
        # One column stays free, lest the terminal wraps, and a row above the view and one below.
        lines = self._lines(record, max(columns - 1, 1))
        if not last:
            lines = lines[: max(rows - 2, 0)]
        text = "".join(f"\r{line}\x1b[K\n" for line in lines)
        if last:
            self._write(f"{text}\x1b[J")
        elif lines:
            self._write(f"\r\x1b[K\n{text}\x1b[J\x1b[{len(lines) + 1}A")

    def _lines(self, record: TrainingStep, columns: int) -> list[str]:
        loss = self._mean_loss if math.isfinite(record.loss) else record.loss
        lines = [
            self._bar(record.step + 1, columns),
            self._curve("loss", f"{loss:.4g}", self._loss, columns),
            self._curve("norm", f"{record.grad_norm:.3g}", self._norm, columns),
            self._curve("rate", f"{record.learning_rate:.3g}", self._rate, columns, log=False),
        ]
        skipped = 0 if self._run is None else self._run.history.skipped_steps()
        if skipped:
            lines.append(self._painted(self._fitted(f"{'skipped':<8}{skipped:,}", columns), YELLOW))
        if self._run is not None and self._run.measures:
            step, measures = self._run.measures[-1]
            values = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
            lines.append(self._fitted(f"{'eval':<8}{values} (step {step:,})", columns))
        return lines

    def _bar(self, done: int, columns: int) -> str:
        now = perf_counter()
        self._frames.append((now, done))
        (first_time, first_step), (last_time, last_step) = self._frames[0], self._frames[-1]
        rate = (last_step - first_step) / (last_time - first_time) if last_time > first_time else 0.0
        left = self._interval_text((self._total - done) / rate) if rate else "?"
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        spare = columns - len(self._title)
        tail = f" [{speed} steps/s, {left} left]" if spare >= 50 else f" {left} left" if spare >= 35 else ""
        text: str = self._bar_text(
            done,
            self._total,
            0.0,
            ncols=columns,
            prefix=f"{self._title} " if spare >= 20 else "",
            ascii=not self._blocks,
            bar_format=f"{{desc}}{{percentage:3.0f}}%|{{bar}}| {{n}}/{{total}}{tail}",
            colour="green" if self._colour else None,
        )
        return text

    def _curve(self, name: str, value: str, trace: Trace, columns: int, *, log: bool = True) -> str:
        head = f"{name:<8}{value:<{LABEL - 8}}"
        width = columns - LABEL
        if width < LEAST_CURVE:
            return self._fitted(head.rstrip(), columns)
        levels = BLOCKS if self._blocks else ASCII
        return head + self._painted(sparkline(trace.points(width), levels, log=log), CYAN)

    def _fitted(self, text: str, columns: int) -> str:
        fitted: str = self._trim(self._visible(text), columns)
        return fitted

    def _visible(self, text: str) -> str:
        """Return a text with escapes for what the terminal's encoding has not."""
        return text.encode(self._encoding, "backslashreplace").decode(self._encoding)

    def _painted(self, text: str, colour: int) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour else text

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _encodes(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
