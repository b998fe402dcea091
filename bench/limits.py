"""What no implementation can be faster than on this machine, measured in the same run but in a process of its own.

- The divider: a step needs one square root and one division per parameter, and one unit of a core does both. A loop
  compiled by numba that does nothing else, on a vector that stays in the first-level cache, shows how fast that is
  (NumPy's square root is half as fast as the unit allows). Without numba there is no such figure. Each core has one.
- Memory: beyond the caches a step moves 32 bytes per parameter (the norm reads g; the update reads p, g, m, v and
  writes p, m, v). Scaling a vector in place, which reads and writes equally, shows how many bytes a second there are.

Both are the best of many tries: a limit is not a median.
"""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

BYTES_PER_PARAMETER = 32
# Below this many parameters the vectors may still lie in a large last-level cache.
MEMORY_BINDS_FROM = 3_000_000
TRIES = 20

Limits = dict[str, float | None]


def limits(threads: int) -> Limits:
    """Return nanoseconds per parameter at both limits; the divider's is None where it cannot be measured."""
    done = subprocess.run([sys.executable, __file__, str(threads)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def best_of(first: Limits, second: Limits) -> Limits:
    """Return what was possible at all: another process may have been in the way of one of the two."""
    return {key: None if first[key] is None else min(first[key], second[key]) for key in first}


def _divider_ns() -> float | None:
    try:
        import numba  # noqa: PLC0415 - a peer that may be missing
        import numpy as np  # noqa: PLC0415
    except ImportError:
        return None

    @numba.njit(error_model="numpy")
    def work(x, y, one, times):
        for _ in range(times):
            for i in range(x.size):
                y[i] = y[i] / (np.sqrt(x[i]) + one)

    x, y = np.zeros(2048, np.float32), np.ones(2048, np.float32)
    one, times = np.float32(1.0), 500
    work(x, y, one, 1)
    return min(_seconds(lambda: work(x, y, one, times)) for _ in range(TRIES)) / times / x.size * 1e9


def _memory_ns(threads: int) -> float:
    import numpy as np  # noqa: PLC0415 - after the other, which decides what is loaded

    vectors, factor = [np.ones(48 * 2**20, np.float32) for _ in range(threads)], np.float32(1.0)

    def scale(vector: np.ndarray) -> None:
        np.multiply(vector, factor, out=vector)

    with ThreadPoolExecutor(threads) as pool:
        seconds = min(_seconds(lambda: list(pool.map(scale, vectors))) for _ in range(TRIES))
    return BYTES_PER_PARAMETER * seconds / sum(2 * vector.nbytes for vector in vectors) * 1e9


def _seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(threads: int) -> None:
    """Print the limits as JSON."""
    divider = _divider_ns()
    print(json.dumps({"divider_ns": divider and divider / threads, "memory_ns": _memory_ns(threads)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
