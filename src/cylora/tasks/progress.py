"""Show a run while it runs: a bar on a terminal, a line now and then elsewhere, nothing when asked to be quiet."""

import contextlib
import importlib
import os
from types import TracebackType
from typing import Any, Self, TextIO

from cylora.history import TrainingStep

__all__ = ["Progress"]


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
        self._bar: Any = None
        self._lines = not quiet and not stream.isatty()
        if not quiet and stream.isatty():
            # no-color.org: any value but the empty one turns colours off.
            colour = None if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else "green"
            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining}{postfix}]"
            # Some terminals (serial lines, containers) say they have 0 columns and rows; tqdm would believe it.
            has_size = os.get_terminal_size(stream.fileno()).columns > 0
            size: dict[str, int] = {} if has_size else {"ncols": 80, "nrows": 24}
            self._bar = importlib.import_module("tqdm").tqdm(
                desc=title,
                total=total,
                file=stream,
                colour=colour,
                bar_format=layout,
                dynamic_ncols=has_size,
                **size,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()

    def skip(self, steps: int) -> None:
        """Begin after ``steps`` that were done earlier."""
        if self._bar is not None and steps:
            self._bar.n = self._bar.initial = steps

    def warn(self, message: str) -> None:
        """Write a line, bar or no bar, unless all is to be quiet."""
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.write(f"warning: {message}", file=self._stream)
            elif not self._quiet:
                self._stream.write(f"warning: {message}\n")
                self._stream.flush()

    def show(self, record: TrainingStep) -> None:
        """Move the bar by one step; it decides itself when to redraw."""
        if self._bar is not None:
            words = f"loss {record.loss:.3g}, rate {record.learning_rate:.1e}, norm {record.grad_norm:.2g}"
            try:
                self._bar.set_postfix_str(words, refresh=False)
                self._bar.update()
            except OSError:
                self._bar = None

    def log(self, record: TrainingStep) -> None:
        """Write a line where there is no bar."""
        if self._lines:
            words = f"loss {record.loss:.4g}, rate {record.learning_rate:.2e}, grad norm {record.grad_norm:.3g}"
            skipped = ", skipped" if record.skipped else ""
            try:
                self._stream.write(f"step {record.step + 1}/{self._total}, {words}{skipped}\n")
                self._stream.flush()
            except OSError:
                self._lines = False
