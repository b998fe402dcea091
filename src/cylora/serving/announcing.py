"""Announcing: who is told of each version, and what became of it."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from cylora.errors import InputError, StateError
from cylora.serving.snapshot import AdapterSnapshot

__all__ = ["Announcing", "Hook"]

logger = logging.getLogger("cylora")

Hook = Callable[[AdapterSnapshot, Path | None], object]


class Announcing:
    """The hooks of one publisher, called one after the other. What they raise goes no further than the log.

    Attributes
    ----------
    errors : int
        How many errors hooks raised.
    last_error : str or None
        Those of the last announcement.
    """

    def __init__(self) -> None:
        self._hooks: tuple[Hook, ...] = ()
        self._process: int | None = None  # in which hooks are being called: a forked child calls none
        self.errors = 0
        self.last_error: str | None = None

    def require_none(self) -> None:
        """Raise StateError if this is called by a hook."""
        if self._process == os.getpid():
            raise StateError("this publisher is announcing a version: a hook must not publish or change its publisher")

    def add(self, hook: Hook) -> None:
        """Call this hook, too, from now on."""
        if not callable(hook):
            raise InputError(f"hook must be callable, got {type(hook).__name__}")
        self._hooks = (*self._hooks, hook)

    def remove(self, hook: Hook) -> None:
        """Call this hook no more."""
        if hook not in self._hooks:
            raise InputError(f"hook must be one that was added, got {hook!r}")
        self._hooks = tuple(one for one in self._hooks if one != hook)

    def announce(self, name: str, snapshot: AdapterSnapshot, path: Path | None) -> None:
        """Call every hook, whatever the others raise."""
        errors = []
        self._process = os.getpid()
        try:
            for hook in self._hooks:
                try:
                    hook(snapshot, path)
                except Exception as error:
                    self.errors += 1
                    logger.exception("version %d of %s stands, but hook %r raised", snapshot.version, name, hook)
                    # As text: an exception keeps the frames it came through, and with them the snapshot's memory.
                    errors.append(f"version {snapshot.version}: {type(error).__name__}: {error}")
        finally:
            self._process = None
        self.last_error = "; ".join(errors) or None
