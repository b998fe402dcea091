"""JobQueue: jobs that wait, bounded in number and bytes; each tenant's in their order, the tenants by turns.

Whoever calls it holds the lock of the OnlineTrainer it belongs to. It runs nobody else's code.
"""

from collections import OrderedDict, deque
from concurrent.futures import Future
from math import ceil

from cylora.serving.jobs import Job

__all__ = ["JobQueue"]

# A batch takes no more gradients than this (or one job, however large): about a millisecond of work.
BATCH_BYTES = 4 * 2**20


class _Line:
    """One tenant's jobs that wait; whether one is being done; how many threads are adding to one."""

    __slots__ = ("adders", "is_running", "jobs")

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.is_running = False
        self.adders = 0


class JobQueue:
    """Jobs between their submission and their end.

    Parameters
    ----------
    max_jobs, max_bytes : int >= 1
        Most jobs, and bytes of their gradients, that wait. Those being done do not count.
    """

    def __init__(self, max_jobs: int, max_bytes: int) -> None:
        self.max_jobs, self.max_bytes = max_jobs, max_bytes
        self.n_bytes = 0
        self.last_number = 0
        self.cancelled = 0  # by whoever holds their tickets, noticed so far
        self.running: set[Job] = set()
        self._waiting: OrderedDict[Job, None] = OrderedDict()  # oldest first; a dict's first key is found slowly
        self._lines: dict[str, _Line] = {}
        self._ready: OrderedDict[str, _Line] = OrderedDict()  # those that may have a turn, in the order of their turns
        self._blocked: OrderedDict[Job, Future[None]] = OrderedDict()  # outside, until there is room

    def __len__(self) -> int:
        return len(self._waiting)

    # ------------------------------------------------------------------ coming in

    def offer(self, job: Job) -> bool:
        """Take the job if there is room and nobody waits for it; return whether that was so."""
        if self._blocked or not self._has_room_for(job):
            return False
        self._push(job)
        return True

    def displace(self, job: Job) -> list[Job]:
        """Take the job in place of the oldest: its own tenant's first, then anybody's. Return those that had to go."""
        dropped = []
        while not self._has_room_for(job):
            line = self._lines.get(job.tenant)
            oldest = line.jobs[0] if line is not None and line.jobs else next(iter(self._waiting))
            self.withdraw(oldest)
            if self._is_wanted(oldest):
                dropped.append(oldest)
        self._push(job)
        return dropped

    def partner_of(self, job: Job) -> Job | None:
        """Return its tenant's newest waiting job if this one can be added; that has no turn until `give_back`."""
        line = self._lines.get(job.tenant)
        if any(blocked.tenant == job.tenant for blocked in self._blocked):
            return None  # that one was submitted before
        while line is not None and line.jobs and line.jobs[-1].takes(job):
            partner = line.jobs[-1]
            if self._is_wanted(partner):
                line.adders += 1
                return partner
            self.withdraw(partner)
        return None

    def give_back(self, job: Job) -> None:
        """Let a job that another was added to have its turn."""
        line = self._lines[job.tenant]
        line.adders -= 1
        self._settle(job.tenant, line)

    def wait_for_room(self, job: Job) -> Future[None]:
        """Return a future that is fulfilled when the job has been taken; first come, first served."""
        admitted: Future[None] = Future()
        self._blocked[job] = admitted
        return admitted

    def withdraw(self, job: Job) -> bool:
        """Remove a job that waits, here or for room; return whether it did."""
        if job in self._waiting:
            line = self._lines[job.tenant]
            line.jobs.remove(job)
            self._left(job)
            self._settle(job.tenant, line)
        elif self._blocked.pop(job, None) is None:
            return False
        self._admit()
        return True

    # ------------------------------------------------------------------ going out

    def take(self, most: int, workers: int) -> list[Job]:
        """Return the next jobs, at most ``most`` and of as many tenants, and a worker's share of what could be done."""
        batch: list[Job] = []
        n_bytes, most = 0, min(most, ceil(len(self._ready) / workers))
        while len(batch) < most and (line := self._next_line()) is not None:
            job = line.jobs[0]
            if batch and n_bytes + job.n_bytes > BATCH_BYTES:
                break
            line.jobs.popleft()
            self._left(job)
            if self._is_wanted(job):
                line.is_running = True
                self.running.add(job)
                batch.append(job)
                n_bytes += job.n_bytes
            self._settle(job.tenant, line)
        self._admit()
        return batch

    def finish(self, jobs: list[Job]) -> None:
        """Note that these are done; their tenants' next ones may have a turn."""
        for job in jobs:
            self.running.discard(job)
            if (line := self._lines.get(job.tenant)) is not None:
                line.is_running = False
                self._settle(job.tenant, line)

    def clear(self) -> list[Job]:
        """Remove all jobs that wait, and return those that were not cancelled."""
        jobs = list(self._waiting)
        for job in jobs:
            self.withdraw(job)
        return [job for job in jobs if self._is_wanted(job)]

    def refuse_blocked(self, error: Exception) -> None:
        """Tell all who wait for room that there will be none."""
        while self._blocked:
            _, admitted = self._blocked.popitem(last=False)
            if admitted.set_running_or_notify_cancel():
                admitted.set_exception(error)

    def is_done_up_to(self, number: int) -> bool:
        """Return whether no job up to this number waits or is being done."""
        waiting = next(iter(self._waiting)).number if self._waiting else number + 1
        return min(waiting, *(job.number for job in self.running), number + 1) > number

    # ------------------------------------------------------------------ inside

    def _next_line(self) -> _Line | None:
        for line in self._ready.values():
            if not line.adders:
                return line
        return None

    def _has_room_for(self, job: Job) -> bool:
        return len(self._waiting) < self.max_jobs and self.n_bytes + job.n_bytes <= self.max_bytes

    def _is_wanted(self, job: Job) -> bool:
        if job.begin():
            return True
        self.cancelled += 1
        return False

    def _push(self, job: Job) -> None:
        self.last_number += 1
        job.number = self.last_number
        line = self._lines.setdefault(job.tenant, _Line())
        line.jobs.append(job)
        self._waiting[job] = None
        self.n_bytes += job.n_bytes
        self._settle(job.tenant, line)

    def _left(self, job: Job) -> None:
        del self._waiting[job]
        self.n_bytes -= job.n_bytes

    def _settle(self, tenant: str, line: _Line) -> None:
        """Put a tenant where it belongs now: among those that may have a turn, aside, or out of here."""
        if line.jobs and not line.is_running:
            self._ready.setdefault(tenant, line)
            return
        self._ready.pop(tenant, None)
        if not (line.jobs or line.is_running or line.adders):
            del self._lines[tenant]

    def _admit(self) -> None:
        """Take those who wait for room, as far as it goes."""
        while self._blocked:
            job, admitted = next(iter(self._blocked.items()))
            if not self._has_room_for(job):
                return
            del self._blocked[job]
            if admitted.set_running_or_notify_cancel():
                self._push(job)
                admitted.set_result(None)
