"""A server in a process of its own, for as long as a ``with`` lasts."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEADLINE = 120  # against hangs; a loaded machine may take long


class Server:
    """The process, the URL it said it listens at, and how to end it."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def text(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    def said(self, pattern: str) -> "re.Match[str]":
        """Wait until it has printed something that matches."""
        deadline = time.monotonic() + DEADLINE
        while True:
            is_over = self.process.poll() is not None
            if found := re.search(pattern, self.text):
                return found
            assert not is_over, f"the server ended with {self.process.returncode}:\n{self.text}"
            assert time.monotonic() < deadline, f"the server has not said {pattern!r}:\n{self.text}"
            time.sleep(0.01)

    @property
    def url(self) -> str:
        """Where it listens, once it does; it was asked for any free port."""
        return self.said(r"http://127\.0\.0\.1:[1-9]\d*")[0]

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(how)
        return self.process.wait(DEADLINE)


@contextmanager
def served(log: Path, *command: object, **environment: str) -> Iterator[Server]:
    """Run a command of this Python, with its output in ``log``, and kill it at the end if it still runs."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
    try:
        yield Server(process, log)
    finally:
        process.kill()
        process.wait()
