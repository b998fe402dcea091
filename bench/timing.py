"""How a call is timed: in a compiled loop, often enough that the clock does not matter."""

import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Stopwatch:
    """Times ``call(*args)`` and counts how often it ran."""

    def __init__(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        names = {f"a{i}": arg for i, arg in enumerate(args)}
        # Written out: call(*args) would unpack a tuple each time, 20 ns that no user pays.
        self._timer = timeit.Timer(f"call({', '.join(names)})", globals={"call": call, **names})
        self.calls = 0
        self.was_disturbed = False

    def seconds(self, calls: int) -> float:
        """Mean seconds per call over ``calls`` in a row. Sets ``was_disturbed`` if something else had a core we needed.

        A thread that sleeps, waiting for its helper, is not disturbed; one that could run and may not is.
        """
        self.calls += calls
        waited = _seconds_waited()
        passed = self._timer.timeit(calls)
        self.was_disturbed = _seconds_waited() - waited > 0.03 * passed
        return passed / calls

    def calls_lasting(self, seconds: float) -> int:
        """Find out how many calls in a row take about that long; at least one."""
        calls = 1
        while True:
            needed = self.seconds(calls) * calls
            if needed > seconds / 8:
                return max(1, round(calls * seconds / needed))
            calls *= 4


def _seconds_waited() -> float:
    """How long this process's threads have waited for a core so far, as Linux counts it; 0 elsewhere."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(file.read_text().split()[1])
        except (OSError, ValueError):  # a thread that has just ended
            continue
    return total / 1e9


def settle() -> None:
    """Wait until no thread of this process runs: a pool may spin for some milliseconds after its work."""
    for _ in range(200):
        used = time.process_time()
        time.sleep(0.002)
        if time.process_time() - used < 0.0004:
            return
