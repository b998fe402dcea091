"""Show a run while it runs: live on a terminal, a line now and then elsewhere, nothing when asked to be quiet."""

import contextlib
import os
from types import TracebackType
from typing import Self, TextIO

from cylora.history import TrainingStep
from cylora.tasks.live_view import CLEAR, LiveView
from cylora.tasks.run import TrainingRun

__all__ = ["Progress"]

NO_CURSOR = ("dumb", "unknown")  # values of TERM


class Progress:
    """A context manager that writes to ``stream``, normally stderr, as long as that works.

    A full disk or a reader that has gone away ends the display, never the training.

    Parameters
    ----------
    stream : TextIO
    title : str
    total : int, the steps of a whole run
    quiet : bool, write nothing at all
    """

    def __init__(self, stream: TextIO, title: str, total: int, *, quiet: bool) -> None:
        self._stream, self._quiet = stream, quiet
        self._total = total
        self._view: LiveView | None = None
        if not quiet and stream.isatty() and os.environ.get("TERM") not in NO_CURSOR:
            # no-color.org: any value but the empty one turns colours off.
            self._view = LiveView(stream, title, total, colour=not os.environ.get("NO_COLOR"))
        self._lines = not quiet and self._view is None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._view is not None:
            with contextlib.suppress(OSError):
                self._view.close()

    @property
    def before_message(self) -> bytes:
        """What to write before a line of one's own, straight to the stream's descriptor."""
        return b"\n" if self._view is None else CLEAR.encode()

    def follow(self, run: TrainingRun) -> None:
        """Show also what only the run knows: evaluations, and what was before its next step."""
        if self._view is not None:
            self._view.follow(run)

    def warn(self, message: str) -> None:
        """Write a line, live view or not, unless all is to be quiet."""
        with contextlib.suppress(OSError):
            if self._view is not None:
                self._view.write_line(f"warning: {message}")
            elif not self._quiet:
                self._stream.write(f"warning: {message}\n")
                self._stream.flush()

    def show(self, record: TrainingStep) -> None:
        """Take one step into the live view, which decides itself when to draw."""
        if self._view is not None:
            try:
                self._view.show(record)
            except OSError:
                self._view = None

    def log(self, record: TrainingStep) -> None:
        """Write a line where there is no live view."""
        if self._lines:
            words = f"loss {record.loss:.4g}, rate {record.learning_rate:.2e}, grad norm {record.grad_norm:.3g}"
            skipped = ", skipped" if record.skipped else ""
            try:
                self._stream.write(f"step {record.step + 1}/{self._total}, {words}{skipped}\n")
                self._stream.flush()
            except OSError:
                self._lines = False
