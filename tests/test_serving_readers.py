"""Readers beside trainers that publish: no version is torn, none changes in a reader's hands, none goes backwards.

All parameters are equal at first and all gradients are, too, so after every whole step they still are: a mixture of two
steps shows in any two elements that differ.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from test_fork import in_child
from training import make_trainer

from cylora import Gradients, LoraAdapter, LoraConfig, LoraTrainer, StateError, TrainerBusyError
from cylora.serving import AdapterPublisher, AdapterSnapshot
from cylora.serving.lending import Lending

TRAINERS, READERS, HELD = 2, 6, 4
DEADLINE = 3600  # against hanging alone


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Let threads take turns a hundred times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


class Crowd:
    """Trainers that step and publish, readers that look, and what the readers saw that must not be."""

    def __init__(self, published: int, read: int) -> None:
        self.wanted_published, self.wanted_read = published, read
        # Above 8,192 parameters a step releases the GIL, and so does the copy.
        self.adapter = LoraAdapter(640, 640, LoraConfig(rank=8), seed=0)
        self.adapter.flat.vector.fill(1.0)
        self.trainer: LoraTrainer = make_trainer(history_limit=10)
        self.publisher = AdapterPublisher(self.adapter, self.trainer)
        self.publisher.publish()
        self.reads, self.busy = [0] * READERS, 0
        self.known: dict[int, tuple[Any, float]] = {}  # what the first who read a version saw
        self.wrong: list[str] = []
        self.failed: list[BaseException] = []
        self.stop_at_wrong = False

    @property
    def is_over(self) -> bool:
        enough = self.publisher.latest.version >= self.wanted_published and sum(self.reads) >= self.wanted_read
        enough = enough and min(self.reads) > 0
        return bool(enough or self.failed or (self.stop_at_wrong and self.wrong))

    def train(self, index: int) -> None:
        gradients = Gradients(self.adapter)
        rng = np.random.default_rng(index)
        while not self.is_over:
            gradients.vector.fill(rng.normal())
            try:
                self.trainer.step(1.0, self.adapter, gradients)
            except TrainerBusyError:  # the other one steps or publishes
                self.busy += 1
            self.publisher.publish()

    def read(self, index: int) -> None:
        held: deque[tuple[int, Any, float]] = deque()
        last = 0
        while not self.is_over:
            snapshot = self.publisher.latest
            version, value = snapshot.version, self.value_of(snapshot, snapshot.vector)
            if version < last:
                self.wrong.append(f"version {version} after {last}")
            if self.known.setdefault(version, (snapshot.step, value)) != (snapshot.step, value):
                self.wrong.append(f"version {version} is {value} for one reader, {self.known[version]} for another")
            last = version
            held.append((version, self.part_of(snapshot, self.reads[index]), value))
            del snapshot
            if len(held) > HELD:
                version, part, value = held.popleft()
                if (np.asarray(part) != value).any():
                    self.wrong.append(f"version {version} changed while it was held")
            self.reads[index] += 1

    def value_of(self, snapshot: AdapterSnapshot, vector: np.ndarray) -> float:
        low, high = vector.min(), vector.max()
        if low != high:
            self.wrong.append(f"version {snapshot.version} is torn: from {low} to {high}")
        return float(low)

    def part_of(self, snapshot: AdapterSnapshot, turn: int) -> Any:
        """Return something that must keep its content, of another kind at each turn."""
        parts: list[Callable[[], Any]] = [
            lambda: snapshot.vector,
            lambda: snapshot.adapters.a_matrix[3:5, ::7],
            lambda: memoryview(snapshot.adapters.b_matrix)[1:],
            lambda: snapshot.vector[5000:5001],
        ]
        return parts[turn % len(parts)]()

    def run(self) -> None:
        deadline = time.monotonic() + DEADLINE

        def guarded(work: Callable[[int], None], index: int) -> None:
            try:
                work(index)
            except BaseException as error:
                self.failed.append(error)

        works = [(self.train, index) for index in range(TRAINERS)] + [(self.read, index) for index in range(READERS)]
        threads = [threading.Thread(target=guarded, args=work) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(deadline - time.monotonic())
            if thread.is_alive():
                self.failed.append(TimeoutError())
        assert self.failed == []


@pytest.mark.parametrize(
    ("published", "read"),
    [(3_000, 30_000), pytest.param(100_000, 1_000_000, marks=pytest.mark.nightly)],
    ids=["sample", "1e5 published, 1e6 read"],
)
def test_readers_see_whole_versions_that_never_change_or_go_back(
    published: int, read: int, figures: Callable[..., None]
) -> None:
    crowd = Crowd(published, read)
    start = time.monotonic()
    crowd.run()
    assert crowd.wrong == []
    counters = crowd.publisher.counters()
    assert counters["published"] >= published
    assert sum(crowd.reads) >= read
    assert counters["buffers"] <= counters["published"]
    figures(
        published=counters["published"],
        read=sum(crowd.reads),
        versions_seen=len(crowd.known),
        torn=0,
        regressions=0,
        steps=crowd.trainer.total_steps(),
        busy=crowd.busy,
        buffers=counters["buffers"],
        seconds=round(time.monotonic() - start, 1),
    )


class InPlace(Lending):
    """One vector for all versions."""

    memory: np.ndarray | None = None

    def take(self) -> np.ndarray:
        if self.memory is None:
            self.memory = super().take()
        return self.memory


class GivenBackEarly(Lending):
    """A vector is used again as soon as the publisher has lent it."""

    def lend(self, memory: np.ndarray) -> np.ndarray:
        lent = super().lend(memory)
        self.give_back(memory)
        return lent


class Live(Lending):
    """What is lent are the trainer's own parameters."""

    live: np.ndarray

    def lend(self, memory: np.ndarray) -> np.ndarray:
        return super().lend(self.live)


@pytest.mark.parametrize("broken", [InPlace, GivenBackEarly, Live])
def test_a_publisher_that_writes_to_what_it_lent_would_be_seen(broken: type[Lending]) -> None:
    crowd = Crowd(10**9, 10**9)
    crowd.stop_at_wrong = True
    lending = broken(crowd.adapter.flat.vector.size)
    if isinstance(lending, Live):
        lending.live = crowd.adapter.flat.vector
    crowd.publisher._lending = lending
    crowd.run()
    assert crowd.wrong


def test_a_version_that_goes_back_would_be_seen() -> None:
    crowd = Crowd(10**9, 10**9)
    crowd.stop_at_wrong = True
    first, publish = crowd.publisher.latest, crowd.publisher.publish

    def publish_and_go_back() -> AdapterSnapshot:
        snapshot = publish()
        crowd.publisher.latest = first
        return snapshot

    crowd.publisher.publish = publish_and_go_back  # type: ignore[method-assign,assignment]
    crowd.run()
    assert " after " in crowd.wrong[0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("forks", [20, pytest.param(1_000, marks=pytest.mark.nightly)])
def test_children_forked_at_any_moment_read_whole_versions_and_never_hang(
    forks: int, figures: Callable[..., None]
) -> None:
    """A child publishes, too, unless another thread was in a step or a copy at the fork: then that is refused."""
    crowd = Crowd(10**9, 10**9)
    outcomes: list[Any] = []
    refused = 7

    def child() -> None:
        snapshot = crowd.publisher.latest
        crowd.value_of(snapshot, snapshot.vector)
        try:
            new = crowd.publisher.publish(timeout=30)
        except StateError as error:
            os._exit(refused if "forked while another thread" in str(error) else 1)
        assert new.version > snapshot.version
        crowd.value_of(new, new.vector)
        assert crowd.wrong == []

    threads = [threading.Thread(target=crowd.train, args=(index,)) for index in range(TRAINERS)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(forks):
            outcomes.append(in_child(child))
    finally:
        crowd.failed.append(RuntimeError("it is over"))
        for thread in threads:
            thread.join(60)
    assert set(outcomes) <= {0, refused}
    assert crowd.wrong == []
    assert crowd.publisher.publish().version > 1
    figures(forks=forks, published=outcomes.count(0), refused=outcomes.count(refused), hangs=0)
