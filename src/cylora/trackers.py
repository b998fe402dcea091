"""Hand a training's steps to an experiment tracker: TensorBoard, or any object with ``log(values, step=...)``.

>>> import cylora
>>> trainer = cylora.LoraTrainer(on_step=cylora.trackers.log_to(run))  # wandb, trackio, SwanLab, ...  # doctest: +SKIP

The names are those under which Hugging Face's Trainer reports to trackers: ``train/loss``, ``train/grad_norm`` and
``train/learning_rate``, and ``eval/...`` for evaluations; a step's number is counted from 1, like its ``global_step``.
How often a tracker hears of a step is for ``LoraTrainingConfig.log_every`` to say.
"""

import importlib
import math
import os
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from cylora import checks
from cylora.errors import ConfigError, InputError
from cylora.history import TrainingStep

__all__ = ["EVENT_WRITER", "TensorBoardLogger", "Tracker", "all_of", "log_to", "scalars"]

EVENT_WRITER = "tensorboard.summary.writer.event_file_writer"
OnStep = Callable[[TrainingStep], object]


class Tracker(Protocol):
    """What `log_to` needs: a run of wandb or trackio is one, and so is a TensorBoardLogger."""

    def log(self, values: dict[str, Any], /, *, step: int) -> object:
        """Take these values by name as those of ``step``."""
        ...


def scalars(record: TrainingStep) -> dict[str, float]:
    """Return a step's values under the names that Hugging Face's Trainer gives them in trackers."""
    named = record.to_dict("hf")
    return {f"train/{name}": named[name] for name in ("loss", "grad_norm", "learning_rate")}


def log_to(tracker: Tracker) -> OnStep:
    """Return an ``on_step`` that logs every reported step to ``tracker``.

    What the tracker raises reaches the caller of ``step``, as for every ``on_step``; that step is done by then.

    Raises
    ------
    ConfigError   If ``tracker`` has no method ``log``.
    """
    if not callable(getattr(tracker, "log", None)):
        raise ConfigError(f"tracker must have a method log(values, step=...), got {type(tracker).__name__}")

    def on_step(record: TrainingStep) -> None:
        tracker.log(scalars(record), step=record.step + 1)

    return on_step


def all_of(*callbacks: OnStep) -> OnStep:
    """Return an ``on_step`` that calls each of ``callbacks``, in their order.

    One that raises does not keep the others from their turn; then the first exception is raised.
    """
    for place, callback in enumerate(callbacks):
        if not callable(callback):
            raise ConfigError(f"callback {place} must be callable, got {type(callback).__name__}")

    def on_step(record: TrainingStep) -> None:
        first: Exception | None = None
        for callback in callbacks:
            try:
                callback(record)
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    return on_step


class TensorBoardLogger:
    """Write event files that TensorBoard shows, without torch or TensorFlow; itself an ``on_step``.

    >>> with cylora.trackers.TensorBoardLogger("runs/x") as board:  # doctest: +SKIP
    ...     trainer = cylora.LoraTrainer(on_step=board)

    Parameters
    ----------
    folder : where the event file goes. Made if it is not there. Several runs side by side are several folders.
    flush_seconds : float > 0
        What was logged is in the file at most so long after, and at once after `flush` and `close`.

    Raises
    ------
    ConfigError   If an argument breaks its rule.
    InputError    If the package tensorboard is not there.
    OSError       If the folder or file cannot be made.

    Notes
    -----
    A thread of tensorboard's writes the file. A process that ends without `close` may lose the last ``flush_seconds``,
    and a forked child writes nothing. TensorBoard keeps float32.
    """

    def __init__(self, folder: str | os.PathLike[str], *, flush_seconds: float = 10.0) -> None:
        rule = "a number of seconds > 0"
        seconds = checks.real("flush_seconds", flush_seconds, rule, lambda x: 0 < x < math.inf)
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            raise ConfigError(f"folder must be a path, got {folder!r}")
        try:
            writer = importlib.import_module(EVENT_WRITER)
            self._event = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
            self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        except ImportError as error:
            raise InputError(
                f"TensorBoardLogger needs tensorboard ({error}): pip install 'cylora[tensorboard]'"
            ) from error
        os.makedirs(folder, exist_ok=True)  # tensorboard's own error would not say what is wrong with it
        self._writer: Any = writer.EventFileWriter(os.fspath(folder), flush_secs=seconds)
        self._process = os.getpid()

    def __call__(self, record: TrainingStep) -> None:
        """Log a step: this is what ``on_step`` calls."""
        self.log(scalars(record), step=record.step + 1)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Log values by name as those of ``step``.

        Raises
        ------
        InputError   If a value is no number, or the logger has been closed. Nothing was written.
        """
        if self._writer is None:
            raise InputError("a TensorBoardLogger must be open to log, got one that is closed")
        step = checks.integer("step", step, 0, error=InputError)
        numbers = {str(name): checks.real(f"value {name!r}", value, error=InputError) for name, value in values.items()}
        if os.getpid() != self._process:
            return
        summary = self._summary(value=[{"tag": name, "simple_value": number} for name, number in numbers.items()])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Wait until all that was logged is in the file."""
        if self._writer is not None and os.getpid() == self._process:
            self._writer.flush()

    def close(self) -> None:
        """Write what is left and close the file; once more does nothing."""
        if self._writer is not None and os.getpid() == self._process:
            self._writer.close()
        self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
