"""One peer in a process of its own, told over a pipe what to do: build and check a case, take a turn, finish.

Thread pools of one library disturb another in the same process, and PyTorch's hangs in a forked child; so each peer
has its process, started afresh, and is asleep in a read while others have their turns. Requests and answers are lines
of JSON on the standard streams; what a library prints goes to stderr.
"""

import gc
import json
import os
import sys
import time
import traceback
from typing import Any

import numpy as np
from cases import case_named
from oracle import WrongResultError
from roster import Peer, peer_named
from subjects import SUBJECTS
from timing import Stopwatch, settle

SWEEP_BYTES = 96 * 2**20
# A turn during which another process had a core is taken again, so many times at most and only within this time.
ATTEMPTS, PATIENCE_SECONDS = 5, 0.3
WARM_UP_SECONDS = 0.001
# A call that takes this long works on more than the cache holds: nothing of it would be warm.
TOO_LONG_TO_WARM = 0.02


class Worker:
    """A peer and what it has built."""

    def __init__(self, peer: Peer, threads: int) -> None:
        self._subject, self._threads = SUBJECTS[peer.subject], threads
        self._build = peer.load()
        self._sweep: np.ndarray | None = None

    def check(self, case: str) -> dict[str, Any]:
        """Check an instance of its own, which is gone afterwards."""
        the_case = case_named(case)
        built = self._build(the_case, self._threads)
        error, norm_error = self._subject.check(the_case, built)
        return {"error": error, "norm_error": norm_error, "state": built.state}

    def place(self, case: str, turn_seconds: float, cold: bool) -> dict[str, Any]:
        """Allocate everything anew and find out how many calls make a turn."""
        self._case = case_named(case)
        self._built = self._build(self._case, self._threads)
        self._watch = Stopwatch(*self._subject.timed(self._case, self._built))
        gc.collect()
        gc.disable()
        needed = min(self._watch.seconds(1), self._watch.seconds(1))
        self._warm_up = 0 if needed > TOO_LONG_TO_WARM else max(1, min(1000, round(WARM_UP_SECONDS / needed)))
        if cold and self._sweep is None:
            self._sweep = np.zeros(SWEEP_BYTES // 8, np.int64)
        self._per_turn = 1 if cold else self._watch.calls_lasting(turn_seconds)
        settle()
        return {"calls": self._per_turn}

    def turn(self, cold: bool) -> dict[str, Any]:
        """Take a turn: seconds per call."""
        started = time.perf_counter()
        for _ in range(ATTEMPTS):
            if cold:
                self._sweep += 1
            elif self._warm_up:
                self._watch.seconds(self._warm_up)  # what the turn before left in the cache belongs to another peer
            seconds = self._watch.seconds(self._per_turn)
            if not self._watch.was_disturbed or time.perf_counter() - started > PATIENCE_SECONDS:
                break
        settle()
        return {"seconds": seconds, "disturbed": self._watch.was_disturbed}

    def finish(self) -> dict[str, Any]:
        """Check what the timed calls have left behind and let go of it."""
        try:
            return {"drift": self._subject.check_after(self._case, self._built, self._watch.calls)}
        finally:
            del self._built, self._watch
            gc.enable()
            gc.collect()


def main(name: str, subject: str, threads: int) -> None:
    """Serve requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        worker = Worker(peer_named(name, subject), threads)
        print(json.dumps({"ready": True}), file=answers)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"failed": f"{type(error).__name__}: {error}"}), file=answers)
        return
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except WrongResultError as error:
            answer = {"wrong": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
