"""Announcing: who is told of each version, and what became of it."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from cylora.errors import InputError
from cylora.serving.snapshot import AdapterSnapshot

__all__ = ["Announcing", "Hook", "PublishMetrics"]

logger = logging.getLogger("cylora")

Hook = Callable[[AdapterSnapshot, Path | None], object]


class PublishMetrics(Protocol):
    """Who is told of each version and each refusal, by the publisher's name."""

    def published(self, tenant: str, version: int) -> object:
        """Count a version."""
        ...

    def refused(self, tenant: str) -> object:
        """Count a snapshot that was refused."""
        ...


class Announcing:
    """Tells the metrics and the hooks of one publisher, in order. What they raise goes no further than the log.

    Attributes
    ----------
    errors : int
        How many errors they raised.
    last_error : str or None
        Those of the last announcement.
    """

    def __init__(self, name: str, metrics: PublishMetrics | None) -> None:
        self._name, self._metrics = name, metrics
        self._hooks: tuple[Hook, ...] = ()
        self.errors = 0
        self.last_error: str | None = None

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

    def announce(self, snapshot: AdapterSnapshot, path: Path | None, *, is_new: bool = True) -> None:
        """Tell the metrics, if the version is a new one, and every hook, whatever the others raise."""
        version, metrics = snapshot.version, self._metrics
        stands, errors = f"version {version} of {self._name} stands", []
        if is_new and metrics is not None:
            errors.append(self._told(lambda: metrics.published(self._name, version), stands, "metrics", metrics))
        for hook in self._hooks:
            errors.append(self._told(partial(hook, snapshot, path), stands, "hook", hook))
        self.last_error = "; ".join(f"version {version}: {error}" for error in errors if error) or None

    def refuse(self) -> None:
        """Tell the metrics that a snapshot was refused."""
        metrics = self._metrics
        if metrics is not None:
            self._told(lambda: metrics.refused(self._name), f"{self._name} was refused", "metrics", metrics)

    def _told(self, tell: Callable[[], object], stands: str, kind: str, whom: object) -> str | None:
        """Call ``tell``; log and return what it raised.

        As text: an exception keeps the frames it came through, and with them the snapshot's memory.
        """
        try:
            tell()
        except Exception as error:
            self.errors += 1
            logger.exception("%s, but %s %r raised", stands, kind, whom)
            return f"{type(error).__name__}: {error}"
        return None
