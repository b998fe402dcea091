"""Turns: one call at a time, of all threads of a process."""

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from cylora.errors import StateError
from cylora.locks import call_locked

__all__ = ["Turns"]

_Result = TypeVar("_Result")


class Turns:
    """Calls of one publisher, each alone."""

    def __init__(self) -> None:
        self._locks: dict[int, threading.RLock] = {}  # by process: after a fork, who held one may not exist any more

    def take(self, function: Callable[[], _Result], timeout: float) -> _Result:
        """Return ``function()``, after waiting up to ``timeout`` seconds, or ``inf``, for the other threads' calls.

        Raises
        ------
        TrainerBusyError   If other threads were at it all the time. Nothing was called.
        StateError         If this thread is inside such a call: it would wait for itself. Nothing was called.
        """
        lock = self._locks.setdefault(os.getpid(), threading.RLock())
        if lock._is_owned():  # type: ignore[attr-defined]  # as threading.Condition asks, too
            at_work = "this publisher is at work further up this call stack"
            raise StateError(f"{at_work}: a hook, metrics or a signal handler must not publish or change it")
        busy = "this publisher is busy: another thread was publishing, or in a hook, all the time"
        return call_locked(lock, function, timeout, busy)
