"""OnlineTrainer: what is submitted is stepped, in order, by policies, until deadlines; errors stay where they arise."""

import asyncio
import contextlib
import gc
import logging
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tenants import TIMEOUT, Tenants
from test_fork import in_child
from training import fill, make_pair, make_set

from cylora import (
    AdapterSet,
    ConfigError,
    CyloraError,
    DeadlineError,
    DroppedError,
    Gradients,
    InputError,
    LoraConfig,
    NonFiniteGradientError,
    StateError,
    TrainingStep,
)
from cylora.serving import OnlineTrainer, ServingMetrics, Ticket
from cylora.serving import online as online_module

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

FULL = "a submission must find room within .* seconds, got 2 jobs of 264 bytes in the queue"  # 33 parameters each
Make = Callable[..., OnlineTrainer]


@pytest.fixture
def make() -> Iterator[Make]:
    """Return a function that makes OnlineTrainers, which are closed in the end."""
    made: list[OnlineTrainer] = []

    def make(target: Any, **options: Any) -> OnlineTrainer:
        made.append(OnlineTrainer(target, **options))
        return made[-1]

    yield make
    for online in made:
        online.close(TIMEOUT)
        assert not any(thread.is_alive() for thread in online._threads)


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + TIMEOUT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def sequentially(jobs: list[tuple[Any, ...]], *names: str, **config: Any) -> Tenants:
    """Return tenants after these jobs, one after the other."""
    twins = Tenants(*names, **config)
    for tenant, *rest in jobs:
        twins.step_many([(tenant, *rest)])
    return twins


def adds_up(online: OnlineTrainer) -> bool:
    """Return whether every job is accounted for."""
    counts = online.counters()
    parts = ("done", "failed", "dropped", "cancelled", "merged", "waiting", "running")
    return counts["submitted"] == sum(counts[part] for part in parts)


# ---------------------------------------------------------------- submitting


def test_ticket_has_the_record_that_a_step_would_have_returned(make: Make) -> None:
    target, twins = Tenants("a"), Tenants("a")
    ticket = make(target).submit("a", 0.5, *make_pair(1))
    assert isinstance(ticket, Ticket)
    assert ticket.result(TIMEOUT) == twins.trainers["a"].step(0.5, twins.adapters["a"], *make_pair(1))
    assert ticket.exception(TIMEOUT) is None
    assert target.bits() == twins.bits()


def whole_set(seed: int) -> tuple[AdapterSet, Gradients]:
    adapters = make_set()
    return adapters, fill(Gradients(adapters), seed)


@pytest.mark.parametrize("is_flat", [False, True])
def test_gradients_of_a_whole_set_are_one_step(make: Make, is_flat: bool) -> None:
    (adapters, gradients), (twin, _) = whole_set(1), whole_set(1)
    target, twins = Tenants(adapters={"a": adapters}), Tenants(adapters={"a": twin})
    record = make(target).submit("a", 0.5, gradients.vector if is_flat else gradients).result(TIMEOUT)
    assert record == twins.trainers["a"].step(0.5, twin, gradients)
    assert target.bits() == twins.bits()


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.uint16, "tensor", array, memoryview])
def test_gradients_of_any_kind_that_a_step_takes_give_its_bits(make: Make, kind: Any) -> None:
    class Unchecked(Tenants):
        def check(self, *job: Any) -> None: ...

    class Tensor:
        def __init__(self, values: Any) -> None:
            self.values = values

        def __dlpack__(self, **options: Any) -> object:
            return self.values.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    def converted(values: Any) -> Any:
        if kind is np.uint16:
            return values.astype(ml_dtypes.bfloat16).view(np.uint16)
        if kind is array:
            return array("f", values.ravel().tolist())
        if kind is memoryview:
            return memoryview(values)
        return Tensor(values) if kind == "tensor" else values.astype(kind)

    pair = [converted(values) for values in make_pair(3)]
    target, twins = Unchecked("a"), Unchecked("a")
    record = make(target).submit("a", np.float32(0.5), *pair).result(TIMEOUT)
    assert record == twins.trainers["a"].step(0.5, twins.adapters["a"], *pair)
    assert target.bits() == twins.bits()


def test_target_gets_copies_in_the_shapes_given(make: Make) -> None:
    target = Tenants("a")
    make(target).submit("a", np.float32(0.5), *make_pair(1)).result(TIMEOUT)
    ((tenant, loss, grad_a, grad_b),) = target.jobs
    assert (tenant, loss, type(loss)) == ("a", 0.5, float)
    for got, given in zip((grad_a, grad_b), make_pair(1), strict=True):
        assert got.dtype == np.float32
        assert got.shape == given.shape
        assert np.array_equal(got, given)


def test_gradients_are_copied_before_submit_returns(make: Make) -> None:
    target = Tenants("a", "plug")
    online, pair, loss = make(target), make_pair(1), np.array(0.5)
    with target.busy(online):
        ticket = online.submit("a", loss, *pair)
        pair[0].fill(7.0)
        pair[1].fill(7.0)
        loss.fill(9.0)
    assert ticket.result(TIMEOUT).loss == 0.5
    assert target.bits("a") == sequentially([("a", 0.5, *make_pair(1))], "a").bits("a")


def test_large_gradients_are_copied_too(make: Make) -> None:
    """These are copied without the GIL."""
    adapters = AdapterSet({"x": (2048, 2048)}, LoraConfig(rank=9), seed=0)
    target = Tenants(adapters={"a": adapters})
    gradients = fill(Gradients(adapters))
    record = make(target).submit("a", 0.5, gradients).result(TIMEOUT)
    assert np.array_equal(target.jobs[0][2], gradients.vector)
    assert record.grad_norm == pytest.approx(float(np.linalg.norm(gradients.vector.astype(np.float64))))


def test_what_the_target_refuses_is_refused_at_once_and_changes_nothing(make: Make) -> None:
    target = Tenants("a")
    online = make(target)
    before = target.bits()
    with pytest.raises(InputError, match="tenant must be one of a, got 'b'"):
        online.submit("b", 0.5, *make_pair())
    with pytest.raises(InputError, match="gradients must have 33 elements, got 15"):
        online.submit("a", 0.5, make_pair()[1])
    assert set(online.counters().values()) == {0}
    assert (target.calls, target.bits()) == ([], before)


def test_gradients_larger_than_the_queue_are_refused(make: Make) -> None:
    online = make(Tenants("a"), queue_bytes=131)
    with pytest.raises(InputError, match="gradients must take at most queue_bytes=131 bytes, got 132"):
        online.submit("a", 0.5, *make_pair())
    assert set(online.counters().values()) == {0}


def test_threads_begin_with_the_first_submission_and_end_with_close() -> None:
    before = threading.active_count()
    with OnlineTrainer(Tenants("a"), workers=3) as online:
        assert threading.active_count() == before
        online.submit("a", 0.5, *make_pair())
        assert threading.active_count() == before + 3
        assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("cylora-online-"))
    assert threading.active_count() == before


def test_closed_trainer_is_freed() -> None:
    with OnlineTrainer(Tenants("a")) as online:
        online.submit("a", 0.5, *make_pair()).result(TIMEOUT)
    gone = weakref.ref(online)
    del online
    gc.collect()
    assert gone() is None


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("workers", [1, 3])
def test_order_is_kept_for_each_tenant(make: Make, workers: int) -> None:
    names = [f"t{i}" for i in range(7)]
    jobs = [(name, float(i), *make_pair(i)) for i in range(30) for name in names]
    target = Tenants(*names)
    online = make(target, workers=workers, batch_size=3, queue_size=16)
    tickets = [online.submit(*job) for job in jobs]
    online.flush(TIMEOUT)
    assert [ticket.result(0).loss for ticket in tickets] == [job[1] for job in jobs]
    assert [ticket.result(0).step for ticket in tickets] == [i for i in range(30) for _ in names]
    assert target.bits() == sequentially(jobs, *names).bits()
    assert adds_up(online)


def test_many_threads_lose_nothing(make: Make) -> None:
    names = [f"t{i}" for i in range(5)]
    target = Tenants(*names)
    online = make(target, workers=2, queue_size=8)

    def submit(seed: int) -> None:
        for i in range(40):
            online.submit(names[(seed + i) % 5], 0.5, *make_pair(seed))

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    online.flush(TIMEOUT)
    assert [target.trainers[name].total_steps() for name in names] == [32] * 5
    assert online.counters()["done"] == 160
    assert adds_up(online)


def test_tenants_have_turns(make: Make) -> None:
    """A tenant with many jobs does not keep the others from theirs."""
    target = Tenants("a", "b", "c", "plug")
    online = make(target, batch_size=2)
    with target.busy(online):
        for name in "aaaabc":
            online.submit(name, 0.5, *make_pair())
    online.flush(TIMEOUT)
    assert target.calls == [["plug"], ["a", "b"], ["c", "a"], ["a"], ["a"]]


def test_workers_share_what_could_be_done(make: Make) -> None:
    """One worker does not take everything while another has nothing, nor waits for another's tenants."""
    target = Tenants("a", "b", "c", "d", "plug")
    online = make(target, workers=2)
    with target.busy(online):
        online.submit("a", 0.5, *make_pair())  # for the other worker, which waits at the gate too
        until(lambda: len(target.calls) == 2)
        for name in "bcda":
            online.submit(name, 0.5, *make_pair())
        assert online.counters()["running"] == 2
    online.flush(TIMEOUT)
    assert sorted(len(call) for call in target.calls[2:]) == [1, 1, 2]
    assert {name: target.trainers[name].total_steps() for name in "abcd"} == {"a": 2, "b": 1, "c": 1, "d": 1}


def test_batch_is_bounded_in_bytes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cylora.serving.job_queue.BATCH_BYTES", 300)
    target = Tenants("a", "b", "c", "plug")
    online = make(target)
    with target.busy(online):
        for name in "abc":
            online.submit(name, 0.5, *make_pair())
    online.flush(TIMEOUT)
    assert target.calls == [["plug"], ["a", "b"], ["c"]]


# ---------------------------------------------------------------- no room: block


@pytest.mark.parametrize("limit", [{"queue_size": 2}, {"queue_bytes": 2 * 132 + 131}])
def test_block_waits_for_room(make: Make, limit: dict[str, int]) -> None:
    target = Tenants("a", "b", "plug")
    online = make(target, **limit)
    tickets = []
    with target.busy(online):
        for _ in range(2):
            online.submit("a", 0.5, *make_pair())
        thread = threading.Thread(target=lambda: tickets.append(online.submit("b", 0.25, *make_pair())))
        thread.start()
        until(lambda: online.counters()["blocked"] == 1)
        assert online.counters()["submitted"] == 3
        assert thread.is_alive()
    thread.join(TIMEOUT)
    assert tickets[0].result(TIMEOUT).loss == 0.25
    assert online.counters()["expired"] == 0
    online.flush(TIMEOUT)
    assert adds_up(online)


def test_block_gives_up_in_time_and_has_submitted_nothing(make: Make) -> None:
    target, metrics = Tenants("a", "plug"), ServingMetrics()
    online = make(target, queue_size=2, metrics=metrics)
    with target.busy(online):
        for _ in range(2):
            online.submit("a", 0.5, *make_pair())
        for timeout in (0, 0.01):
            with pytest.raises(DeadlineError, match=FULL) as caught:
                online.submit("a", 0.5, *make_pair(), timeout=timeout)
            assert isinstance(caught.value, (CyloraError, TimeoutError))
        counts = online.counters()
        assert (counts["submitted"], counts["waiting"], counts["expired"], counts["blocked"]) == (3, 2, 2, 2)
    online.flush(TIMEOUT)
    assert target.trainers["a"].total_steps() == 2
    assert metrics.values()["dropped"] == 2
    assert 'dropped_jobs_total{tenant="a",policy="block"} 2' in metrics.text()


def test_those_who_wait_are_taken_in_the_order_they_came(make: Make) -> None:
    names = [f"t{i}" for i in range(6)]
    target = Tenants(*names, "plug")
    online = make(target, queue_size=1, batch_size=1)
    threads = []
    with target.busy(online):
        for place, name in enumerate(names):
            thread = threading.Thread(target=online.submit, args=(name, 0.5, *make_pair()))
            thread.start()
            threads.append(thread)
            until(lambda place=place: online.counters()["waiting"] + online.counters()["blocked"] == place + 1)
    for thread in threads:
        thread.join(TIMEOUT)
    online.flush(TIMEOUT)
    assert target.calls == [["plug"], *([name] for name in names)]


def test_nobody_overtakes_those_who_wait(make: Make) -> None:
    """A small job that would still fit waits behind a large one, and is taken when that has given up."""
    adapters, gradients = whole_set(1)
    target = Tenants("a", "plug", adapters={"large": adapters})
    online = make(target, queue_bytes=300)
    gave_up, release = threading.Event(), threading.Event()
    tickets = []

    def large() -> None:
        admitted = online._enter(job := online._job("large", 0.5, gradients, None))[1]
        assert admitted is not None
        assert release.wait(TIMEOUT)
        with pytest.raises(DeadlineError):
            online._wait_for_room(job, admitted, 0.0)
        gave_up.set()

    with target.busy(online):
        online.submit("a", 0.5, *make_pair())
        first = threading.Thread(target=large)
        first.start()
        until(lambda: online.counters()["blocked"] == 1)
        small = threading.Thread(target=lambda: tickets.append(online.submit("a", 0.25, *make_pair())))
        small.start()
        until(lambda: online.counters()["blocked"] == 2)
        assert online.counters()["waiting"] == 1
        release.set()
        assert gave_up.wait(TIMEOUT)
        small.join(TIMEOUT)
        assert online.counters()["waiting"] == 2
    assert tickets[0].result(TIMEOUT).loss == 0.25
    first.join(TIMEOUT)


@pytest.mark.parametrize("how", ["deadline", "interrupt"])
def test_idle_worker_hears_of_a_job_that_another_made_room_for(make: Make, how: str) -> None:
    """One worker is busy, the queue is full of the same tenant's, a large job that waits for room gives up."""
    adapters, gradients = whole_set(1)
    target = Tenants("a", "plug", adapters={"large": adapters})
    online = make(target, workers=2, queue_bytes=300)
    with target.busy(online):
        online.submit("plug", 0.5, *make_pair())
        admitted = online._enter(job := online._job("large", 0.5, gradients, None))[1]
        assert admitted is not None
        small = threading.Thread(target=online.submit, args=("a", 0.25, *make_pair()))
        small.start()
        until(lambda: online.counters()["blocked"] == 2)
        until(lambda: len(online._work_came._waiters) == 1)
        if how == "interrupt":
            online._withdraw(job)
        else:
            with pytest.raises(DeadlineError):
                online._wait_for_room(job, admitted, 0.0)
        until(lambda: ["a"] in target.calls)
        small.join(TIMEOUT)


def test_job_taken_at_the_last_moment_is_submitted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is over, but before this thread could leave the line a worker took its job."""
    target = Tenants("a", "plug")
    online = make(target, queue_size=1)
    give_up = OnlineTrainer._give_up

    def late(self: OnlineTrainer, job: Any, timeout: float | None) -> None:
        target.gate.set()
        until(lambda: job.number > 0)
        give_up(self, job, timeout)

    monkeypatch.setattr(OnlineTrainer, "_give_up", late)
    with target.busy(online):
        online.submit("a", 0.5, *make_pair())
        ticket = online.submit("a", 0.25, *make_pair(), timeout=0.01)
    assert ticket.result(TIMEOUT).loss == 0.25
    assert online.counters()["expired"] == 0


def test_interrupted_wait_has_submitted_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Tenants("a", "plug")
    online = make(target, queue_size=1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(OnlineTrainer, "_wait_for_room", interrupt)
    with target.busy(online):
        online.submit("a", 0.5, *make_pair())
        with pytest.raises(KeyboardInterrupt):
            online.submit("a", 0.25, *make_pair())
    online.flush(TIMEOUT)
    assert [job[1] for job in target.jobs] == [0.0, 0.5]
    assert adds_up(online)


def test_interrupt_after_the_job_was_taken_withdraws_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Tenants("a", "plug")
    online = make(target)
    enter = OnlineTrainer._enter

    def interrupted(self: OnlineTrainer, job: Any) -> None:
        enter(self, job)
        raise KeyboardInterrupt

    with target.busy(online):
        monkeypatch.setattr(OnlineTrainer, "_enter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            online.submit("a", 0.25, *make_pair())
        assert online.counters()["cancelled"] == 1
    online.flush(TIMEOUT)
    assert target.calls == [["plug"]]
    assert adds_up(online)


# ---------------------------------------------------------------- no room: drop_oldest


def test_drop_oldest_drops_the_tenants_own_oldest_first(make: Make) -> None:
    target, metrics = Tenants("a", "b", "plug"), ServingMetrics()
    online = make(target, queue_size=3, policy="drop_oldest", metrics=metrics)
    with target.busy(online):
        other = online.submit("b", 0.5, *make_pair())
        tickets = [online.submit("a", float(i), *make_pair(i)) for i in range(4)]
        assert [ticket.done() for ticket in (other, *tickets)] == [False, True, True, False, False]
    assert other.result(TIMEOUT).loss == 0.5
    for ticket in tickets[:2]:
        message = "the job of tenant 'a' was dropped for a newer one, since the queue was full"
        with pytest.raises(DroppedError, match=message) as caught:
            ticket.result(TIMEOUT)
        assert isinstance(caught.value, RuntimeError)
    assert [ticket.result(TIMEOUT).loss for ticket in tickets[2:]] == [2.0, 3.0]
    online.flush(TIMEOUT)
    kept = [("a", float(i), *make_pair(i)) for i in (2, 3)]
    assert target.bits("a") == sequentially(kept, "a").bits("a")
    assert (online.counters()["dropped"], online.counters()["done"]) == (2, 4)
    assert 'dropped_jobs_total{tenant="a",policy="drop_oldest"} 2' in metrics.text()
    assert adds_up(online)


def test_drop_oldest_drops_anybodys_oldest_for_a_tenant_that_has_none(make: Make) -> None:
    target = Tenants("a", "b", "c", "plug")
    online = make(target, queue_size=2, policy="drop_oldest")
    with target.busy(online):
        tickets = [online.submit(name, 0.5, *make_pair()) for name in "abc"]
        assert isinstance(tickets[0].exception(TIMEOUT), DroppedError)
    online.flush(TIMEOUT)
    assert target.calls == [["plug"], ["b", "c"]]
    assert adds_up(online)


def test_drop_oldest_drops_as_many_as_it_takes(make: Make) -> None:
    adapters, gradients = whole_set(1)
    target = Tenants("a", "plug", adapters={"large": adapters})
    size = gradients.vector.nbytes
    online = make(target, queue_bytes=max(size, 2 * 132), policy="drop_oldest")
    with target.busy(online):
        tickets = [online.submit("a", 0.5, *make_pair()) for _ in range(2)]
        ticket = online.submit("large", 0.5, gradients)
        assert [isinstance(one.exception(TIMEOUT), DroppedError) for one in tickets] == [True, True]
    assert ticket.result(TIMEOUT).loss == 0.5


def test_drop_oldest_takes_the_place_of_a_cancelled_job_first(make: Make) -> None:
    target = Tenants("a", "plug")
    online = make(target, queue_size=2, policy="drop_oldest")
    with target.busy(online):
        tickets = [online.submit("a", float(i), *make_pair()) for i in range(2)]
        assert tickets[0].cancel()
        tickets.append(online.submit("a", 2.0, *make_pair()))
    assert [ticket.result(TIMEOUT).loss for ticket in tickets[1:]] == [1.0, 2.0]
    online.flush(TIMEOUT)
    assert (online.counters()["dropped"], online.counters()["cancelled"]) == (0, 1)
    assert adds_up(online)


# ---------------------------------------------------------------- no room: merge


def test_merge_steps_once_with_the_sum_of_gradients_and_the_mean_loss(make: Make) -> None:
    target, metrics = Tenants("a", "b", "plug", max_grad_norm=0.5), ServingMetrics()
    online = make(target, queue_size=2, policy="merge", metrics=metrics)
    with target.busy(online):
        other = online.submit("b", 0.5, *make_pair())
        tickets = [online.submit("a", loss, *make_pair(i)) for i, loss in enumerate([1.0, 2.0, 6.0])]
        assert online.counters()["waiting"] == 2
    assert other.result(TIMEOUT).loss == 0.5
    assert tickets[0] is tickets[1] is tickets[2]
    summed = [sum(parts[1:], start=parts[0]) for parts in zip(*map(make_pair, range(3)), strict=True)]
    twins = Tenants("a", max_grad_norm=0.5)
    assert tickets[0].result(TIMEOUT) == twins.trainers["a"].step(3.0, twins.adapters["a"], *summed)
    online.flush(TIMEOUT)
    assert target.bits("a") == twins.bits("a")
    counts = online.counters()
    assert (counts["merged"], counts["done"], counts["submitted"], counts["blocked"]) == (2, 3, 5, 0)
    assert 'dropped_jobs_total{tenant="a",policy="merge"} 2' in metrics.text()
    assert adds_up(online)


def test_merge_goes_into_the_newest_job_of_the_tenant(make: Make) -> None:
    target = Tenants("a", "plug")
    online = make(target, queue_size=2, policy="merge")
    with target.busy(online):
        tickets = [online.submit("a", float(i), *make_pair(i)) for i in range(4)]
    assert [ticket.result(TIMEOUT).loss for ticket in tickets] == [0.0, 2.0, 2.0, 2.0]
    assert [ticket.result(TIMEOUT).step for ticket in tickets] == [0, 1, 1, 1]


def test_merge_of_a_whole_set(make: Make) -> None:
    adapters, gradients = whole_set(1)
    target = Tenants("plug", adapters={"a": adapters})
    online = make(target, queue_size=1, policy="merge")
    with target.busy(online):
        for seed in (1, 2):
            online.submit("a", 0.5, fill(gradients, seed))
    online.flush(TIMEOUT)
    assert np.array_equal(target.jobs[1][2], fill(gradients, 1).vector.copy() + fill(gradients, 2).vector)


def test_merge_waits_where_the_tenant_has_nothing_waiting(make: Make) -> None:
    target = Tenants("a", "b", "plug")
    online = make(target, queue_size=1, policy="merge")
    with target.busy(online):
        online.submit("b", 0.5, *make_pair())
        with pytest.raises(DeadlineError):
            online.submit("a", 0.5, *make_pair(), timeout=0)
        assert online.counters()["merged"] == 0


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_merge_spoils_no_gradient_with_one_that_is_not_finite(make: Make, culprit: int, value: float) -> None:
    target = Tenants("a", "plug")
    online = make(target, queue_size=1, policy="merge")
    pairs = [make_pair(0), make_pair(1)]
    pairs[culprit][1][2, 1] = value
    with target.busy(online):
        online.submit("a", 0.5, *pairs[0])
        with pytest.raises(DeadlineError):
            online.submit("a", 0.5, *pairs[1], timeout=0)
    online.flush(TIMEOUT)
    assert np.array_equal(target.jobs[1][3], pairs[0][1], equal_nan=True)


def test_merge_overtakes_nobody_of_the_same_tenant_who_waits_for_room(make: Make) -> None:
    """Nor one that could not be merged itself."""
    target = Tenants("a", "plug")
    online = make(target, queue_size=1, policy="merge")
    spoilt = make_pair(1)[0] * np.float32(math.nan), make_pair(1)[1]

    async def train() -> None:
        with target.busy(online):
            online.submit("a", 1.0, *make_pair(0))
            second = asyncio.create_task(online.asubmit("a", 2.0, *spoilt))
            await turns(lambda: online.counters()["blocked"] == 1)
            with pytest.raises(DeadlineError):
                online.submit("a", 3.0, *make_pair(2), timeout=0)
        with pytest.raises(NonFiniteGradientError):
            await (await second)

    asyncio.run(train())
    assert [job[1] for job in target.jobs] == [0.0, 1.0, 2.0]
    assert adds_up(online)


def test_merge_adds_nothing_of_another_form(make: Make) -> None:
    """A pair, and the same adapter's gradients as one vector."""
    target = Tenants("a", "plug")
    online = make(target, queue_size=1, policy="merge")
    with target.busy(online):
        online.submit("a", 0.5, *make_pair())
        with pytest.raises(DeadlineError):
            online.submit("a", 0.5, fill(Gradients(target.adapters["a"])), timeout=0)
    online.flush(TIMEOUT)
    assert target.trainers["a"].total_steps() == 1


def test_merge_into_a_cancelled_job_takes_its_place(make: Make) -> None:
    target = Tenants("a", "plug")
    online = make(target, queue_size=1, policy="merge")
    with target.busy(online):
        first = online.submit("a", 1.0, *make_pair(1))
        assert first.cancel()
        second = online.submit("a", 2.0, *make_pair(2))
        third = online.submit("a", 4.0, *make_pair(3))
        assert not third.cancel()
    assert second is third
    assert second.result(TIMEOUT).loss == 3.0
    assert np.array_equal(target.jobs[1][2], make_pair(2)[0] + make_pair(3)[0])
    online.flush(TIMEOUT)
    counts = online.counters()
    assert (counts["cancelled"], counts["merged"], counts["blocked"]) == (1, 1, 0)
    assert adds_up(online)


def test_merge_that_overflows_is_refused_by_the_step(make: Make) -> None:
    target = Tenants("a", "plug")
    online = make(target, queue_size=1, policy="merge")
    pair = [np.full_like(part, 3e38) for part in make_pair()]
    with target.busy(online):
        ticket, _ = (online.submit("a", 0.5, *pair) for _ in range(2))
    assert isinstance(ticket.exception(TIMEOUT), NonFiniteGradientError)


def test_job_that_is_being_added_to_keeps_its_turn_until_the_sum_is_whole(make: Make) -> None:
    """The worker comes while a thread adds: it does other tenants' jobs meanwhile."""
    target = Tenants("a", "b", "plug")
    online = make(target, queue_size=2, policy="merge")
    with contextlib.ExitStack() as stack:
        stack.enter_context(target.busy(online))
        online.submit("a", 1.0, *make_pair(1))
        online.submit("b", 0.5, *make_pair())
        job = next(iter(online._queue._waiting))
        with job.adding:  # so the thread waits in the midst of adding
            adder = threading.Thread(target=online.submit, args=("a", 2.0, *make_pair(2)))
            adder.start()
            until(lambda: online.counters()["merged"] == 1)
            target.gate.set()
            until(lambda: ["b"] in target.calls)
            until(lambda: online.counters()["running"] == 0)
            assert online.counters()["waiting"] == 1
        adder.join(TIMEOUT)
        online.flush(TIMEOUT)
    assert target.calls == [["plug"], ["b"], ["a"]]
    assert target.jobs[-1][1] == 1.5
    assert np.array_equal(target.jobs[-1][2], make_pair(1)[0] + make_pair(2)[0])


def test_close_while_a_thread_adds_drops_both(make: Make) -> None:
    target = Tenants("a", "plug")
    online = make(target, queue_size=1, policy="merge")
    tickets = []
    with target.busy(online):
        tickets.append(online.submit("a", 1.0, *make_pair(1)))
        job = next(iter(online._queue._waiting))
        with job.adding:
            adder = threading.Thread(target=lambda: tickets.append(online.submit("a", 2.0, *make_pair(2))))
            adder.start()
            until(lambda: online.counters()["merged"] == 1)
            online.close(0)
        adder.join(TIMEOUT)
    assert tickets[0] is tickets[1]
    assert isinstance(tickets[0].exception(TIMEOUT), DroppedError)
    online.flush(TIMEOUT)
    assert target.calls == [["plug"]]
    assert adds_up(online)


# ---------------------------------------------------------------- flush, drain, close


def test_flush_waits_for_what_was_submitted_before_it(make: Make) -> None:
    target = Tenants("a", "plug")
    reported: list[float] = []
    online = make(target, on_result=lambda _, record: reported.append(record.loss))
    with target.busy(online):
        online.submit("a", 0.5, *make_pair())
        left = "1 jobs that wait and 1 under way"
        with pytest.raises(DeadlineError, match=f"flush must be over within 0.01 seconds, got {left}"):
            online.flush(0.01)
    online.flush(TIMEOUT)
    assert reported == [0.0, 0.5]
    counts = online.counters()
    assert (counts["waiting"], counts["running"], counts["done"]) == (0, 0, 2)
    online.flush(0)
    online.flush()


def test_flush_does_not_wait_for_what_came_after_it(make: Make) -> None:
    target = Tenants("a", "b", "plug")

    def on_result(tenant: str, record: Any) -> None:
        if tenant == "a":
            target.gate.clear()  # so that b's step does not end

    online = make(target, batch_size=1, on_result=on_result)
    with target.busy(online):
        online.submit("a", 0.5, *make_pair())
        thread = threading.Thread(target=online.flush, args=(TIMEOUT,))
        thread.start()
        until(lambda: bool(online._work_done._waiters))
        online.submit("b", 0.5, *make_pair())
        target.gate.set()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
        until(lambda: ["b"] in target.calls)
        assert online.counters()["running"] == 1


def test_drain_accepts_nothing_and_finishes_everything(make: Make) -> None:
    target = Tenants("a", "plug")
    online = make(target)
    with target.busy(online):
        ticket = online.submit("a", 0.5, *make_pair())
        with pytest.raises(DeadlineError, match="got 1 jobs that wait and 1 under way"):
            online.drain(0)
        with pytest.raises(
            StateError, match="a job must be submitted to an open OnlineTrainer, got one that is closed"
        ):
            online.submit("a", 0.5, *make_pair())
    online.drain(TIMEOUT)
    assert ticket.result(0).loss == 0.5
    assert online.counters()["submitted"] == 2


@pytest.mark.parametrize("how", ["drain", "close"])
def test_whoever_waits_for_room_is_told_of_the_end(make: Make, how: str) -> None:
    target = Tenants("a", "plug")
    online = make(target, queue_size=1)
    refused = []

    def submit() -> None:
        with pytest.raises(StateError, match="got one that is closed") as caught:
            online.submit("a", 0.25, *make_pair())
        refused.append(caught.value)

    with target.busy(online):
        ticket = online.submit("a", 0.5, *make_pair())
        thread = threading.Thread(target=submit)
        thread.start()
        until(lambda: online.counters()["blocked"] == 1)
        ender = threading.Thread(target=getattr(online, how), args=(TIMEOUT,))
        ender.start()
        thread.join(TIMEOUT)
    ender.join(TIMEOUT)
    assert len(refused) == 1
    assert ticket.result(TIMEOUT).loss == 0.5
    assert target.trainers["a"].total_steps() == 1
    assert adds_up(online)


def test_close_finishes_everything_and_can_be_repeated() -> None:
    target, metrics = Tenants("a", "plug"), ServingMetrics()
    online = OnlineTrainer(target, metrics=metrics)
    with target.busy(online):
        ticket = online.submit("a", 0.5, *make_pair())
    for _ in range(2):
        online.close(TIMEOUT)
        assert ticket.result(0).loss == 0.5
    online.close()
    online.drain(0)
    online.flush(0)
    with pytest.raises(StateError, match="got one that is closed"):
        online.submit("a", 0.5, *make_pair())
    assert (online.counters()["done"], metrics.values()["dropped"], metrics.values()["queue_depth"]) == (2, 0, 0)


def test_close_that_takes_too_long_drops_what_has_not_begun() -> None:
    target, metrics = Tenants("a", "plug"), ServingMetrics()
    online = OnlineTrainer(target, metrics=metrics)
    with target.busy(online) as plug:
        tickets = [online.submit("a", 0.5, *make_pair()) for _ in range(3)]
        assert tickets[1].cancel()
        online.close(0.01)
        for ticket in (tickets[0], tickets[2]):
            message = "the job of tenant 'a' was dropped because its trainer was closed before its turn"
            with pytest.raises(DroppedError, match=message):
                ticket.result(0)
        assert not plug.done()
        assert (online.counters()["dropped"], online.counters()["cancelled"]) == (2, 1)
        online.close(0)
    assert plug.result(TIMEOUT).loss == 0.0  # it was under way, and is acknowledged
    online.close(TIMEOUT)
    assert (target.trainers["a"].total_steps(), target.trainers["plug"].total_steps()) == (0, 1)
    assert 'dropped_jobs_total{tenant="a",policy="close"} 2' in metrics.text()
    assert adds_up(online)


def test_close_of_a_trainer_that_never_worked_is_quiet() -> None:
    with OnlineTrainer(Tenants("a")) as online:
        online.flush(0)
    assert set(online.counters().values()) == {0}


@pytest.mark.parametrize("timeout", [-1, math.nan, math.inf, "1", True, 1e300])
def test_timeout_that_is_none_is_refused(make: Make, timeout: Any) -> None:
    online = make(Tenants("a"))
    message = "timeout must be a number of seconds >= 0, or None, got"
    for call in (online.flush, online.drain, online.close):
        with pytest.raises(InputError, match=message):
            call(timeout)
    with pytest.raises(InputError, match=message):
        online.submit("a", 0.5, *make_pair(), timeout=timeout)
    online.submit("a", 0.5, *make_pair(), timeout=1).result(TIMEOUT)


# ---------------------------------------------------------------- tickets that are cancelled


def test_cancelled_job_is_not_stepped(make: Make) -> None:
    target = Tenants("a", "b", "plug")
    online = make(target, batch_size=1)
    with target.busy(online):
        tickets = [online.submit(name, float(i), *make_pair()) for i, name in enumerate("aaab")]
        assert tickets[0].cancel()
        assert tickets[2].cancel()
        with pytest.raises(CancelledError):
            tickets[0].result(0)
        assert online.counters()["waiting"] == 4
    online.flush(TIMEOUT)
    assert sorted(job[1] for job in target.jobs[1:]) == [1.0, 3.0]
    assert online.counters()["cancelled"] == 2
    assert adds_up(online)


def test_flush_ends_when_all_that_waits_was_cancelled(make: Make) -> None:
    target = Tenants("a", "plug")
    online = make(target)
    with target.busy(online):
        ticket = online.submit("a", 0.5, *make_pair())
        assert ticket.cancel()
    online.flush(TIMEOUT)
    assert target.calls == [["plug"]]


def test_flush_hears_of_cancelled_jobs_that_were_the_last(make: Make) -> None:
    """It looked when the step was done and the cancelled job still there; the worker finds nothing else."""
    target = Tenants("a", "plug")
    online = make(target)
    looks = []
    is_done, next_batch = online._queue.is_done_up_to, online._next_batch
    with target.busy(online):
        assert online.submit("a", 0.5, *make_pair()).cancel()
        online._queue.is_done_up_to = lambda number: looks.append(number) or is_done(number)
        thread = threading.Thread(target=online.flush, args=(TIMEOUT,))
        thread.start()
        until(lambda: len(looks) == 1)

        def late() -> Any:
            until(lambda: len(looks) == 2)
            return next_batch()

        online._next_batch = late
        target.gate.set()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    online._next_batch = next_batch


def test_nothing_is_kept_of_tenants_whose_jobs_are_done(make: Make) -> None:
    names = [f"t{i}" for i in range(50)]
    online = make(Tenants(*names), queue_size=4, policy="merge")
    for name in names:
        online.submit(name, 0.5, *make_pair())
    online.flush(TIMEOUT)
    queue = online._queue
    assert [len(part) for part in (queue._lines, queue._ready, queue._waiting, queue._blocked, queue.running)] == [
        0
    ] * 5
    assert queue.n_bytes == 0


def test_job_under_way_cannot_be_cancelled(make: Make) -> None:
    target = Tenants("plug")
    online = make(target)
    with target.busy(online) as ticket:
        assert not ticket.cancel()
    assert ticket.result(TIMEOUT).loss == 0.0


def test_ticket_that_its_holder_fulfils_stops_nothing(make: Make) -> None:
    target = Tenants("a", "plug")
    online = make(target)
    with target.busy(online) as ticket:
        ticket.set_exception(OSError("mine"))
    assert online.submit("a", 0.5, *make_pair()).result(TIMEOUT).loss == 0.5
    assert isinstance(ticket.exception(0), OSError)


def test_ticket_that_its_holder_fulfils_before_its_turn_is_as_good_as_cancelled(make: Make) -> None:
    target = Tenants("a", "b", "plug")
    online = make(target)
    with target.busy(online):
        ticket, other = (online.submit(name, 0.5, *make_pair()) for name in "ab")
        ticket.set_exception(OSError("mine"))
    assert other.result(TIMEOUT).loss == 0.5
    online.flush(TIMEOUT)
    assert isinstance(ticket.exception(0), OSError)
    assert target.trainers["a"].total_steps() == 0
    assert online.counters()["cancelled"] == 1
    assert adds_up(online)


@pytest.mark.parametrize("error", [SystemExit("out"), KeyboardInterrupt()], ids=["SystemExit", "KeyboardInterrupt"])
def test_callback_of_a_ticket_that_raises_stops_nothing(
    make: Make, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """A future itself stops an Exception, and nothing more than that."""

    def callback(ticket: Any) -> None:
        raise error

    target, seen = Tenants("a", "b", "plug"), []
    online = make(target, on_result=lambda tenant, _: seen.append(tenant))
    with caplog.at_level(logging.ERROR, "cylora"), target.busy(online):
        first, other = (online.submit(name, 0.5, *make_pair()) for name in "ab")
        first.add_done_callback(callback)
        target.gate.set()
        assert other.result(TIMEOUT).loss == 0.5
        online.flush(TIMEOUT)
    assert first.result(TIMEOUT).loss == 0.5
    assert seen == ["plug", "a", "b"]
    assert online.counters()["callback_errors"] == 1
    logged = [record.message for record in caplog.records if record.name == "cylora"]
    assert logged == [f"a ticket's callback raised {type(error).__name__} for tenant 'a'"]


def test_ticket_is_fulfilled_whatever_metrics_do(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("metrics")

    metrics = ServingMetrics()
    monkeypatch.setattr(ServingMetrics, "step", broken)
    online = make(Tenants("a"), metrics=metrics)
    for _ in range(2):
        assert online.submit("a", 0.5, *make_pair()).result(TIMEOUT).loss == 0.5
    online.flush(TIMEOUT)
    assert online.counters()["callback_errors"] == 2


# ---------------------------------------------------------------- errors


def test_error_of_one_tenant_touches_no_other(make: Make) -> None:
    target, metrics = Tenants("a", "b", "c", "plug"), ServingMetrics()
    online = make(target, metrics=metrics)
    bad = make_pair(1)
    bad[0][1, 2] = math.nan
    before = target.bits("b")
    with target.busy(online):
        good = [online.submit(name, 0.5, *make_pair(1)) for name in "ac"]
        ticket = online.submit("b", 0.5, *bad)
    with pytest.raises(NonFiniteGradientError, match="nan"):
        ticket.result(TIMEOUT)
    assert [one.result(TIMEOUT).loss for one in good] == [0.5, 0.5]
    assert target.bits("b") == before
    assert target.bits("a", "c")[0] == sequentially([("a", 0.5, *make_pair(1))], "a").bits("a")[0]
    online.flush(TIMEOUT)
    assert (online.counters()["failed"], online.counters()["done"]) == (1, 3)
    assert 'errors_total{tenant="b",type="NonFiniteGradientError"} 1' in metrics.text()
    assert metrics.values()["errors"] == 1
    assert adds_up(online)
    assert online.submit("b", 0.5, *make_pair()).result(TIMEOUT).step == 0


def test_step_that_the_config_skips_is_a_skipped_record(make: Make) -> None:
    target, metrics = Tenants("a", nonfinite="skip"), ServingMetrics()
    online = make(target, metrics=metrics)
    bad = make_pair()
    bad[1][0, 0] = math.inf
    assert online.submit("a", 0.5, *bad).result(TIMEOUT).skipped
    online.flush(TIMEOUT)
    assert (metrics.values()["steps"], metrics.values()["skipped"], metrics.values()["errors"]) == (1, 1, 0)


class Wrong(Tenants):
    """A target whose calls for the tenant "bad" come to what the test says."""

    outcome: Any = None

    def step_many(self, jobs: Any) -> Any:
        jobs = list(jobs)
        results = super().step_many(jobs)
        if "bad" not in [job[0] for job in jobs]:
            return results
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome(results)


@pytest.mark.parametrize(
    ("outcome", "error", "message"),
    [
        (MemoryError("no memory"), MemoryError, "no memory"),
        (SystemExit("out"), SystemExit, "out"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (StopIteration("end"), StateError, "the step of this job raised StopIteration"),
        (lambda results: results[:1], StateError, "target.step_many must return 2 results, got 1"),
        (lambda results: [*results, None], StateError, "target.step_many must return 2 results, got 3"),
        (
            lambda results: [results[0], 3],
            StateError,
            "target.step_many must return TrainingSteps and Exceptions, got int",
        ),
        (lambda results: None, TypeError, "NoneType"),
    ],
)
def test_call_that_goes_wrong_fails_its_own_jobs_alone(make: Make, outcome: Any, error: Any, message: str) -> None:
    target, metrics = Wrong("a", "b", "bad", "plug"), ServingMetrics()
    target.outcome = outcome
    online = make(target, batch_size=2, metrics=metrics)
    with target.busy(online):
        tickets = [online.submit(name, 0.5, *make_pair()) for name in ("a", "bad", "b")]
    for ticket in tickets[:2]:
        with pytest.raises(error, match=message):
            ticket.result(TIMEOUT)
    assert tickets[2].result(TIMEOUT).loss == 0.5
    online.flush(TIMEOUT)
    assert (online.counters()["failed"], online.counters()["done"], metrics.values()["errors"]) == (2, 2, 2)
    assert adds_up(online)


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit("out")])
def test_callback_that_raises_is_logged_and_counted_and_stops_nothing(
    make: Make, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    def on_result(tenant: str, result: Any) -> None:
        seen.append((tenant, result))
        if tenant == "a":
            raise error

    target, seen = Tenants("a", "b", "plug"), []
    online = make(target, on_result=on_result)
    with caplog.at_level(logging.ERROR, "cylora"), target.busy(online):
        tickets = [online.submit(name, 0.5, *make_pair()) for name in "aab"]
        target.gate.set()
        records = [ticket.result(TIMEOUT) for ticket in tickets]
        online.flush(TIMEOUT)
    logged = [record.message for record in caplog.records if record.name == "cylora"]
    assert logged == [f"on_result raised {type(error).__name__} for tenant 'a'"] * 2
    assert caplog.records[0].exc_info[1] is error
    assert online.counters()["callback_errors"] == 2
    assert online.counters()["done"] == 4
    assert dict(seen[1:]) == {"a": records[1], "b": records[2]}


def test_callback_gets_errors_too(make: Make) -> None:
    seen: list[Any] = []
    online = make(Tenants("a"), on_result=lambda *result: seen.append(result))
    ticket = online.submit("a", 0.5, make_pair()[0] * math.nan, make_pair()[1])
    error = ticket.exception(TIMEOUT)
    online.flush(TIMEOUT)
    assert seen == [("a", error)]


def test_metrics_know_a_step_before_its_ticket_does(make: Make) -> None:
    metrics = ServingMetrics()
    online = make(Tenants("a"), metrics=metrics)
    for i in range(20):
        online.submit("a", 0.5, *make_pair()).result(TIMEOUT)
        assert metrics.values()["steps"] == i + 1
    assert metrics.values()["step_seconds"] > 0


def test_queue_depth_is_what_waits(make: Make) -> None:
    target, metrics = Tenants("a", "plug"), ServingMetrics()
    online = make(target, metrics=metrics)
    with target.busy(online):
        for i in range(3):
            assert metrics.values()["queue_depth"] == i
            online.submit("a", 0.5, *make_pair())
    online.flush(TIMEOUT)
    assert metrics.values()["queue_depth"] == 0


def test_queue_depth_is_zero_after_a_close_that_dropped_what_waited() -> None:
    target, metrics = Tenants("a", "plug"), ServingMetrics()
    online = OnlineTrainer(target, metrics=metrics)
    with target.busy(online):
        for _ in range(3):
            online.submit("a", 0.5, *make_pair())
        online.close(0)
        assert metrics.values()["queue_depth"] == 0
    online.close(TIMEOUT)
    assert (online.counters()["dropped"], metrics.values()["queue_depth"]) == (3, 0)


def test_callback_may_submit_but_never_waits(make: Make) -> None:
    errors: list[BaseException] = []

    def on_result(tenant: str, result: Any) -> None:
        if tenant == "plug":
            for _ in range(2):
                try:
                    online.submit("b", 0.25, *make_pair())
                except DeadlineError as error:
                    errors.append(error)

    target = Tenants("a", "b", "plug")
    online = make(target, queue_size=2, on_result=on_result)
    with target.busy(online):
        online.submit("a", 0.5, *make_pair())
    until(lambda: online.counters()["done"] == 3)
    assert len(errors) == 1
    assert "within 0.0 seconds" in str(errors[0])
    assert target.calls == [["plug"], ["a", "b"]]


def test_callback_must_not_wait_for_its_own_worker(make: Make) -> None:
    refused: list[str] = []

    def on_result(tenant: str, result: Any) -> None:
        for call in (online.flush, online.drain, online.close):
            with pytest.raises(StateError) as caught:
                call()
            refused.append(str(caught.value))

    online = make(Tenants("a"), on_result=on_result)
    online.submit("a", 0.5, *make_pair())
    online.flush(TIMEOUT)
    assert refused == [
        f"{what} must be called from outside, got a call from a worker's callback"
        for what in ("flush", "drain", "close")
    ]
    online.submit("a", 0.5, *make_pair())


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, r"workers must be an integer in \[1, 64\], got 0"),
        ({"queue_size": 0}, "queue_size must be an integer >= 1, got 0"),
        ({"queue_bytes": 1.5}, "queue_bytes must be an integer, got 1.5"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"policy": "drop"}, "policy must be one of 'block', 'drop_oldest', 'merge', got 'drop'"),
        ({"on_result": 3}, "on_result must be callable or None, got int"),
        ({"metrics": 3}, "metrics must be a ServingMetrics or None, got int"),
        ({"nice": 20}, r"nice must be an integer in \[0, 19\], got 20"),
        ({"cpus": 3}, "cpus must be a collection of integers, got 3"),
        ({"cpus": ["x"]}, "cpus must be an integer, got 'x'"),
        ({"cpus": []}, r"cpus must be some of \[.*\], got \[\]"),
        ({"cpus": [2**20]}, rf"cpus must be some of \[.*\], got \[{2**20}\]"),
    ],
)
def test_option_that_breaks_its_rule_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OnlineTrainer(Tenants("a"), **options)


@pytest.mark.parametrize("target", [None, 3, type("Half", (), {"check": print})()])
def test_target_that_is_none_is_refused(target: Any) -> None:
    message = "target must have methods check and step_many, got (NoneType|int|Half)"
    with pytest.raises(ConfigError, match=message):
        OnlineTrainer(target)


class Placed(Tenants):
    """A target that notes where and how it is called."""

    def step_many(self, jobs: Any) -> Any:
        self.nice, self.cpus = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
        return super().step_many(jobs)


def test_worker_gives_way(make: Make) -> None:
    cpus = os.sched_getaffinity(0)
    mine, target = os.getpriority(os.PRIO_PROCESS, 0), Placed("a")
    make(target, nice=19, cpus={max(cpus)}).submit("a", 0.5, *make_pair()).result(TIMEOUT)
    assert (target.nice, target.cpus) == (19, {max(cpus)})
    assert (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)) == (mine, cpus)


def test_worker_never_asks_for_more_than_its_process_has(make: Make) -> None:
    mine, target = os.getpriority(os.PRIO_PROCESS, 0), Placed("a")
    make(target, nice=0).submit("a", 0.5, *make_pair()).result(TIMEOUT)
    assert (target.nice, target.cpus) == (max(mine, 0), os.sched_getaffinity(0))


def test_worker_whose_priority_the_system_refuses_to_change_works(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("sandbox")

    monkeypatch.setattr(os, "setpriority", refuse)
    with caplog.at_level(logging.WARNING, "cylora"):
        make(Tenants("a")).submit("a", 0.5, *make_pair()).result(TIMEOUT)
    assert caplog.messages == ["an online trainer's worker keeps its priority and CPUs: sandbox"]


def test_elsewhere_threads_have_no_priority_of_their_own(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, target = os.getpriority(os.PRIO_PROCESS, 0), Placed("a")
    monkeypatch.setattr(sys, "platform", "darwin")
    make(target, nice=19).submit("a", 0.5, *make_pair()).result(TIMEOUT)
    assert target.nice == mine
    with pytest.raises(ConfigError, match=r"cpus must be None on darwin, got \{1\}"):
        OnlineTrainer(target, cpus={1})


# ---------------------------------------------------------------- asyncio


def test_asubmit_returns_a_future_of_the_record(make: Make) -> None:
    target, twins = Tenants("a"), Tenants("a")
    online = make(target)

    async def train() -> TrainingStep:
        return await (await online.asubmit("a", 0.5, *make_pair(1)))

    assert asyncio.run(train()) == twins.trainers["a"].step(0.5, twins.adapters["a"], *make_pair(1))
    assert target.bits() == twins.bits()


def test_asubmit_copies_large_gradients_in_another_thread(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_module, "LARGE_BYTES", 131)
    copied_by = []

    class Watched(Tenants):
        def check(self, *job: Any) -> None:
            copied_by.append(threading.current_thread())
            super().check(*job)

    small, gradients = (
        fill(Gradients(adapters := AdapterSet({"x": (6, 5)}, LoraConfig(rank=2), seed=0))),
        whole_set(1)[1],
    )
    target = Watched("a", adapters={"small": adapters, "set": whole_set(1)[0]})
    online = make(target)

    async def train() -> None:
        for tenant, *given in (("small", small), ("a", *make_pair()), ("set", gradients)):
            assert (await (await online.asubmit(tenant, 0.5, *given))).step == 0
        with pytest.raises(InputError, match="tenant must be one of a, small, set, got 'b'"):
            await online.asubmit("b", 0.5, gradients)

    asyncio.run(train())
    assert [thread is threading.current_thread() for thread in copied_by] == [True, False, False, False]
    assert np.array_equal(target.jobs[2][2], gradients.vector)


def test_asubmit_raises_what_submit_raises(make: Make) -> None:
    online = make(Tenants("a"), queue_bytes=200)

    async def train() -> None:
        with pytest.raises(InputError, match="tenant must be one of a, got 'b'"):
            await online.asubmit("b", 0.5, *make_pair())
        with pytest.raises(InputError, match="timeout must be"):
            await online.asubmit("a", 0.5, *make_pair(), timeout=-1)
        with pytest.raises(NonFiniteGradientError):
            await (await online.asubmit("a", 0.5, make_pair()[0] * math.nan, make_pair()[1]))
        online.drain()
        with pytest.raises(StateError, match="got one that is closed"):
            await online.asubmit("a", 0.5, *make_pair())

    asyncio.run(train())


async def turns(holds: Callable[[], bool]) -> None:
    """Let the event loop go on until something holds."""
    deadline = time.monotonic() + TIMEOUT
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def test_asubmit_waits_for_room_and_the_event_loop_goes_on(make: Make) -> None:
    target = Tenants("a", "b", "plug")
    online = make(target, queue_size=1)

    async def train() -> None:
        with target.busy(online):
            online.submit("a", 0.5, *make_pair())
            tasks = [asyncio.create_task(online.asubmit("b", float(i), *make_pair())) for i in range(3)]
            await turns(lambda: online.counters()["blocked"] == 3)  # this coroutine has turns meanwhile
            assert not any(task.done() for task in tasks)
        assert [(await (await task)).loss for task in tasks] == [0.0, 1.0, 2.0]

    asyncio.run(train())
    online.flush(TIMEOUT)
    assert adds_up(online)


def test_asubmit_gives_up_in_time(make: Make) -> None:
    target = Tenants("a", "plug")
    online = make(target, queue_size=2)

    async def train() -> None:
        with target.busy(online):
            for _ in range(2):
                await online.asubmit("a", 0.5, *make_pair(), timeout=TIMEOUT)
            for timeout in (0, 0.01):
                with pytest.raises(DeadlineError, match=FULL):
                    await online.asubmit("a", 0.5, *make_pair(), timeout=timeout)

    asyncio.run(train())
    online.flush(TIMEOUT)
    counts = online.counters()
    assert (counts["expired"], counts["done"], counts["submitted"]) == (2, 3, 3)


def test_task_cancelled_while_it_waits_for_room_has_submitted_nothing(make: Make) -> None:
    target = Tenants("a", "plug")
    online = make(target, queue_size=1)

    async def train() -> None:
        with target.busy(online):
            online.submit("a", 0.5, *make_pair())
            tasks = [asyncio.create_task(online.asubmit("a", float(i), *make_pair())) for i in (1, 2)]
            await turns(lambda: online.counters()["blocked"] == 2)
            tasks[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]
        assert (await (await tasks[1])).loss == 2.0

    asyncio.run(train())
    online.flush(TIMEOUT)
    assert [job[1] for job in target.jobs] == [0.0, 0.5, 2.0]
    assert adds_up(online)


def test_task_cancelled_when_its_job_had_just_been_taken_withdraws_it(make: Make) -> None:
    """Room came and the task was cancelled before its loop told it."""
    target = Tenants("a", "b", "plug")
    online = make(target, queue_size=1, batch_size=1)

    async def train() -> None:
        with target.busy(online):
            online.submit("a", 0.5, *make_pair())
            task = asyncio.create_task(online.asubmit("b", 1.0, *make_pair()))
            await turns(lambda: online.counters()["blocked"] == 1)
            target.gate.clear()
            with online._lock:
                online._queue.withdraw(next(iter(online._queue._waiting)))
            assert online.counters()["waiting"] == 1  # b's, now
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert online.counters()["waiting"] == 0

    asyncio.run(train())
    online.flush(TIMEOUT)
    assert target.calls == [["plug"]]


def test_cancelled_task_takes_no_job_away_that_another_was_merged_into(make: Make) -> None:
    """Room came, another submission was added, and then the task was cancelled before its loop told it."""
    target = Tenants("a", "b", "plug")
    online = make(target, queue_size=1, batch_size=1, policy="merge")

    async def train() -> Ticket:
        with target.busy(online):
            online.submit("b", 0.5, *make_pair())
            task = asyncio.create_task(online.asubmit("a", 1.0, *make_pair(0)))
            await turns(lambda: online.counters()["blocked"] == 1)
            with online._lock:
                online._queue.withdraw(next(iter(online._queue._waiting)))  # b's; now a's is there
            ticket = online.submit("a", 3.0, *make_pair(1), timeout=0)
            assert online.counters()["merged"] == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return ticket

    assert asyncio.run(train()).result(TIMEOUT).loss == 2.0
    online.flush(TIMEOUT)
    assert target.calls == [["plug"], ["a"]]


def test_one_who_was_cancelled_a_moment_ago_is_passed_over(make: Make) -> None:
    """Its future is cancelled, but it has not left the line yet."""
    target = Tenants("a", "b", "plug")
    online = make(target, queue_size=1)
    with target.busy(online):
        online.submit("a", 0.5, *make_pair())
        waiting = [online._enter(online._job("b", loss, *make_pair()))[1] for loss in (1.0, 2.0, 3.0)]
        assert waiting[0].cancel()
        assert waiting[2].cancel()
        target.gate.set()
        waiting[1].result(TIMEOUT)
        online.flush(TIMEOUT)
    assert [job[1] for job in target.jobs] == [0.0, 0.5, 2.0]
    with target.busy(online):
        online.submit("a", 0.5, *make_pair())
        assert online._enter(online._job("b", 1.0, *make_pair()))[1].cancel()
        online.close(0)


def test_cancelled_future_cancels_the_job(make: Make) -> None:
    target = Tenants("a", "plug")
    online = make(target)

    async def train() -> None:
        with target.busy(online) as plug:
            future = await online.asubmit("a", 0.5, *make_pair())
            under_way = asyncio.wrap_future(plug)
            for one in (future, under_way):
                one.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await one
            await asyncio.sleep(0)  # asyncio tells the ticket in a callback of its own

    asyncio.run(train())
    online.flush(TIMEOUT)
    assert target.calls == [["plug"]]
    assert (online.counters()["cancelled"], online.counters()["done"]) == (1, 1)


def test_event_loop_that_ended_stops_no_worker(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    target = Tenants("a", "plug")
    online = make(target)

    async def submit() -> Any:
        return await online.asubmit("a", 0.5, *make_pair())

    with target.busy(online):
        loop = asyncio.new_event_loop()
        future = loop.run_until_complete(submit())
        loop.close()
    online.flush(TIMEOUT)
    assert not future.done()
    assert online.submit("a", 0.25, *make_pair()).result(TIMEOUT).step == 1


# ---------------------------------------------------------------- fork


def test_forked_child_has_an_empty_queue_and_workers_of_its_own(make: Make) -> None:
    target, metrics = Tenants("a", "b", "plug"), ServingMetrics()
    online = make(target, metrics=metrics)
    with target.busy(online) as plug:
        ticket = online.submit("a", 0.5, *make_pair(1))

        def work() -> None:
            target.renew()
            assert online.counters()["submitted"] == 0
            for one in (plug, ticket):
                for read in (one.result, one.exception):
                    with pytest.raises(StateError, match=f"must be read in its own process, {os.getppid()}, got"):
                        read(TIMEOUT)
            record = online.submit("a", 0.25, *make_pair(2)).result(TIMEOUT)
            assert (record.step, record.loss) == (0, 0.25)
            online.flush(TIMEOUT)
            assert online.counters()["done"] == 1
            online.close(TIMEOUT)

        assert in_child(work) == 0
    assert ticket.result(TIMEOUT).loss == 0.5
    assert target.bits("a") == sequentially([("a", 0.5, *make_pair(1))], "a").bits("a")


def fork_while_it_works(times: int) -> None:
    """Fork while two workers step, and let each child step what nobody was stepping, to the bits of its parent."""
    target = Tenants("a", "b", "c", "idle")
    expected = sequentially([("idle", 0.25, *make_pair(2))], "a", "b", "c", "idle").bits("idle")
    stop = threading.Event()

    def flood(name: str) -> None:
        while not stop.is_set():
            online.submit(name, 0.5, *make_pair())

    def work() -> None:
        target.renew()
        tickets = [online.submit(name, 0.25, *make_pair(2)) for name in ("a", "b", "c", "idle")]
        for ticket in tickets[:3]:
            error = ticket.exception(TIMEOUT)
            assert error is None or "forked while another thread was in a step" in str(error)
        assert tickets[3].result(TIMEOUT).step == 0
        assert target.bits("idle") == expected
        online.close(TIMEOUT)

    with OnlineTrainer(target, workers=2, queue_size=8, metrics=ServingMetrics()) as online:
        threads = [threading.Thread(target=flood, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        try:
            for _ in range(times):
                assert in_child(work) == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert online.counters()["failed"] == 0


def test_children_forked_while_it_works_train() -> None:
    fork_while_it_works(10)


@pytest.mark.nightly
def test_a_thousand_children_forked_while_it_works_train(figures: Callable[..., None]) -> None:
    fork_while_it_works(1000)
    figures(forks=1000, hangs=0)


def test_forked_child_is_not_locked_out(make: Make) -> None:
    online = make(Tenants("a"))
    online.submit("a", 0.5, *make_pair()).result(TIMEOUT)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with online._lock:
            held.set()
            release.wait(TIMEOUT)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(TIMEOUT)
    try:
        assert in_child(lambda: online.submit("a", 0.5, *make_pair()).result(TIMEOUT)) == 0
    finally:
        release.set()
        thread.join(TIMEOUT)


def test_child_of_a_closed_trainer_finds_it_closed() -> None:
    with OnlineTrainer(Tenants("a")) as online:
        online.submit("a", 0.5, *make_pair())

    def work() -> None:
        with pytest.raises(StateError, match="got one that is closed"):
            online.submit("a", 0.5, *make_pair())
        online.close()

    assert in_child(work) == 0


def test_callback_that_forks_leaves_no_worker_in_the_child(make: Make) -> None:
    codes: list[int] = []

    def on_result(tenant: str, result: Any) -> None:
        if not codes:
            child = os.fork()
            if child == 0:  # the rest of the worker runs here: it must come to an end by itself
                OnlineTrainer._do_some = ending(OnlineTrainer._do_some)
            else:
                codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    def ending(do_some: Any) -> Any:
        def last(self: OnlineTrainer) -> bool:
            os._exit(int(do_some(self)))

        return last

    online = make(Tenants("a"), on_result=on_result)
    online.submit("a", 0.5, *make_pair()).result(TIMEOUT)
    online.flush(TIMEOUT)
    assert codes == [0]
    assert online.submit("a", 0.5, *make_pair()).result(TIMEOUT).step == 1


def test_everything_begins_anew_as_in_a_child() -> None:
    """The same, seen from inside one process."""
    target = Tenants("a", "plug")
    online = OnlineTrainer(target)
    lock = online._lock
    with target.busy(online):
        online.submit("a", 0.5, *make_pair())
        (worker,) = online._threads
        online_module._begin_all_anew()
        assert online._lock is not lock
        assert set(online.counters().values()) == {0}
    worker.join(TIMEOUT)  # it finishes what the new queue has never heard of, and ends, being none of the new workers
    assert target.calls == [["plug"]]
    assert online.submit("a", 0.5, *make_pair()).result(TIMEOUT).step == 0
    online.close()


def test_ticket_of_another_process_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = make(Tenants("a")).submit("a", 0.5, *make_pair())
    ticket.result(TIMEOUT)
    mine = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    for read in (ticket.result, ticket.exception):
        with pytest.raises(StateError, match=f"a ticket must be read in its own process, {mine}, got the child -1"):
            read()


def test_worker_that_is_none_of_the_trainers_ends() -> None:
    """As one that a callback took along into a child."""
    online = OnlineTrainer(Tenants("a"))
    online._work()
    online.close()


# ---------------------------------------------------------------- exit

WORKER = Path(__file__).parent / "worker_exit.py"
WAYS = ("end", "exit", "raise", "waiter", "blocked", "asyncio", "hung", "last")


def exit_once(way: str, seed: int) -> None:
    """Let a process end while its online trainers work, and check that it was a good end."""
    command = [sys.executable, "-X", "faulthandler", str(WORKER), way, str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    expected = {"exit": 3, "raise": 1}.get(way, 0)
    assert done.returncode == expected, f"{way} {seed}: {done.returncode}\n{done.stderr}"
    assert "Fatal" not in done.stderr
    assert ("RuntimeError: on purpose" in done.stderr) == (way == "raise")
    if way != "raise":
        assert done.stderr == ""
    assert done.stdout == {
        "waiter": "got a record\n",
        "hung": "left behind\n",
        "last": "DroppedError\nplug 0\n",
    }.get(way, "")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("way", WAYS)
def test_process_ends_while_it_works(way: str, seed: int) -> None:
    exit_once(way, seed)


@pytest.mark.nightly
def test_process_ends_three_hundred_times_while_it_works(figures: Callable[..., None]) -> None:
    for seed in range(300):
        exit_once(WAYS[seed % len(WAYS)], seed)
    figures(exits=300, crashes=0, hangs=0)


def test_hook_at_exit_drops_what_waits_and_lets_a_step_end() -> None:
    """The same, seen from inside one process."""
    target = Tenants("a", "plug")
    online = OnlineTrainer(target)
    with target.busy(online) as plug:
        ticket = online.submit("a", 0.5, *make_pair())
        threading.Timer(0.05, target.gate.set).start()
        online_module._stop_all()
        assert plug.result(0).loss == 0.0
    with pytest.raises(DroppedError, match="because its trainer was closed before its turn"):
        ticket.result(0)
    with pytest.raises(StateError, match="got one that is closed"):
        online.submit("a", 0.5, *make_pair())
    online.close()


# ---------------------------------------------------------------- the GIL


class Timed(Tenants):
    """A target that notes how much of the CPU its worker had used up when it was called, and for how many jobs."""

    def step_many(self, jobs: Any) -> Any:
        jobs = list(jobs)
        self.times.append((time.thread_time(), len(jobs)))
        return super().step_many(jobs)


@pytest.mark.nightly
def test_python_works_for_microseconds_a_step(figures: Callable[..., None]) -> None:
    """What a worker does for a step of an adapter whose kernel takes next to nothing, it does under the GIL."""
    names = [f"t{i}" for i in range(64)]
    microseconds = {}
    for batch_size in (1, 8, 32):
        target = Timed(*names, "plug", history_limit=10)
        rounds = []
        with OnlineTrainer(target, batch_size=batch_size, queue_size=4096, metrics=ServingMetrics()) as online:
            for _ in range(5):
                target.times = []
                with target.busy(online):
                    for i in range(4000):
                        online.submit(names[i % 64], 0.5, *make_pair())
                online.flush(TIMEOUT)
                (first, _), *_, (last, _) = target.times[1:]
                rounds.append((last - first) / sum(count for _, count in target.times[1:-1]))
        microseconds[f"batch_{batch_size}"] = round(min(rounds) * 1e6, 2)
        assert online.counters()["done"] == 5 * 4001
    figures(**microseconds)
