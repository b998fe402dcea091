"""AdapterStore: thousands of tenants' adapters and trainers within a memory budget, the rest of them on disk."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, Self

from cylora import checks
from cylora.adapter import AdapterSet, LoraAdapter
from cylora.config import LoraTrainingConfig, thread_count
from cylora.errors import ConfigError, CyloraError, InputError, PublishError, StateError, StoreError
from cylora.formats.weights import check_finite
from cylora.history import TrainingStep
from cylora.many import step_many
from cylora.optimizer import Round
from cylora.serving.publisher import AdapterPublisher, checked_norm_ratio
from cylora.serving.residency import NotNowError, Residency, StoreMetrics
from cylora.serving.snapshot import AdapterSnapshot
from cylora.serving.tenant import Tenant, check_gradients, published_bytes
from cylora.serving.tenant_files import TenantFolder
from cylora.serving.tenant_names import checked_name
from cylora.trainer import LoraTrainer

__all__ = ["AdapterStore"]

HISTORY_LIMIT = 100
IN_USE = "another thread is using it, and this one, which is using a tenant itself, must not wait for that"

Adapters = LoraAdapter | AdapterSet
ConfigFor = Callable[[str], LoraTrainingConfig]
Outcomes = list[Any]  # for each job None, then a TrainingStep or an Exception


class AdapterStore:
    """Train many tenants, each with adapters, moments, schedule, counters and history of its own.

    Tenants stay in memory as far as ``memory_budget`` goes. Those used least recently are written to disk, one file for
    each, synced, and come back when they are wanted: to the same bits, with their pending micro-batches, averages and
    guards. One tenant's error, non-finite gradient or damaged file touches no other.

    Parameters
    ----------
    new_adapters : callable
        Tenant -> LoraAdapter or AdapterSet to begin with, finite. The store takes a copy, so it may be one for all.
    config : LoraTrainingConfig, optional
        Of new tenants; by default that of `LoraTrainingConfig` with ``log_every=0``. A ``history_limit`` of None is 100
        here: memory stays flat. A tenant that comes from disk keeps the config it was saved with. Only where its
        ``schedule`` was a function, which no file holds, that is taken from here.
    folder : path
        Of this store alone; made if it is not there. Tenants that an earlier store left in it are there again.
    memory_budget : int, bytes
        For the tenants in memory. Counted are, for each: parameters, moments, average, state to go back to, waiting
        micro-batches, the full history that its limit allows, and 12 KiB of objects (1 KiB more for each matrix beyond
        the second); and snapshots for serving. Not counted: some 500 bytes of index for each tenant, on disk or not,
        the caller's gradients, one tenant that ``new_adapters`` or a file being read has just made, and what readers
        keep of snapshots that were replaced.
    config_for : callable, optional
        Tenant -> LoraTrainingConfig, instead of ``config``.
    threads : int in 1..64, optional
        As for `cylora.step_many`.
    max_norm_ratio : float >= 1, optional
        As for `AdapterPublisher`: `publish` refuses a snapshot whose norm is more than this times the one before.
    metrics : optional
        Told of the bytes and tenants in memory, of each that leaves or comes back, and of published versions.

    Raises
    ------
    ConfigError, InputError   If a parameter breaks its rule.
    StateError                If another store has the folder open.
    OSError                   If the folder cannot be made or read.

    Notes
    -----
    Any number of threads may call. A tenant is one thread's at a time, others wait for it; different tenants run in
    parallel, also while a third is read or written. Names are any Unicode text that takes at most 200 bytes as a file's
    name (`a-z 0-9 . _ @ + -` one byte each, other characters three for each byte of their UTF-8 form).

    Room is made before it is needed. If a tenant cannot be written (a full disk), it stays in memory, one that needs no
    writing leaves instead, and if there is none the call that needed the room gets a StoreError: nothing that a step
    has returned is lost. A tenant whose file is damaged gets a FormatError that names the file, each time, and the file
    stays as it is: repair it, or `remove` the tenant and create it again.

    A store belongs to the process that opened it. In a forked child `latest` works, `close` does nothing, and all else
    is a StateError: what a child learned could not be kept.
    """

    def __init__(
        self,
        new_adapters: Callable[[str], Adapters],
        config: LoraTrainingConfig | None = None,
        *,
        folder: str | os.PathLike[str],
        memory_budget: int,
        config_for: ConfigFor | None = None,
        threads: int | None = None,
        max_norm_ratio: float | None = None,
        metrics: StoreMetrics | None = None,
    ) -> None:
        for name, function in (("new_adapters", new_adapters), ("config_for (if not None)", config_for)):
            if not callable(function) and (function is not None or name == "new_adapters"):
                raise ConfigError(f"{name} must be callable, got {type(function).__name__}")
        default = _bounded(LoraTrainingConfig(log_every=0) if config is None else config)
        # Not a method: a store in a cycle would keep its memory and its folder when nobody has it any more.
        self._config_of = partial(_config_of, default, config_for)
        self._new_adapters, self._metrics = new_adapters, metrics
        self._threads = thread_count(threads)
        self._max_norm_ratio = checked_norm_ratio(max_norm_ratio)
        budget = checks.integer("memory_budget", memory_budget, 1)
        self._folder = TenantFolder(folder)
        self._memory = Residency(self._folder, budget, self._config_of, metrics)

    # ------------------------------------------------------------------ who is there

    def create(self, tenant: str) -> None:
        """Begin a new tenant. It is on disk from its first eviction, `flush` or `close` on.

        Raises
        ------
        InputError
            If there is one of this name (also one whose file is damaged), the name breaks its rule, or the new adapters
            are none, or not finite.
        StoreError
            If there is no room. No tenant was created.
        """
        name, held = checked_name(tenant), list[Tenant]()
        try:
            entry = self._memory.begin(name, held)
            given = self._new_adapters(tenant)
            if not isinstance(given, Adapters):
                got = f"{type(given).__name__} for {tenant!r:.80}"
                raise InputError(f"new_adapters must return a LoraAdapter or an AdapterSet, got {got}")
            check_finite(given)
            trainer = LoraTrainer(self._config_of(tenant))
            self._memory.settle(entry, trainer, given.with_parameters(given.flat.vector))
        except BaseException:
            if held:
                self._memory.forget(held[0])
            raise
        finally:
            self._memory.release(held)

    def remove(self, tenant: str) -> None:
        """Forget a tenant, in memory and on disk; waits for who is using it. Its name is free again.

        Raises
        ------
        InputError   If there is no such tenant.
        StateError   If this thread is using it.
        OSError      If its file cannot be removed. The tenant is as before.
        """
        held: list[Tenant] = []
        try:
            entry = self._memory.own(tenant, held)
            if entry.depth > 1:
                raise StateError(f"a tenant must not be in use to be removed, got {tenant!r:.80}, used by this thread")
            entry.is_dirty = True  # should the sync fail after the file is gone
            self._folder.remove(tenant)
            self._memory.forget(entry)
        finally:
            self._memory.release(held)

    def __contains__(self, tenant: object) -> bool:
        return isinstance(tenant, str) and tenant in self._memory.tenants

    def __len__(self) -> int:
        return len(self._memory.tenants)

    def tenants(self) -> list[str]:
        """Return the names of all tenants, in memory or on disk, sorted."""
        return sorted(list(self._memory.tenants))  # noqa: C414 - another thread may create one: list() is one step

    # ------------------------------------------------------------------ training

    def step(self, tenant: str, loss: float, grad_a: Any, grad_b: Any = None) -> TrainingStep:
        """Do one step of a tenant and return its record; ``loss`` and gradients as for `LoraTrainer.step`.

        Raises
        ------
        InputError, NonFiniteGradientError, DivergenceError, StateError
            As for `LoraTrainer.step`; InputError also if there is no such tenant.
        FormatError, OSError
            If the tenant is on disk and cannot be read.
        StoreError
            If there is no room for it. In each case nothing was written.
        """
        with self._acquired(tenant) as (entry, trainer, adapters):
            entry.is_dirty = True  # before: what a report raises, or an interrupt, comes after the step
            record = trainer.step(loss, adapters, grad_a, grad_b)
        return record

    def step_many(self, jobs: Iterable[tuple[Any, ...]]) -> list[TrainingStep | Exception]:
        """Do one step for each job and return, in their order, what each came to: a record, or its exception.

        Parameters
        ----------
        jobs : iterable of (tenant, loss, grad_a, grad_b) or (tenant, loss, gradients)
            As for `step`. Of one tenant's jobs the first is done first. Tenants that are on disk are loaded, as many at
            a time as there is room for, and the steps of those together are one `cylora.step_many`.

        Raises
        ------
        InputError   If ``jobs`` cannot be iterated.
        StateError   If the store is closed, or a parent's.
        """
        self._memory.require_open()
        try:
            given = list(jobs)
        except TypeError:
            raise InputError(f"jobs must be an iterable of tuples, got {type(jobs).__name__}") from None
        results: Outcomes = [None] * len(given)
        places = list(range(len(given)))
        while places:
            places = self._round(given, places, results)
        return results

    def _round(self, jobs: list[Any], places: list[int], results: Outcomes) -> list[int]:
        """Do the first of each tenant's jobs; return the places of the others."""
        current = Round(jobs, places)
        while not current.is_over:
            current.begin()
            try:
                self._gather(current, jobs, results)
                self._step_held(current, jobs, results)
            finally:
                self._memory.release(current.held)
        return current.later

    def _gather(self, current: Round, jobs: list[Any], results: Outcomes) -> None:
        """Acquire the tenants of the first so many jobs that can be held together."""
        while not current.is_over:
            self._memory.take_resident(current)
            if current.is_over:
                return
            place, held = current.place, current.held
            try:
                job = jobs[place] = _checked_job(jobs[place])
                entry = self._memory.find(job[0])
                if current.has_come(entry):
                    current.postpone(entry)
                    continue
                self._memory.acquire(entry.name, held, waits=not held)
                current.added()
            except NotNowError:
                return
            except Exception as error:
                results[place] = error
                current.skip()

    def _step_held(self, current: Round, jobs: list[Any], results: Outcomes) -> None:
        """Step what is held: first what needs no Python, then the others."""
        others = current.step(results, self._threads)
        batch = []
        for index in others:
            tenant, (_, loss, *gradients) = current.held[index], jobs[current.mine[index]]
            batch.append((tenant.trainer, loss, tenant.adapters, *gradients))
        for index, outcome in zip(others, step_many(batch, threads=self._threads), strict=True):
            results[current.mine[index]] = outcome
            tenant = current.held[index]
            tenant.adam = tenant.trainer.bound_optimizer()

    def check(self, tenant: str, loss: float, grad_a: Any, grad_b: Any = None) -> None:
        """Raise what `step` would for an unknown tenant, a loss that is no number, or a wrong shape or type.

        Numbers are not looked at, nothing is written and no step is waited for. Only a tenant that this store has not
        had in memory yet is loaded.
        """
        check_gradients(self._layout(tenant), loss, grad_a, grad_b)

    @contextlib.contextmanager
    def use(self, tenant: str) -> Iterator[tuple[LoraTrainer, Adapters]]:
        """Give a tenant's (trainer, adapters), in memory and this thread's alone inside the ``with``.

        There, whatever a trainer can do may be done; the thread may also step the tenant through the store. Afterwards
        neither of the two may be kept: what is done to them may be lost. A thread that uses several tenants at once
        should take them in one order, as with locks; for `flush` inside it see there. Errors as for `step`.
        """
        with self._acquired(tenant) as (entry, trainer, adapters):
            was_pinned = entry.is_pinned
            self._memory.pin(entry, is_pinned=True)
            try:
                yield trainer, adapters
            finally:
                entry.is_dirty = True
                self._memory.recount(entry, trainer, adapters)
                self._memory.pin(entry, is_pinned=was_pinned)

    # ------------------------------------------------------------------ serving

    def publish(self, tenant: str) -> AdapterSnapshot:
        """Copy a tenant's parameters between two of its steps, for `latest`, and return the copy.

        Versions of a tenant rise by one, also from disk on, if it was written since.

        Raises
        ------
        PublishError
            If a parameter is not finite, or the norm jumped beyond ``max_norm_ratio``. The version before stays.
        InputError, FormatError, OSError, StoreError
            As for `step`.
        """
        n_bytes, room = published_bytes(self._layout(tenant)), [0]
        try:
            self._memory.reserve_quietly(n_bytes, room)
            with self._acquired(tenant) as (entry, trainer, adapters):
                publisher = AdapterPublisher(adapters, trainer, keep=1, max_norm_ratio=self._max_norm_ratio)
                publisher.latest = entry.snapshot  # what the norm is compared with
                snapshot = replace(publisher.publish(), version=entry.version + 1)
                with self._memory.lock:
                    self._memory.put_snapshot(entry, snapshot, room)
        except BaseException as error:
            self._memory.give_back(room)
            if isinstance(error, PublishError) and self._metrics is not None:
                self._metrics.refused(tenant)
            raise
        if self._metrics is not None:
            self._metrics.published(tenant, snapshot.version)
        return snapshot

    def latest(self, tenant: str) -> AdapterSnapshot | None:
        """Return the version to serve, or None; takes no lock, waits for nobody and reads no file.

        None before the first `publish`, also after a restart, and once the snapshot had to go: those of tenants that
        are on disk stay in memory only as long as they take at most a quarter of the budget, the oldest goes first.
        Then `publish` makes one again.

        Raises
        ------
        InputError   If there is no such tenant.
        StateError   If the store is closed.
        """
        if self._memory.is_closed:
            raise StateError("this store is closed")
        return self._memory.find(tenant).snapshot

    # ------------------------------------------------------------------ to disk

    def flush(self) -> None:
        """Write every tenant whose file is not up to date; those that are being used are waited for.

        Called inside `use`, it writes that tenant too, as it is now, and waits for those that others step, but not for
        those that other threads have by `use`: they might be waiting for this one's. These count as not written.

        Raises
        ------
        StoreError
            If some could not be written. All others are, and those stay in memory.
        """
        memory, me = self._memory, threading.get_ident()
        memory.require_open()
        with memory.lock:
            names = [one.name for one in memory.resident.values() if one.is_dirty or one.owner]
            mine = [one.is_pinned for one in memory.tenants.values() if one.owner == me]
        failures: list[tuple[str, Exception]] = []
        for name in names:
            held: list[Tenant] = []
            try:
                self._own_to_write(name, held, mine)
                memory.save(held[0])
            except NotNowError:
                failures.append((name, StateError(IN_USE)))
            except (OSError, CyloraError) as error:
                if held:
                    failures.append((name, error))
                elif not isinstance(error, InputError):  # else it was removed meanwhile
                    raise
            finally:
                memory.release(held)
        if failures:
            name, first = failures[0]
            count = f"{len(failures)} of {len(names)} tenants could not be written and stay in memory"
            raise StoreError(f"{count}, the first {name!r:.80}: {first}") from first

    def _own_to_write(self, name: str, held: list[Tenant], mine: list[bool]) -> None:
        """Own a tenant, after waiting for whoever can be waited for with tenants in hand that are ``mine``, or raise.

        They are given as whether each is in `use`. One that is not is in a step, which called this by its schedule or
        the like: others in `flush` may wait for the end of that, so then nobody is waited for.
        """
        memory = self._memory
        while not held:
            try:
                memory.own(name, held, waits=not mine)
            except NotNowError:
                with memory.lock:
                    tenant = memory.find(name)
                    if tenant.owner:
                        if tenant.is_pinned or not all(mine):
                            raise
                        memory.changed.wait()

    def close(self) -> None:
        """Wait for steps under way, write what is to be written, and let go of everything. Closing twice is fine.

        Raises
        ------
        StoreError   If some tenants could not be written, as for `flush`. The store is open as before.
        StateError   If another thread is closing it and waits for a tenant that this one has in `use`.
        """
        if self._memory.begin_closing():
            is_closed = False
            try:
                self.flush()
                is_closed = True
            finally:
                self._memory.end_closing(is_closed=is_closed)
            self._folder.close()

    def __enter__(self) -> Self:
        self._memory.require_open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------------ figures

    @property
    def resident_bytes(self) -> int:
        """What memory holds, counted as for ``memory_budget``."""
        return self._memory.bytes

    def counters(self) -> dict[str, int]:
        """Return tenants, those of them ``resident``, and how often one was spilled, restored, or not to be written."""
        memory = self._memory
        return {"tenants": len(memory.tenants), "resident": len(memory.resident), **memory.counts}

    # ------------------------------------------------------------------ parts

    @contextlib.contextmanager
    def _acquired(self, tenant: str) -> Iterator[tuple[Tenant, LoraTrainer, Adapters]]:
        held: list[Tenant] = []
        try:
            entry = self._memory.acquire(tenant, held)
            yield entry, entry.trainer, entry.adapters  # type: ignore[misc]
        finally:
            self._memory.release(held)

    def _layout(self, tenant: str) -> Any:
        self._memory.require_open()
        layout = self._memory.find(tenant).layout
        if layout is None:
            with self._acquired(tenant) as (entry, _, _):
                layout = entry.layout
        return layout

    def __reduce__(self) -> NoReturn:
        raise TypeError("an AdapterStore is not copied or pickled: its folder is open once")


def _config_of(default: LoraTrainingConfig, config_for: ConfigFor | None, tenant: str) -> LoraTrainingConfig:
    return default if config_for is None else _bounded(config_for(tenant))


def _bounded(config: Any) -> LoraTrainingConfig:
    if not isinstance(config, LoraTrainingConfig):
        raise ConfigError(f"config must be a LoraTrainingConfig, got {type(config).__name__}")
    return replace(config, history_limit=HISTORY_LIMIT) if config.history_limit is None else config


def _checked_job(job: Any) -> tuple[Any, ...]:
    """Return a job as a plain tuple, or raise InputError if it has not the form of one."""
    if isinstance(job, tuple):
        job = tuple(job)  # what a subclass says of its length need not be so
    if not isinstance(job, tuple) or not 3 <= len(job) <= 4:
        got = f"a tuple of {len(job)}" if isinstance(job, tuple) else type(job).__name__
    elif not isinstance(job[0], str):
        got = f"a tenant of type {type(job[0]).__name__}"
    else:
        return job
    raise InputError(f"a job must be (tenant, loss, grad_a, grad_b) or (tenant, loss, gradients), got {got}")
