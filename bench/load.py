"""A load on an HTTP server: requests at times that are fixed beforehand, whatever the server does (an open loop).

A latency counts from the time at which a request was meant to be sent. So a server that stands still for a moment is
charged for everybody who would have come meanwhile, and so is a client that is late.
"""

import asyncio
import selectors
import time
from dataclasses import dataclass
from itertools import cycle

import numpy as np

CONNECTIONS = 8
GRACE_SECONDS = 20.0  # for the last answers; then the load has failed


@dataclass(frozen=True, slots=True)
class Load:
    """What to send, where, and when."""

    port: int
    request: bytes  # a whole one, head and body
    rate: float  # a second, on average; gaps are exponential
    seconds: float
    seed: int

    def times(self) -> np.ndarray:
        """Return when each request is due, in seconds from the beginning; the seed decides."""
        gaps = np.random.default_rng(self.seed).exponential(1 / self.rate, size=int(3 * self.rate * self.seconds) + 9)
        due = np.cumsum(gaps)
        return due[due < self.seconds]


class _Connection(asyncio.Protocol):
    """One connection; its requests are answered in their order."""

    def __init__(self, latencies: list[float]) -> None:
        self._latencies, self._due, self._received = latencies, [], b""
        self._transport: asyncio.Transport | None = None
        self.error: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def send(self, request: bytes, due: float) -> None:
        self._due.append(due)
        self._transport.write(request)

    def data_received(self, piece: bytes) -> None:
        now = time.perf_counter()
        self._received += piece
        while (end := self._received.find(b"\r\n\r\n") + 4) > 3:
            head = self._received[:end].lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            if len(self._received) < end + length:
                return
            if not head.startswith(b"http/1.1 200 "):
                self.error = self.error or self._received[: end + length].decode(errors="replace")
            self._received = self._received[end + length :]
            self._latencies.append(now - self._due.pop(0))

    def connection_lost(self, reason: Exception | None) -> None:
        self.error = self.error or (f"the connection was lost: {reason}" if self._due else None)

    def close(self) -> None:
        self._transport.close()


async def _drive(load: Load) -> np.ndarray:
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    connections = [
        (await loop.create_connection(lambda: _Connection(latencies), "127.0.0.1", load.port))[1]
        for _ in range(CONNECTIONS)
    ]
    due = load.times()
    begin = time.perf_counter() + 0.05
    for moment, connection in zip(due, cycle(connections)):
        while (left := begin + moment - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        connection.send(load.request, begin + moment)
    deadline = time.perf_counter() + GRACE_SECONDS
    while len(latencies) < len(due) and time.perf_counter() < deadline:
        await asyncio.sleep(0.005)
    for connection in connections:
        connection.close()
    errors = [connection.error for connection in connections if connection.error]
    if errors or len(latencies) != len(due):
        raise RuntimeError(f"{len(latencies)} of {len(due)} requests were answered; {errors[:1]}")
    return np.array(latencies)


def latencies_under(load: Load) -> np.ndarray:
    """Send everything and return each request's latency in seconds, in no particular order."""
    # asyncio rounds the time to sleep up to what its selector can do: a millisecond with epoll, which would be half of
    # all that is measured here, and a microsecond with select.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(_drive(load))
