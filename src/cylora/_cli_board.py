"""The event files that `cylora train --tensorboard` writes into a run's folder."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from cylora._cli_run_folder import TENSORBOARD, RunFolder, reason
from cylora.history import TrainingStep
from cylora.trackers import TensorBoardLogger, scalars

__all__ = ["Board"]


class Board:
    """A context manager that logs steps and evaluations for TensorBoard, if ``wanted``, as long as that works.

    Nothing is made before the first step that is logged: a run that fails before it leaves no trace.
    """

    def __init__(self, folder: RunFolder, warn: Callable[[str], None], *, wanted: bool) -> None:
        self._folder, self._warn, self._is_wanted = folder, warn, wanted
        self._logger: TensorBoardLogger | None = None
        self._shown = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._logger is not None:
            with contextlib.suppress(OSError):
                self._logger.close()

    def log(self, record: TrainingStep) -> None:
        """Log one step."""
        self._attempt(scalars(record), record.step + 1)

    def show(self, measures: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log those of a run's evaluations that are new."""
        for step, named in measures[self._shown :]:
            values = {f"eval/{name}": value for name, value in named.items()}
            self._attempt(values, step)
        self._shown = len(measures)

    def _attempt(self, values: Mapping[str, float], step: int) -> None:
        """Log; where that fails, the training is worth more than it."""
        if not self._is_wanted:
            return
        path = self._folder.path / TENSORBOARD
        try:
            if self._logger is None:
                self._logger = TensorBoardLogger(path)
                self._folder.files.append(TENSORBOARD)
            self._logger.log(values, step=step)
        except OSError as error:
            self._is_wanted = False
            self._warn(f"{path} was not written: {reason(error)}; the training goes on without it")
