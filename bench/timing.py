"""How a call is timed: in a compiled loop, often enough that the clock does not matter."""

import time
import timeit
from collections.abc import Callable
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
        """Mean seconds per call over ``calls`` in a row. Sets ``was_disturbed`` if something else had the core."""
        self.calls += calls
        worked = time.thread_time()
        passed = self._timer.timeit(calls)
        self.was_disturbed = time.thread_time() - worked < 0.97 * passed
        return passed / calls

    def calls_lasting(self, seconds: float) -> int:
        """Find out how many calls in a row take about that long; at least one."""
        calls = 1
        while True:
            needed = self.seconds(calls) * calls
            if needed > seconds / 8:
                return max(1, round(calls * seconds / needed))
            calls *= 4
