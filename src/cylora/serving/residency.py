"""Residency: which of a store's tenants are in memory, who owns each, and how room is made within the budget.

(a) One lock guards the index: who is in memory, who owns whom, the bytes. It is never held while files are read or
    written, or steps are done. Meanwhile the tenant has an owner, a thread, and everybody else who wants it waits.
(b) Bytes are reserved before anything is read or made, and given back after it is gone. What leaves memory is on disk
    first, synced.
(c) An interrupt may come at any call, so what belongs together is one statement: a tenant's owner and depth, bytes and
    the room they take. ``room`` is what a call has reserved and not yet used; ``held`` is who is to be released. The
    lock is taken by itself, since entering a Condition is Python code.
(d) Nobody waits with tenants in hand that others may wait for, but for what a caller holds by `AdapterStore.use`: so
    nobody waits for ever.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from cylora.adapter import AdapterSet, LoraAdapter
from cylora.config import LoraTrainingConfig
from cylora.errors import CyloraError, InputError, StateError, StoreError
from cylora.optimizer import Round, release
from cylora.serving.snapshot import AdapterSnapshot
from cylora.serving.tenant import OBJECT_BYTES, Tenant, share_configs, snapshot_bytes, tenant_bytes
from cylora.serving.tenant_files import TenantFolder
from cylora.trainer import LoraTrainer

__all__ = ["NotNowError", "Residency", "StoreMetrics"]

SPARED_SHARE = 4  # snapshots of tenants that are on disk take at most one part in so many of the budget


class StoreMetrics(Protocol):
    """Who is told of what a store does."""

    def resident(self, bytes_: int, tenants: int) -> object:
        """Note what memory holds."""
        ...

    def spilled(self) -> object:
        """Count a tenant that left memory."""
        ...

    def restored(self) -> object:
        """Count a tenant that came back."""
        ...

    def published(self, tenant: str, version: int) -> object:
        """Count a version."""
        ...

    def refused(self, tenant: str) -> object:
        """Count a snapshot that was refused."""
        ...


class NotNowError(Exception):
    """Somebody who must not wait would have to."""


class Residency:
    """The index of all tenants and the memory of those in it.

    Parameters
    ----------
    folder : TenantFolder
    budget : int, bytes
    config_of : callable
        Tenant -> its LoraTrainingConfig, were it a new one.
    metrics : StoreMetrics, optional
    """

    def __init__(
        self,
        folder: TenantFolder,
        budget: int,
        config_of: Callable[[str], LoraTrainingConfig],
        metrics: StoreMetrics | None,
    ) -> None:
        self.budget, self._folder, self._config_of, self._metrics = budget, folder, config_of, metrics
        self._process = os.getpid()
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        # Let others have what this thread has acquired. No method: it must not begin as a function of Python.
        self.release: Callable[[list[Tenant]], None] = partial(release, self.lock, self.changed.notify_all)
        self.tenants = {name: Tenant(name) for name in folder.tenants()}
        self.resident: dict[str, Tenant] = {}
        self._queue: list[Tenant] = []  # those of them that were used least recently, these last; see `_least_used`
        self._spared: OrderedDict[str, Tenant] = OrderedDict()  # on disk, with a snapshot in memory; the oldest first
        self._spared_bytes = 0
        self.bytes = 0
        self._arriving: set[int] = set()  # threads that have room for what they are bringing into memory
        self._closer: int | None = None  # the thread that is closing the store
        self.is_closed = False
        self.counts = dict.fromkeys(("spilled", "restored", "failed_writes"), 0)

    # ------------------------------------------------------------------ owning

    def require_open(self) -> None:
        """Raise StateError in a forked child, and once the store is closed."""
        if os.getpid() != self._process:
            raise StateError(
                "this store belongs to the process that opened it, and this one was forked from it: only latest() "
                "works here; open a store of its own, on another folder"
            )
        if self.is_closed or self._closer not in (None, threading.get_ident()):
            raise StateError("this store is closed")

    def find(self, name: Any) -> Tenant:
        """Return a tenant, or raise InputError."""
        tenant = self.tenants.get(name) if isinstance(name, str) else None
        if tenant is None:
            raise InputError(f"tenant must be one that was created, got {name!r:.80}")
        return tenant

    def own(self, name: Any, held: list[Tenant], *, waits: bool = True) -> Tenant:
        """Return a tenant that this thread owns from now on, until `release`. It may be on disk only."""
        self.require_open()
        me = threading.get_ident()
        with self.lock:
            while True:
                self.require_open()
                tenant = self.find(name)
                if tenant.owner in (0, me):
                    tenant.owner, tenant.depth = me, tenant.depth + 1
                    held.append(tenant)
                    return tenant
                if not waits:
                    raise NotNowError
                self.changed.wait()

    def acquire(self, name: Any, held: list[Tenant], *, waits: bool = True) -> Tenant:
        """Return a tenant that is in memory and this thread's, until `release`."""
        before = len(held)
        try:
            tenant = self.own(name, held, waits=waits)
            if tenant.trainer is None:
                self._bring_in(tenant, waits)
            else:
                tenant.touch()
        except BaseException:
            taken = held[before:]
            del held[before:]
            self.release(taken)
            raise
        return tenant

    def take_resident(self, jobs: Round) -> None:
        """Acquire the tenants of jobs, one after the other, up to the first that takes waiting or reading."""
        self.require_open()
        with self.lock:
            self.require_open()
            jobs.take(self.tenants)

    # ------------------------------------------------------------------ into memory

    def begin(self, name: str, held: list[Tenant]) -> Tenant:
        """Return a new tenant that this thread owns and that is nowhere yet; InputError if there is one of the name."""
        self.require_open()
        me = threading.get_ident()
        is_left = self._folder.file(name).exists()  # put there by somebody else: not ours to replace
        with self.lock:
            self.require_open()
            if name in self.tenants or is_left:
                raise InputError(f"tenant must be new to be created, got {name!r:.80}")
            tenant = self.tenants[name] = Tenant(name)
            tenant.owner, tenant.depth = me, 1
            held.append(tenant)
        return tenant

    def settle(self, tenant: Tenant, trainer: LoraTrainer, adapters: LoraAdapter | AdapterSet) -> None:
        """Take a new tenant into memory, after making room."""
        room = [0]
        try:
            self.reserve(tenant_bytes(trainer, adapters), room)
            with self.lock:
                tenant.is_dirty = True
                self._install(tenant, trainer, adapters, room)
        finally:
            self.give_back(room)

    def forget(self, tenant: Tenant) -> None:
        """Leave nothing of a tenant in memory."""
        with self.lock:
            if tenant.trainer is not None:
                self._take_out(tenant)
            self.put_snapshot(tenant, None)
            del self.tenants[tenant.name]

    def _bring_in(self, tenant: Tenant, waits: bool) -> None:
        while True:
            expected, room = tenant.n_bytes or self._estimate(tenant), [0]
            try:
                self.reserve(expected, room, waits=waits)
                config = self._config_of(tenant.name)
                if tenant.trainer is not None:  # that has stepped it, and with that brought it in
                    return
                is_lost = callable(config.schedule) and self._folder.lacks_schedule(tenant.name)
                changes = {"schedule": config.schedule} if is_lost else {}
                checkpoint = self._folder.load(tenant.name, **changes)
                share_configs(config, checkpoint.trainer, checkpoint.adapters)
                tenant.n_bytes = tenant_bytes(checkpoint.trainer, checkpoint.adapters)
                if tenant.n_bytes <= expected:
                    with self.lock:
                        tenant.version = max(tenant.version, checkpoint.extra["version"])
                        self._install(tenant, checkpoint.trainer, checkpoint.adapters, room)
                        self.counts["restored"] += 1
                        if self._metrics is not None:
                            self._metrics.restored()
                    return
                del checkpoint  # the file was smaller than what comes of it: once more, with room for that
            finally:
                self.give_back(room)

    def _estimate(self, tenant: Tenant) -> int:
        return min(self._folder.file(tenant.name).stat().st_size + OBJECT_BYTES, self.budget)

    def _install(
        self, tenant: Tenant, trainer: LoraTrainer, adapters: LoraAdapter | AdapterSet, room: list[int]
    ) -> None:
        n_bytes = tenant_bytes(trainer, adapters)
        total = self.bytes + n_bytes - room[0]
        tenant.touch()
        tenant.adam = None
        tenant.trainer, tenant.adapters, tenant.layout = trainer, adapters, adapters.flat.layout
        tenant.n_bytes, self.bytes, room[0], self.resident[tenant.name] = n_bytes, total, 0, tenant
        self._arriving.discard(threading.get_ident())
        if self._spared.pop(tenant.name, None) is not None:
            self._spared_bytes -= snapshot_bytes(tenant.snapshot)
        self._note()

    # ------------------------------------------------------------------ out of memory

    def save(self, tenant: Tenant) -> None:
        """Write an owned tenant, if memory has what its file has not."""
        if (tenant.is_dirty or tenant.is_pinned) and tenant.trainer is not None and tenant.adapters is not None:
            try:
                self._folder.save(tenant.name, tenant.trainer, tenant.adapters, {"version": tenant.version})
            except BaseException:
                self.counts["failed_writes"] += 1
                raise
            tenant.is_dirty = False

    def reserve(self, n_bytes: int, room: list[int], *, waits: bool = True) -> None:
        """Make room, if need be by writing the least recently used tenants to disk, and count it as taken, in ``room``.

        Raises
        ------
        StoreError    If there is none to be made. Whoever could not be written is still in memory.
        NotNowError   If others must be waited for, and ``waits`` is False.
        """
        if n_bytes > self.budget:
            raise StoreError(f"memory_budget must be at least {n_bytes} for this tenant alone, got {self.budget}")
        stuck: dict[str, Exception] = {}
        while True:
            held: list[Tenant] = []
            try:
                with self.lock:
                    victim = self._victim(n_bytes, waits, stuck)
                    if victim is None:
                        self.bytes, room[0] = self.bytes + n_bytes, n_bytes
                        self._arriving.add(threading.get_ident())
                        return
                    me = threading.get_ident()
                    victim.owner, victim.depth = me, 1
                    held.append(victim)
                self._write_out(victim, stuck)
            finally:
                self.release(held)

    def _write_out(self, tenant: Tenant, stuck: dict[str, Exception]) -> None:
        try:
            self.save(tenant)
            with self.lock:
                self._spill(tenant)
        except (OSError, CyloraError) as error:
            stuck[tenant.name] = error

    def give_back(self, room: list[int]) -> None:
        """Count reserved bytes as free again."""
        with self.lock:
            self.bytes, room[0] = self.bytes - room[0], 0
            self._arriving.discard(threading.get_ident())
            self.changed.notify_all()

    def reserve_quietly(self, n_bytes: int, room: list[int]) -> None:
        """Do what `reserve` does for what is made later: nobody waits for it."""
        self.reserve(n_bytes, room)
        with self.lock:
            self._arriving.discard(threading.get_ident())
            self.changed.notify_all()

    def _victim(self, n_bytes: int, waits: bool, stuck: dict[str, Exception]) -> Tenant | None:
        """Return who is to leave memory next, or None if there is room."""
        # A disk that took one file no more takes no other either: then only those leave that need no writing.
        is_full = any(isinstance(error, OSError) for error in stuck.values())

        def may_leave(one: Tenant) -> bool:
            return not one.owner and one.name not in stuck and not (is_full and one.is_dirty)

        while self.bytes + n_bytes > self.budget:
            victim = self._least_used(may_leave)
            if victim is not None:
                return victim
            if self._spared:
                self._drop_oldest_snapshot()
            elif not waits:
                raise NotNowError
            elif self._others_at_work():
                self.changed.wait()
                self.require_open()
            else:
                free = self.budget - self.bytes
                missing = f"{n_bytes} bytes of memory_budget, {self.budget}, must be free, got {free}"
                if stuck:
                    name, error = next(iter(stuck.items()))
                    raise StoreError(f"{missing}, and tenant {name!r:.80} could not be written: {error}") from error
                raise StoreError(f"{missing}: all other tenants in memory are in use")
        return None

    def _least_used(self, may_leave: Callable[[Tenant], bool]) -> Tenant | None:
        """Return the tenant in memory that was used least recently of those that may leave it.

        A use only leaves its number behind. So they are sorted anew when those that are still where the last sorting
        put them are through: at most once for as many uses as there are tenants.
        """
        queue = self._queue
        while queue and not _is_queued(queue[-1]):
            queue.pop()
        for tenant in reversed(queue):
            if _is_queued(tenant) and may_leave(tenant):
                return tenant
        others = [one for one in self.resident.values() if not _is_queued(one)]
        others.sort(key=lambda one: one.used, reverse=True)
        self._queue = others + [one for one in queue if _is_queued(one)]
        for one in others:
            one.queued = one.used
        return next(filter(may_leave, reversed(others)), None)

    def _others_at_work(self) -> bool:
        me = threading.get_ident()
        return bool(self._arriving - {me}) or any(
            tenant.owner not in (0, me) and not tenant.is_pinned for tenant in self.resident.values()
        )

    def _spill(self, tenant: Tenant) -> None:
        self._take_out(tenant)
        self.counts["spilled"] += 1
        if self._metrics is not None:
            self._metrics.spilled()
        if tenant.snapshot is not None:
            self._spared[tenant.name] = tenant
            self._spared_bytes += snapshot_bytes(tenant.snapshot)
            while self._spared_bytes > self.budget // SPARED_SHARE:
                self._drop_oldest_snapshot()

    def _take_out(self, tenant: Tenant) -> None:
        del self.resident[tenant.name]
        tenant.trainer = tenant.adapters = tenant.adam = None
        self.bytes -= tenant.n_bytes
        self._note()

    def _drop_oldest_snapshot(self) -> None:
        self.put_snapshot(next(iter(self._spared.values())), None)

    # ------------------------------------------------------------------ what else takes memory

    def put_snapshot(self, tenant: Tenant, snapshot: AdapterSnapshot | None, room: list[int] | None = None) -> None:
        """Replace a tenant's snapshot by one for which room is reserved, or by none. Under the lock."""
        room, was = [0] if room is None else room, snapshot_bytes(tenant.snapshot)
        total, spared = self.bytes + snapshot_bytes(snapshot) - room[0] - was, self._spared_bytes
        if tenant.name in self._spared:
            spared -= was
        # Nothing interrupts these: CPython lets signals in at calls and backward jumps only.
        if snapshot is not None:
            tenant.version, tenant.is_dirty = snapshot.version, True
        tenant.snapshot, self.bytes, room[0], self._spared_bytes = snapshot, total, 0, spared
        self._spared.pop(tenant.name, None)
        self._note()

    def pin(self, tenant: Tenant, *, is_pinned: bool) -> None:
        """Say whether the owner may keep a tenant for as long as it likes: then nobody waits for its memory."""
        with self.lock:
            tenant.is_pinned = is_pinned
            self.changed.notify_all()

    def recount(self, tenant: Tenant, trainer: LoraTrainer, adapters: LoraAdapter | AdapterSet) -> None:
        """Count an owned tenant anew, after its owner did with it what it liked."""
        n_bytes = tenant_bytes(trainer, adapters)
        with self.lock:
            self.bytes += n_bytes - tenant.n_bytes
            tenant.n_bytes = n_bytes

    # ------------------------------------------------------------------ the end

    def begin_closing(self) -> bool:
        """Let no other thread begin anything and wait until all have ended; False if it is closed already.

        `end_closing` follows. In a forked child there is nothing to close.
        """
        if os.getpid() != self._process:
            return False
        me = threading.get_ident()
        with self.lock:
            while self._closer not in (None, me) and not self.is_closed:
                if any(tenant.owner == me for tenant in self.tenants.values()):
                    at_work = "this store is being closed by another thread, which waits for what this one has in use"
                    raise StateError(f"{at_work}: close it after `use`, not inside")
                self.changed.wait()
            if self.is_closed or self._closer == me:  # called by a signal handler in the middle of it
                return False
            self._closer = me
            self.changed.notify_all()
            try:
                while any(tenant.owner not in (0, me) for tenant in self.tenants.values()):
                    self.changed.wait()
            except BaseException:
                self._closer = None
                raise
        return True

    def end_closing(self, *, is_closed: bool) -> None:
        """Let go of everything, or where not all could be written be as open as before."""
        with self.lock:
            self._closer, self.is_closed = None, is_closed
            if is_closed:
                self.tenants, self.resident, self.bytes, self._queue = {}, {}, 0, []
                self._spared, self._spared_bytes = OrderedDict(), 0
            self.changed.notify_all()

    def _note(self) -> None:
        if self._metrics is not None:
            self._metrics.resident(self.bytes, len(self.resident))


def _is_queued(tenant: Tenant) -> bool:
    return tenant.queued == tenant.used and tenant.trainer is not None
