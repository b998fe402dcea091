"""A bounded wait for a lock that no interrupt leaves taken."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from cylora.errors import TrainerBusyError

__all__ = ["call_locked"]

_Result = TypeVar("_Result")


def call_locked(lock: Any, function: Callable[[], _Result], timeout: float | None, busy: str) -> _Result:
    """Return ``function()``, called under a re-entrant lock.

    A plain ``with`` alone leaves no moment at which an interrupt could keep the lock: CPython looks for one neither
    between taking it and the beginning of the block, nor between its end and giving it back. A context manager of
    Python code has such moments, and keeps the lock for as long as anybody keeps the exception with its traceback. But
    a ``with`` waits for ever. So the bounded wait comes before it, and the ``with`` takes the lock once more; the first
    time is given back inside.

    Parameters
    ----------
    lock : threading.RLock
    function : callable
    timeout : float >= 0, seconds, or ``inf``; None is for ever
    busy : str
        What the error says.

    Raises
    ------
    TrainerBusyError   If other threads had the lock all the time. Nothing was called.
    """
    is_twice = timeout is not None and not lock._is_owned()
    if is_twice:
        try:
            is_free = lock.acquire(timeout=min(timeout, threading.TIMEOUT_MAX))  # type: ignore[type-var]
        except BaseException:
            if lock._is_owned():  # the interrupt came after the lock
                lock.release()
            raise
        if not is_free:
            raise TrainerBusyError(busy)
    with lock:
        if is_twice:
            lock.release()
        return function()
