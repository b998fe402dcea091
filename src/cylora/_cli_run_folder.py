"""The folder a run writes to: checked at once, made when training is about to begin, held by one process at a time.

config.toml      all settings, from the start
checkpoints/     the last two generations of the whole state, for `cylora train --resume`
adapters/        PEFT directories; ``latest`` points to the newest
history.jsonl, measures.jsonl, trainer_state.json, picture.png
tensorboard/     event files, where they were asked for
"""

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from cylora.errors import InputError
from cylora.formats.durable import LATEST, remove_leftovers
from cylora.formats.generations import list_generations
from cylora.formats.inspection import ADAPTERS, CHECKPOINTS
from cylora.tasks.protocol import RunFailure

__all__ = ["CONFIG", "HISTORY", "MEASURES", "TENSORBOARD", "RunFolder", "reason"]

CONFIG, HISTORY, MEASURES, TENSORBOARD = "config.toml", "history.jsonl", "measures.jsonl", "tensorboard"


class RunFolder:
    """A run's folder.

    Attributes
    ----------
    path : Path
    files : list of str, what has been written, for the summary.
    """

    def __init__(self, path: Path, option: str) -> None:
        self.path, self._option = path, option
        self.files: list[str] = []
        self._made: list[Path] = []

    @classmethod
    def new(cls, output: Path | None, task: str) -> Self:
        """Return a folder that does not exist or is empty; None for ``output`` makes up one under ./runs."""
        if output is None:
            started = time.strftime("%Y%m%d-%H%M%S")
            output = _unused(Path("runs") / f"{re.sub(r'[^A-Za-z0-9_.]+', '-', task)}-{started}")
        folder = cls(output, "--output")
        with folder._refusal():
            if output.is_symlink() and not output.exists():
                raise InputError(f"--output {output} must be a new or empty folder, got a broken link")
            if output.exists() and not output.is_dir():
                raise InputError(f"--output {output} must be a new or empty folder, got a file")
            if output.exists() and any(output.iterdir()):
                raise InputError(f"--output {output} must be a new or empty folder, got one with files in it")
        return folder

    @classmethod
    def existing(cls, path: Path) -> Self:
        """Return the folder of an earlier run."""
        folder = cls(path, "--resume")
        with folder._refusal():
            if not (path / CONFIG).is_file():
                raise InputError(f"--resume {path} must be the folder of a run, got one without {CONFIG}")
        return folder

    @property
    def has_outputs(self) -> bool:
        """Whether a run has saved adapters here."""
        return os.path.lexists(self.path / ADAPTERS / LATEST)

    def create(self) -> None:
        """Make the folder, the missing ones above it, and those in it."""
        with self._refusal():
            folders = [*reversed([self.path, *self.path.parents]), self.path / CHECKPOINTS, self.path / ADAPTERS]
            for folder in folders:
                if not folder.exists():
                    folder.mkdir()
                    self._made.append(folder)
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise InputError(f"{self._option} {self.path} must be writable, got a folder that is not")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training into this folder; remove what they left half written when killed."""
        with self._refusal():
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    got = "one that another process, or one it started, is training in"
                    raise InputError(f"{self._option} {self.path} must be a folder nobody uses, got {got}") from None
                # A file system without locks (some network mounts): train all the same.
            with self._refusal():
                for folder in (self.path, self.path / ADAPTERS):
                    remove_leftovers(folder)
            yield
        finally:
            with contextlib.suppress(OSError):  # not left to the close: a worker that the task forked has it too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def discard(self) -> None:
        """Remove what `create` made, and the settings, unless there is a checkpoint to go on from."""
        if self.path / CHECKPOINTS in self._made and not list_generations(self.path / CHECKPOINTS):
            with contextlib.suppress(OSError):
                if self._option == "--output":
                    (self.path / CONFIG).unlink(missing_ok=True)
                for folder in reversed(self._made):
                    folder.rmdir()

    def write(self, name: str, write: Callable[[Path], object]) -> RunFailure | None:
        """Write one file; return, not raise, what went wrong, so that the others are still written."""
        try:
            write(self.path / name)
        except (OSError, InputError) as error:
            return RunFailure(f"{self.path / name} was not written: {reason(error)}")
        if name not in self.files:
            self.files.append(name)
        return None

    @contextlib.contextmanager
    def _refusal(self) -> Any:
        try:
            yield
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"{self._option} {self.path} cannot be used: {reason(error)}") from error


def _unused(path: Path) -> Path:
    """Return ``path``, with a number behind it if another run of this second has taken it."""
    number, candidate = 1, path
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def reason(error: Exception) -> str:
    """Return what the system says, without number and path, which the message names already."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
