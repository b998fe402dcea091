"""Processes that take turns: one for each peer, all asleep but the one whose turn it is.

So the figures of a ratio come from the same minutes.
"""

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import Case
from oracle import WrongResultError
from roster import PEERS, Peer, environment

# Everything is allocated this many times: where arrays come to lie changes a median by up to a third.
PLACEMENTS = 3
FEWEST = 4  # undisturbed turns, to count them alone
PEER_SECONDS = 20.0  # then a peer has had turns enough on a case, however few they were
PATIENCE_SECONDS = 20.0  # in all for one case
OK, WRONG, FAILED, MISSING, LEFT_OUT = "ok", "wrong", "failed", "not installed", "left out"


@dataclass(slots=True)
class Result:
    """One peer on one case; the figures are None unless ``status`` is "ok"."""

    subject: str
    case: str
    parameters: int
    peer: str
    threads: int
    cache: str
    status: str = OK
    note: str = ""
    state: str = "float32"
    median_us: float | None = None
    min_us: float | None = None
    turns: int = 0
    disturbed_turns: int = 0  # while another process had a core; they count only where there are no others
    calls_per_turn: int = 0
    error: float | None = None  # largest after the check gradients, in learning rates (norm, clip: relative)
    norm_error: float | None = None  # relative; 0 where a peer keeps its norm to itself


@dataclass(frozen=True, slots=True)
class Turns:
    """How long everybody is measured."""

    turns: int
    turns_when_big: int
    turn_seconds: float

    def of(self, case: Case) -> int:
        """Return the number of turns on this case."""
        return self.turns_when_big if case.parameters > 4_000_000 else self.turns


class Process:
    """A peer's worker process."""

    def __init__(self, peer: Peer, threads: int, log: Any) -> None:
        self.peer, self.threads = peer, threads
        self._popen = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), peer.name, peer.subject, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            bufsize=1,
            env=environment(threads),
        )
        self.failure = ""

    def send(self, do: str, **request: Any) -> None:
        """Ask for something; the answer is for `receive`."""
        with contextlib.suppress(BrokenPipeError):  # receive() reports its end
            self._popen.stdin.write(json.dumps({"do": do, **request}) + "\n")

    def receive(self) -> dict[str, Any]:
        """Wait for the answer to the oldest request; the first one says that all is imported."""
        line = self._popen.stdout.readline()
        return json.loads(line) if line else {"failed": f"the process ended with exit code {self._popen.wait()}"}

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send and receive."""
        self.send(do, **request)
        return self.receive()

    def close(self) -> None:
        """End the process and wait for its end."""
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and what was said to it is lost
            self._popen.stdin.close()
        self._popen.stdout.close()
        self._popen.wait()


class Field:
    """The processes of one subject, and the peers that cannot have one."""

    def __init__(self, subject: str, names: Iterable[str], threads: Iterable[int], log: Any) -> None:
        self.processes: list[Process] = []
        self.absent: list[tuple[Peer, int, str]] = []
        for peer in PEERS:
            if peer.subject != subject or peer.name not in names:
                continue
            for count in threads:
                if count not in peer.threads:
                    continue
                if peer.missing:
                    self.absent.append((peer, count, f"{', '.join(peer.missing)}: not installed"))
                else:
                    self.processes.append(Process(peer, count, log))
        for process in self.processes:  # they import their libraries side by side
            process.failure = process.receive().get("failed", "")

    def __enter__(self) -> "Field":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.close()

    def measure(self, case: Case, turns: Turns, *, cold: bool) -> list[Result]:
        """Check everybody, let those who are right take turns, check what they left behind."""

        def result(peer: Peer, threads: int, status: str = OK, note: str = "") -> Result:
            cache = "cold" if cold else "warm"
            return Result(peer.subject, case.name, case.parameters, peer.name, threads, cache, status, note)

        results = [result(peer, threads, MISSING, note) for peer, threads, note in self.absent]
        pairs = []
        for process in self.processes:
            row = result(process.peer, process.threads)
            results.append(row)
            if process.failure:
                _accept(row, process, {"failed": process.failure})
            elif case.parameters > process.peer.largest:
                row.status, row.note = LEFT_OUT, f"measured up to {process.peer.largest:,} parameters"
            else:
                pairs.append((row, process))
        for group in _groups(pairs, case):
            right = [pair for pair in _checked(group, case) if pair[0].status == OK]
            _take_turns(right, case, turns, cold=cold)
        return results


def _accept(row: Result, process: Process, answer: dict[str, Any]) -> bool:
    """Note what is wrong with an answer, and return whether it is right. If cylora itself is wrong, all ends here."""
    for status in (WRONG, FAILED):
        if status in answer:
            row.status, row.note = status, answer[status]
            if process.peer.is_cylora:
                raise WrongResultError(f"{row.peer}, {row.threads} threads, {row.case}: {status}: {row.note}")
            return False
    return True


def _groups(pairs: list[tuple[Result, Process]], case: Case) -> Iterator[list[tuple[Result, Process]]]:
    """All at once where memory allows it, else one number of threads after the other."""
    needed = 28 * case.parameters * len(pairs)
    if needed < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
        yield pairs
        return
    for threads in sorted({row.threads for row, _ in pairs}):
        yield [pair for pair in pairs if pair[0].threads == threads]


def _checked(pairs: list[tuple[Result, Process]], case: Case) -> list[tuple[Result, Process]]:
    """Two at a time: nothing is timed here."""
    for few in (pairs[i : i + 2] for i in range(0, len(pairs), 2)):
        for _, process in few:
            process.send("check", case=case.name)
        for row, process in few:
            answer = process.receive()
            if _accept(row, process, answer):
                row.error, row.norm_error, row.state = answer["error"], answer["norm_error"], answer["state"]
    return pairs


def _take_turns(pairs: list[tuple[Result, Process]], case: Case, turns: Turns, *, cold: bool) -> None:
    taken: dict[int, list[dict[str, Any]]] = {id(row): [] for row, _ in pairs}
    spent = dict.fromkeys(taken, 0.0)
    patience = Patience()
    placements = 1 if case.parameters > 20_000_000 else PLACEMENTS  # large arrays begin at a page wherever they lie
    for _ in range(placements):
        order = random.sample(pairs, len(pairs))
        for row, process in order:
            answer = process.ask("place", case=case.name, turn_seconds=turns.turn_seconds, cold=cold)
            if _accept(row, process, answer):
                row.calls_per_turn = answer["calls"]
        order = [pair for pair in order if pair[0].status == OK]
        for _ in range(max(1, turns.of(case) // placements)):
            random.shuffle(order)
            for row, process in order:
                if spent[id(row)] > PEER_SECONDS:
                    continue
                started = time.perf_counter()
                patience.wait_for_quiet()
                answer = process.ask("turn", cold=cold)
                if _accept(row, process, answer):
                    taken[id(row)].append(answer)
                spent[id(row)] += time.perf_counter() - started
        for row, process in order:
            _accept(row, process, process.ask("finish"))
    for row, _ in pairs:
        if row.status == OK:
            quiet = [answer["seconds"] for answer in taken[id(row)] if not answer["disturbed"]]
            counted = quiet if len(quiet) >= FEWEST else [answer["seconds"] for answer in taken[id(row)]]
            row.median_us, row.min_us = statistics.median(counted) * 1e6, min(counted) * 1e6
            row.turns, row.disturbed_turns = len(taken[id(row)]), len(taken[id(row)]) - len(quiet)


class Patience:
    """Waits for other processes of the machine to let go of it, but not for ever.

    A pool of two spinning threads loses a whole time slice whenever a third process wants to run: its turn would say
    more about the scheduler than about the library.
    """

    def __init__(self) -> None:
        self._left = PATIENCE_SECONDS

    def wait_for_quiet(self) -> None:
        """Return once nobody but this process runs, or after 0.1 s, or at once if a case has waited long enough."""
        started = time.perf_counter()
        while self._left > 0 and time.perf_counter() - started < 0.1:
            if _running() <= 1:
                break
            time.sleep(0.002)
        self._left -= time.perf_counter() - started


def _running() -> int:
    """How many threads of the whole machine run or could, this one among them; 1 where Linux does not say."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 1
