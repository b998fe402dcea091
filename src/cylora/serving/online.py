"""OnlineTrainer: gradients from any thread, stepped in the background.

(a) One lock guards the queue. Nobody else's code runs under it: no target, no callback, no ticket's.
(b) A worker takes one job of each of several tenants and has them stepped by one call. A tenant has at most one job
    under way, so its order is kept, and no tenant waits for another's queue.
(c) Workers are daemon threads that a hook ends before the interpreter does: a program that forgets `close` still ends,
    and none of them runs while its modules are taken down.
"""

import asyncio
import atexit
import contextlib
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Collection
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from cylora import checks
from cylora.errors import DeadlineError, DroppedError, InputError, StateError
from cylora.history import TrainingStep
from cylora.serving.job_queue import JobQueue
from cylora.serving.jobs import Job, Ticket
from cylora.serving.metrics import ServingMetrics
from cylora.serving.priority import checked_cpus, give_way
from cylora.serving.stepping import OnResult, Stepper, StepTarget

__all__ = ["OnlineTrainer"]

POLICIES = ("block", "drop_oldest", "merge")
EXIT_SECONDS = 10.0  # a step under way ends long before; what hangs does not keep the process
LARGE_BYTES = 2**20  # what takes about as long to copy as it takes to hand it to another thread and back


class OnlineTrainer:
    """Train adapters in the background from gradients that any thread submits.

    Parameters
    ----------
    target : StepTarget
        Knows the tenants and steps them: an AdapterStore.
    workers : int in 1..64
        Threads that step. Started by the first submission.
    queue_size : int >= 1
        Most jobs that wait.
    queue_bytes : int >= 1
        Most bytes of gradients, as float32, that wait.
    batch_size : int >= 1
        Most tenants stepped by one call. Python works without a pause for some microseconds for each of them, and
        other threads of this process wait as long.
    policy : "block", "drop_oldest" or "merge"
        What a submission does while there is no room. "block": wait. "drop_oldest": take the place of the oldest job,
        of the same tenant if it has one waiting. "merge": add the gradient to the same tenant's newest waiting job, and
        wait if it has none, or if one of the two is not finite.
    on_result : callable, optional
        Called by a worker with tenant and TrainingStep, or tenant and error, after each job. What it raises is logged
        and counted, and changes nothing.
    metrics : ServingMetrics, optional
        Told of steps, errors, dropped jobs and the queue's depth.
    nice : int in 0..19
        The workers' nice value, where threads have one (Linux); a higher one of the process stays.
    cpus : collection of int, optional
        The CPUs that the workers run on (Linux); by default those of the process.

    Raises
    ------
    ConfigError
        If an argument breaks its rule.

    Notes
    -----
    A merged job is one step with the sum of the gradients, which is what clipping sees, and the mean of the losses; all
    its submissions return the same ticket, which cannot be cancelled any more.

    In ``on_result`` and a ticket's callbacks, `submit` never waits, and `flush`, `drain` and `close` are a StateError.
    At the exit of the process, steps under way are done and all jobs that wait are dropped; `close` does them first. A
    forked child starts with an empty queue and workers of its own, since what waits is its parent's to do.
    """

    def __init__(
        self,
        target: StepTarget,
        *,
        workers: int = 1,
        queue_size: int = 1024,
        queue_bytes: int = 256 * 2**20,
        batch_size: int = 32,
        policy: str = "block",
        on_result: OnResult | None = None,
        metrics: ServingMetrics | None = None,
        nice: int = 10,
        cpus: Collection[int] | None = None,
    ) -> None:
        self._stepper = Stepper(target, on_result, metrics)
        self.workers = checks.integer("workers", workers, 1, 64)
        self.queue_size = checks.integer("queue_size", queue_size, 1)
        self.queue_bytes = checks.integer("queue_bytes", queue_bytes, 1)
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self.policy = checks.choice("policy", policy, POLICIES)
        self._nice = checks.integer("nice", nice, 0, 19)
        self._cpus = checked_cpus(cpus)
        self._check, self._metrics = target.check, metrics
        self._is_closed = self._is_stopping = False
        self._begin_anew()
        _living.add(self)

    def _begin_anew(self) -> None:
        """Start, or start again in a forked child, with nothing to do and no threads."""
        self._lock = threading.RLock()  # re-entrant: a signal handler may ask for the counters under it
        self._work_came = threading.Condition(self._lock)
        self._work_done = threading.Condition(self._lock)
        self._queue = JobQueue(self.queue_size, self.queue_bytes)
        self._counts: Counter[str] = Counter()
        self._threads: list[threading.Thread] = []

    # ------------------------------------------------------------------ submitting

    def submit(
        self, tenant: str, loss: float, grad_a: Any, grad_b: Any = None, *, timeout: float | None = None
    ) -> Ticket:
        """Have one step done, in the order of submissions for this tenant, and return the ticket of its record.

        Parameters
        ----------
        tenant, loss, grad_a, grad_b
            As for the target's ``step``. The gradients are copied before this returns.
        timeout : float >= 0, optional
            Most seconds to wait for room in the queue; None: for ever.

        Raises
        ------
        InputError
            If the target refuses an argument, or the gradients alone exceed ``queue_bytes``.
        DeadlineError
            If there was no room in time. Nothing was submitted.
        StateError
            If the trainer was closed, before or while this waits for room.
        """
        timeout = _checked_timeout(timeout)
        job = self._job(tenant, loss, grad_a, grad_b)
        try:
            ticket, admitted = self._enter(job)
            if admitted is not None:
                self._wait_for_room(job, admitted, timeout)
        except BaseException:  # an interrupt, say: nobody has the ticket
            self._withdraw(job)
            raise
        return ticket

    async def asubmit(
        self, tenant: str, loss: float, grad_a: Any, grad_b: Any = None, *, timeout: float | None = None
    ) -> "asyncio.Future[TrainingStep]":
        """Do what `submit` does without blocking the event loop, and return a future of that loop.

        ``record = await (await online.asubmit(...))``. Large gradients are copied by another thread; they must stay as
        they are until `asubmit` has returned. A task that is cancelled while it waits for room has submitted
        nothing; one that is cancelled while it awaits the future cancels the job, unless its step has begun or it was
        merged.
        """
        timeout = _checked_timeout(timeout)
        if _n_bytes(grad_a) + _n_bytes(grad_b) > LARGE_BYTES:
            job = await asyncio.to_thread(self._job, tenant, loss, grad_a, grad_b)
        else:
            job = self._job(tenant, loss, grad_a, grad_b)
        try:
            ticket, admitted = self._enter(job)
            if admitted is not None:
                try:
                    async with asyncio.timeout(timeout):
                        await asyncio.wrap_future(admitted)
                except TimeoutError:
                    self._give_up(job, timeout)
        except BaseException:
            self._withdraw(job)
            raise
        return asyncio.wrap_future(ticket)

    def _job(self, tenant: str, loss: Any, grad_a: Any, grad_b: Any) -> Job:
        self._check(tenant, loss, grad_a, grad_b)
        job = Job(tenant, loss, grad_a, grad_b, may_be_merged=self.policy == "merge")
        if job.n_bytes > self.queue_bytes:
            raise InputError(f"gradients must take at most queue_bytes={self.queue_bytes} bytes, got {job.n_bytes}")
        return job

    def _enter(self, job: Job) -> tuple[Ticket, Future[None] | None]:
        """Return the job's ticket, and where the job has to wait for room, the future to wait for."""
        dropped: list[Job] = []
        partner = admitted = None
        try:
            with self._lock:
                if self._is_closed:
                    raise _closed()
                self._start_workers()
                if self._queue.offer(job):
                    pass
                elif self.policy == "drop_oldest":
                    dropped = self._queue.displace(job)
                    self._counts["dropped"] += len(dropped)
                    self._work_done.notify_all()
                elif self.policy == "merge" and (partner := self._queue.partner_of(job)) is not None:
                    self._counts["merged"] += 1
                elif not self._queue.offer(job):  # again: a partner that was cancelled has made room
                    admitted = self._queue.wait_for_room(job)
                    self._counts["blocked"] += 1
                self._work_came.notify()
                self._note_depth()
            for victim in dropped:
                self._drop(victim, "drop_oldest", "for a newer one, since the queue was full")
            if partner is not None:
                partner.add(job)
        finally:
            if partner is not None:  # else its tenant would never have a turn again
                with self._lock:
                    self._queue.give_back(partner)
                    self._work_came.notify()
                    self._work_done.notify_all()
        if partner is None:
            return job.ticket, admitted
        if self._metrics is not None:
            self._metrics.dropped(job.tenant, "merge")
        return partner.ticket, None

    def _wait_for_room(self, job: Job, admitted: Future[None], timeout: float | None) -> None:
        if threading.current_thread() in self._threads:
            timeout = 0.0  # a worker would wait for itself
        try:
            admitted.result(timeout)
        except TimeoutError:
            self._give_up(job, timeout)

    def _give_up(self, job: Job, timeout: float | None) -> None:
        """Wait for room no longer. Raise nothing if the job was taken at the last moment."""
        with self._lock:
            if job.number:
                return
            self._queue.withdraw(job)
            self._work_came.notify()  # another may have been taken instead
            self._counts["expired"] += 1
            got = f"{len(self._queue)} jobs of {self._queue.n_bytes} bytes in the queue"
        if self._metrics is not None:
            self._metrics.dropped(job.tenant, "block")
        raise DeadlineError(f"a submission must find room within {timeout} seconds, got {got}")

    def _withdraw(self, job: Job) -> None:
        with self._lock:
            if job.has_begun is None and self._queue.withdraw(job) and job.number:  # else others share its ticket
                self._queue.cancelled += 1
            self._note_depth()
            self._work_came.notify()
            self._work_done.notify_all()

    def _drop(self, job: Job, policy: str, why: str) -> None:
        job.fulfil(DroppedError(f"the job of tenant {job.tenant!r} was dropped {why}"))
        if self._metrics is not None:
            self._metrics.dropped(job.tenant, policy)

    # ------------------------------------------------------------------ the workers

    def _start_workers(self) -> None:
        for place in range(len(self._threads), self.workers):
            thread = threading.Thread(target=self._work, name=f"cylora-online-{place}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _work(self) -> None:
        give_way(self._nice, self._cpus)
        while self._do_some():
            pass

    def _do_some(self) -> bool:
        """Wait for jobs and do some; return False when it is time to stop."""
        batch = self._next_batch()
        if not batch:
            return False
        counts = self._stepper.carry_out(batch)
        with self._lock:
            self._queue.finish(batch)
            self._counts.update(counts)
            self._work_came.notify_all()
            self._work_done.notify_all()
        return True

    def _next_batch(self) -> list[Job]:
        """Wait for jobs and return some; none when it is time to stop."""
        with self._lock:
            while threading.current_thread() in self._threads:  # else a callback has forked, and this is the child
                batch = self._queue.take(self.batch_size, self.workers)
                if batch:
                    self._note_depth()
                    return batch
                self._work_done.notify_all()  # jobs that were cancelled may have been the last
                if self._is_stopping:
                    return []
                self._note_depth()
                self._work_came.wait()
        return []

    def _note_depth(self) -> None:
        """Under the lock: depths told outside it could come in another order than they were true."""
        if self._metrics is not None:
            self._metrics.queue_depth(len(self._queue))

    # ------------------------------------------------------------------ waiting and ending

    def flush(self, timeout: float | None = None) -> None:
        """Wait until all that was submitted so far is done, or has failed or been dropped.

        Raises
        ------
        DeadlineError   If that takes more than ``timeout`` seconds. Everything goes on.
        StateError      In a callback of a worker, which would wait for itself.
        """
        self._refuse_in_worker("flush")
        timeout = _checked_timeout(timeout)
        with self._lock:
            number = self._queue.last_number
            if not self._work_done.wait_for(lambda: self._queue.is_done_up_to(number), timeout):
                raise self._too_late("flush", timeout)

    def drain(self, timeout: float | None = None) -> None:
        """Accept nothing any more, and wait as `flush` does. Whoever waits for room gets a StateError."""
        self._refuse_in_worker("drain")
        timeout = _checked_timeout(timeout)
        with self._lock:
            self._is_closed = True
            self._queue.refuse_blocked(_closed())
        self.flush(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Accept nothing any more, finish what was submitted, and end the workers.

        After ``timeout`` seconds, what has not begun is dropped: its tickets get a DroppedError. A step that is under
        way then is done all the same, and its ticket fulfilled. Once more does nothing.

        Raises
        ------
        StateError   In a callback of a worker, which would wait for itself.
        """
        self._refuse_in_worker("close")
        timeout = _checked_timeout(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        with contextlib.suppress(DeadlineError):
            self.drain(timeout)
        self._stop(deadline)

    def _stop(self, deadline: float | None) -> None:
        """Drop what waits, and end the workers as far as they end in time."""
        with self._lock:
            self._is_closed = self._is_stopping = True
            self._queue.refuse_blocked(_closed())
            left, threads = self._queue.clear(), list(self._threads)
            self._note_depth()
            self._counts["dropped"] += len(left)
            self._work_came.notify_all()
            self._work_done.notify_all()
        for job in left:
            self._drop(job, "close", "because its trainer was closed before its turn")
        for thread in threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def counters(self) -> dict[str, int]:
        """Return how many jobs came to what.

        ``submitted`` is the sum of ``done``, ``failed``, ``dropped`` (for a newer one, or by `close`), ``cancelled``,
        ``merged`` (into another), ``waiting`` and ``running``. ``blocked`` are submissions that had to wait for room,
        ``expired`` those of them that found none in time, ``callback_errors`` the times that ``on_result`` raised. A
        job that was cancelled counts as waiting until its turn.
        """
        names = ("done", "failed", "dropped", "merged", "blocked", "expired", "callback_errors")
        with self._lock:
            return {
                "submitted": self._queue.last_number + self._counts["merged"],
                **{name: self._counts[name] for name in names},
                "cancelled": self._queue.cancelled,
                "waiting": len(self._queue),
                "running": len(self._queue.running),
            }

    def _refuse_in_worker(self, what: str) -> None:
        if threading.current_thread() in self._threads:
            raise StateError(f"{what} must be called from outside, got a call from a worker's callback")

    def _too_late(self, what: str, timeout: float | None) -> DeadlineError:
        left = f"{len(self._queue)} jobs that wait and {len(self._queue.running)} under way"
        return DeadlineError(f"{what} must be over within {timeout} seconds, got {left}")


def _closed() -> StateError:
    return StateError("a job must be submitted to an open OnlineTrainer, got one that is closed")


def _n_bytes(gradient: Any) -> int:
    """Return how much memory a gradient takes, as far as that is easily found out."""
    return int(getattr(getattr(gradient, "vector", gradient), "nbytes", 0))


def _checked_timeout(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    rule = "a number of seconds >= 0, or None"
    return checks.real("timeout", timeout, rule, lambda x: 0 <= x <= threading.TIMEOUT_MAX, InputError)


_living: "weakref.WeakSet[OnlineTrainer]" = weakref.WeakSet()


def _stop_all() -> None:
    for online in list(_living):
        online._stop(time.monotonic() + EXIT_SECONDS)


def _begin_all_anew() -> None:
    for online in list(_living):
        online._begin_anew()


atexit.register(_stop_all)
os.register_at_fork(after_in_child=_begin_all_anew)
