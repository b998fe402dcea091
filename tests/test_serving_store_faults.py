"""AdapterStore when the disk is full, a lock is held, a process ends or forks: nothing acknowledged is lost."""

import contextlib
import errno
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interrupts import interrupted
from stores import Twin, by_use, gradients, make_store, print_of, size_of
from test_fork import in_child
from test_serving_store_threads import in_thread, wait_for
from training import make_pair

from cylora import InputError, StateError, StoreError
from cylora.formats import durable, load_checkpoint
from cylora.serving import AdapterStore, ServingMetrics, tenant_files
from cylora.serving.tenant import snapshot_bytes
from cylora.serving.tenant_files import TenantFolder

FULL = Path(__file__).with_name("worker_store_full.py")
CALLS = ("open", "write", "fsync", "replace")


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, call: str, number: int = errno.ENOSPC) -> Iterator[None]:
    """Let a call of the system that writing needs fail."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        for name in CALLS[CALLS.index(call) :] if call == "write" else (call,):
            patch.setattr(durable.os, name, _only_writing(fail) if name == "open" else fail)
        yield


def _only_writing(fail: Callable[..., None]) -> Callable[..., Any]:
    real = os.open
    return lambda path, flags, *rest, **more: (fail if flags & os.O_CREAT else real)(path, flags, *rest, **more)


def _whole(store: AdapterStore, tenants: str, twins: dict[str, Twin]) -> bool:
    return all(print_of(store, tenant) == twins[tenant].print() for tenant in tenants)


def _stepped(store: AdapterStore, tenants: str, twins: dict[str, Twin], step: int) -> None:
    for tenant in tenants:
        assert store.step(tenant, *gradients(tenant, step)) == twins[tenant].step(*gradients(tenant, step))


# ---------------------------------------------------------------------- nothing can be written


@pytest.mark.parametrize("call", CALLS)
def test_tenant_that_cannot_be_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    twins = {tenant: Twin(tenant) for tenant in "abcd"}
    with make_store(tmp_path / "s", room=2) as store:
        for tenant in "abc":
            store.create(tenant)
        _stepped(store, "abc", twins, 0)  # b and c are in memory, and no file has what they learned
        before = store.resident_bytes, store.tenants()
        with failing(monkeypatch, call):
            message = r"must be free, got 0, and tenant 'b' could not be written: \[Errno 28\] No space left on device"
            with pytest.raises(StoreError, match=message) as caught:
                store.step("a", *gradients("a", 1))
            assert isinstance(caught.value.__cause__, OSError)
            with pytest.raises(StoreError, match=message):
                store.create("d")
            results = store.step_many([(tenant, *gradients(tenant, 1)) for tenant in "abc"])
            assert isinstance(results[0], StoreError)
            assert results[1:] == [twins[tenant].step(*gradients(tenant, 1)) for tenant in "bc"]
            assert (store.resident_bytes, store.tenants()) == before
            assert store.counters()["failed_writes"] == 3
        assert _whole(store, "abc", twins)
        _stepped(store, "abc", twins, 2)
        assert _whole(store, "abc", twins)
    assert not [path for path in (tmp_path / "s").iterdir() if path.name.startswith(".")]


def test_tenant_that_needs_no_writing_leaves_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = {tenant: Twin(tenant) for tenant in "abc"}
    with make_store(tmp_path / "s", room=2) as store:
        for tenant in "abc":
            store.create(tenant)
        store.flush()
        _stepped(store, "b", twins, 0)
        store.check("c", 1.0, *make_pair())
        with store._acquired("c"):  # the most recently used, and unchanged
            pass
        with failing(monkeypatch, "fsync"):
            _stepped(store, "a", twins, 0)
        assert store.counters()["failed_writes"] == 1
        assert by_use(store) == ["b", "a"]
        assert _whole(store, "abc", twins)


def test_tenant_with_weights_no_file_may_have_stays_and_others_leave(tmp_path: Path) -> None:
    twins = {tenant: Twin(tenant) for tenant in "abc"}
    with make_store(tmp_path / "s", room=2) as store:
        for tenant in "ab":
            store.create(tenant)
        with store.use("a") as (_, adapters):
            kept = adapters.flat.vector.copy()
            adapters.flat.vector[3] = np.nan
        with store.use("b"):
            pass
        store.create("c")
        assert by_use(store) == ["a", "c"]
        with pytest.raises(
            StoreError, match=r"1 of 2 tenants could not be written and stay in memory, the first 'a': A m"
        ):
            store.flush()
        assert (tmp_path / "s" / "tenant-c.safetensors").exists()
        with store.use("c"), pytest.raises(StoreError, match="tenant 'a' could not be written: A must be finite"):
            store.step("b", 1.0, *make_pair())
        with store.use("a") as (_, adapters):
            adapters.flat.vector[...] = kept
        assert _whole(store, "abc", twins)


def test_store_that_cannot_be_written_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = {tenant: Twin(tenant) for tenant in "abc"}
    store = make_store(tmp_path / "s")
    for tenant in "abc":
        store.create(tenant)
    _stepped(store, "abc", twins, 0)
    with failing(monkeypatch, "replace", errno.EIO):
        for call in (store.flush, store.close):
            with pytest.raises(
                StoreError, match="3 of 3 tenants could not be written and stay in memory, the first 'a'"
            ):
                call()
    _stepped(store, "abc", twins, 1)
    store.close()
    with make_store(tmp_path / "s") as again:
        assert _whole(again, "abc", twins)


def test_limit_of_file_size_loses_nothing(tmp_path: Path) -> None:
    """A real one: the system takes what still fits and then says EFBIG."""
    twins = {tenant: Twin(tenant) for tenant in "abc"}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with make_store(tmp_path / "s", room=2) as store:
        for tenant in "abc":
            store.create(tenant)
        _stepped(store, "abc", twins, 0)
        for limit in (0, 1, 1000, 2000):
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
                outcome = store.step_many([("a", *gradients("a", 1))])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            with pytest.raises(StoreError, match="File too large"):
                raise outcome[0]  # type: ignore[misc]
        assert _whole(store, "abc", twins)
    with make_store(tmp_path / "s") as store:
        assert _whole(store, "abc", twins)


@pytest.mark.nightly
def test_full_disk_loses_nothing(tmp_path: Path, figures: Callable[..., None]) -> None:
    """A tmpfs of a few pages, in a mount namespace of its own, on which no more than some tenants have room."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = ["unshare", *user, "--mount", sys.executable, "-B", FULL, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    refused, done = map(int, run.stdout.split())
    figures(refused=refused, done=done)
    assert refused >= 10
    assert done >= 10


def test_interrupt_while_a_tenant_is_read_or_written_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = {tenant: Twin(tenant) for tenant in "abc"}

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with make_store(tmp_path / "s", room=2) as store:
        for tenant in "abc":
            store.create(tenant)
        for name in ("load", "save"):
            with monkeypatch.context() as patch:
                patch.setattr(TenantFolder, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    store.step("a", *gradients("a", 0))
            assert store.resident_bytes == size_of() * len(store._memory.resident)
            assert all(tenant.owner == 0 for tenant in store._memory.tenants.values())
            store.step_many([(tenant, *gradients(tenant, 9)) for tenant in "bc"])
            for tenant in "bc":
                twins[tenant].step(*gradients(tenant, 9))
        _stepped(store, "abc", twins, 0)
        assert _whole(store, "abc", twins)


def test_file_that_cannot_be_removed_leaves_the_tenant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = {"a": Twin("a")}
    with make_store(tmp_path / "s") as store:
        store.create("a")
        _stepped(store, "a", twins, 0)
        store.flush()
        with monkeypatch.context() as patch:

            def fail(*_: object, **__: object) -> None:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))

            patch.setattr(Path, "unlink", fail)
            with pytest.raises(OSError, match="Read-only file system"):
                store.remove("a")
        assert _whole(store, "a", twins)
        store.remove("a")
        assert store.tenants() == []


# ---------------------------------------------------------------------- open and closed


def test_closing_twice_is_fine_and_a_closed_store_refuses(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    store.create("a")
    store.close()
    store.close()
    calls: list[Callable[[], object]] = [
        lambda: store.create("b"), lambda: store.remove("a"), lambda: store.step("a", 1.0, *make_pair()), store.flush,
        lambda: store.step_many([]), lambda: store.check("a", 1.0, *make_pair()), lambda: store.use("a").__enter__(),
        lambda: store.publish("a"), lambda: store.latest("a"), store.__enter__,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(StateError, match="this store is closed"):
            call()
    assert store.resident_bytes == 0
    assert store.counters()["tenants"] == 0


def test_folder_is_open_once(tmp_path: Path) -> None:
    message = r"folder must be open in one store at a time, got .*/s, which another has open"
    with make_store(tmp_path / "s"), pytest.raises(StateError, match=message):
        make_store(tmp_path / "s")
    make_store(tmp_path / "s").close()


def test_store_that_nobody_closed_lets_go_of_its_folder(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    del store
    make_store(tmp_path / "s").close()


def test_folder_without_locks_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> Callable[..., None]:
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(tenant_files.fcntl, "flock", fail(errno.ENOLCK))
    make_store(tmp_path / "s").close()
    monkeypatch.setattr(tenant_files.fcntl, "flock", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        make_store(tmp_path / "s")


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    make_store(tmp_path / "s").close()
    left = tmp_path / "s" / ".tenant-a.safetensors.1.0123456789abcdef.tmp"
    other = tmp_path / "s" / "notes.txt"
    left.write_bytes(b"half")
    other.write_text("mine")
    with make_store(tmp_path / "s") as store:
        assert store.tenants() == []
    assert not left.exists()
    assert other.read_text() == "mine"


def test_killed_process_loses_what_was_not_flushed_and_nothing_else(tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from stores import gradients, make_store
store = make_store(Path({str(tmp_path / "s")!r}))
for tenant in "ab":
    store.create(tenant)
    store.step(tenant, *gradients(tenant, 0))
store.flush()
store.step("b", *gradients("b", 1))
os.kill(os.getpid(), 9)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    twins = {tenant: Twin(tenant) for tenant in "ab"}
    for tenant in "ab":
        twins[tenant].step(*gradients(tenant, 0))
    with make_store(tmp_path / "s") as store:
        assert _whole(store, "ab", twins)


# ---------------------------------------------------------------------- forked children


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_child_reads_what_is_published_and_nothing_else(tmp_path: Path) -> None:
    with make_store(tmp_path / "s") as store:
        store.create("a")
        snapshot = store.publish("a")

        def work() -> None:
            assert store.latest("a") is snapshot
            assert store.tenants() == ["a"]
            calls: list[Callable[[], object]] = [
                lambda: store.step("a", 1.0, *make_pair()), lambda: store.step_many([]), lambda: store.create("b"),
                lambda: store.remove("a"), lambda: store.check("a", 1.0, *make_pair()), lambda: store.publish("a"),
                lambda: store.use("a").__enter__(), store.flush,
            ]  # fmt: skip
            for call in calls:
                with pytest.raises(StateError, match="this store belongs to the process that opened it"):
                    call()
            store.close()
            with pytest.raises(StateError, match="open in one store at a time"):
                make_store(tmp_path / "s")
            make_store(tmp_path / "child").close()

        before = print_of(store, "a")
        with store._memory.changed:  # a lock that another thread might hold at the fork
            assert in_child(work) == 0
        assert print_of(store, "a") == before
        with pytest.raises(StateError, match="open in one store at a time"):
            make_store(tmp_path / "s")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_child_that_outlives_its_parents_store_does_not_keep_the_folder(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    ready, stop = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.read(stop[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        store._folder._descriptor, descriptor = None, store._folder._descriptor
        assert descriptor is not None
        os.close(descriptor)  # as the end of a process does, without letting go of the lock first
        make_store(tmp_path / "s").close()
    finally:
        os.write(stop[1], b"x")
        os.waitpid(child, 0)
        for end in (*ready, *stop):
            os.close(end)
    store.close()


def test_process_is_told_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the child above meets, seen from inside one process."""
    with make_store(tmp_path / "s") as store:
        store.create("a")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            with pytest.raises(StateError, match=r"belongs to the process that opened it.*only latest\(\) works here"):
                store.step("a", 1.0, *make_pair())
            store.close()
        assert store.step("a", 1.0, *make_pair()).step == 0


def test_leaving_a_folder_to_the_parent_twice_is_fine(tmp_path: Path) -> None:
    folder = TenantFolder(tmp_path / "s")
    tenant_files._in_child()  # what a fork calls
    folder.leave_to_parent()
    folder.close()
    TenantFolder(tmp_path / "s").close()


# ---------------------------------------------------------------------- learned, and then something happens


@pytest.mark.parametrize("end", ["flush", "close"])
def test_what_is_learned_inside_use_is_written_by_what_ends_there(tmp_path: Path, end: str) -> None:
    twin = Twin("a")
    store = make_store(tmp_path / "s")
    store.create("a")
    store.flush()  # nothing of it is new now
    with store.use("a") as (trainer, adapters):
        loss, *pair = gradients("a", 0)
        assert trainer.step(loss, adapters, *pair) == twin.step(loss, *pair)
        getattr(store, end)()
        if end == "flush":
            (saved,) = (tmp_path / "s").glob("tenant-*")
            assert load_checkpoint(saved).trainer.total_steps() == 1
    store.close()
    with make_store(tmp_path / "s") as store:
        assert print_of(store, "a") == twin.print()


def test_step_whose_report_raises_is_kept(tmp_path: Path) -> None:
    def refuse(record: logging.LogRecord) -> bool:
        raise RuntimeError("the log is full")

    logger = logging.getLogger("cylora")
    former = logger.level
    with make_store(tmp_path / "s", log_every=1) as store:
        store.create("a")
        store.flush()
        logger.setLevel(logging.INFO)
        logger.addFilter(refuse)
        try:
            with pytest.raises(RuntimeError, match="the log is full"):
                store.step("a", *gradients("a", 0))
        finally:
            logger.removeFilter(refuse)
            logger.setLevel(former)
    with make_store(tmp_path / "s", log_every=1) as store, store.use("a") as (trainer, _):
        assert trainer.total_steps() == 1


def test_close_inside_close_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal handler calls it while the store is being closed."""
    real = TenantFolder.save

    def save(self: TenantFolder, *arguments: Any) -> None:
        store.close()
        real(self, *arguments)

    store = make_store(tmp_path / "s")
    store.create("a")
    store.step("a", *gradients("a", 0))
    with monkeypatch.context() as patch:
        patch.setattr(TenantFolder, "save", save)
        with in_thread(store.close) as results:  # not here, where it might hang
            pass
    assert results == [None]
    with make_store(tmp_path / "s") as store, store.use("a") as (trainer, _):
        assert trainer.total_steps() == 1


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_remove_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    twin = Twin("a")
    with make_store(tmp_path / "s") as store:
        store.create("a")
        _stepped(store, "a", {"a": twin}, 0)
        store.flush()
        with monkeypatch.context() as patch:
            patch.setattr(tenant_files.os, call, fail)
            with pytest.raises(OSError, match="Too many open files"):
                store.remove("a")
        assert "a" in store
    with make_store(tmp_path / "s") as store:
        assert print_of(store, "a") == twin.print()


@pytest.mark.parametrize("call", ["restored", "published", "resident"])
def test_metrics_that_raise_change_no_account(tmp_path: Path, call: str) -> None:
    class Broken(ServingMetrics):
        is_broken = False

    def broken(self: Broken, *arguments: Any) -> None:
        if self.is_broken:
            raise RuntimeError("metrics")
        getattr(super(Broken, self), call)(*arguments)

    setattr(Broken, call, broken)
    metrics = Broken()
    with make_store(tmp_path / "s", room=2.5, store={"metrics": metrics}) as store:
        for tenant in "abc":
            store.create(tenant)
        metrics.is_broken = True
        for tenant in "ab":
            with contextlib.suppress(RuntimeError):
                store.step(tenant, *gradients(tenant, 0))
            with contextlib.suppress(RuntimeError):
                store.publish(tenant)
        metrics.is_broken = False
        memory = store._memory
        snapshots = sum(snapshot_bytes(tenant.snapshot) for tenant in memory.tenants.values())
        assert store.resident_bytes == snapshots + sum(tenant.n_bytes for tenant in memory.resident.values())
        versions = {tenant: store.latest(tenant) for tenant in "ab"}
        for tenant, before in versions.items():
            after = store.publish(tenant)
            assert after.version > (before.version if before is not None else 0)


# ---------------------------------------------------------------------- interrupts

INTERRUPTED = """
import random, signal, sys, tempfile, time
sys.path.insert(0, sys.argv[1])
from stores import gradients, make_store
from cylora.serving.tenant import snapshot_bytes

armed = False

def interrupt(*_):
    if armed:
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
random.seed(0)
calls = {
    "step": lambda store: store.step("a", *arguments),
    "step_many": lambda store: store.step_many([("a", *arguments), ("b", *arguments)]),
    "publish": lambda store: store.publish("a"),
}
arguments = gradients("a", 0)
count = 0
with tempfile.TemporaryDirectory() as folder, make_store(folder + "/s") as store:
    for tenant in "ab":
        store.create(tenant)
    end = time.monotonic() + 2
    while time.monotonic() < end:
        call = random.choice(list(calls.values()))
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(3e-5, 3e-4))
            while True:
                call(store)
        except KeyboardInterrupt:
            armed = False
            count += 1
        memory = store._memory
        assert not memory.lock.locked()
        for tenant in memory.tenants.values():
            assert (tenant.owner, tenant.depth) == (0, 0), tenant.name
        counted = sum(one.n_bytes + snapshot_bytes(one.snapshot) for one in memory.tenants.values())
        assert memory.bytes == counted
    signal.setitimer(signal.ITIMER_REAL, 0)
print(count)
"""


def test_interrupts_at_random_moments_leave_no_lock_no_owner_and_the_right_account() -> None:
    """In a process of its own, which a lock left taken would hang."""
    command = [sys.executable, "-c", INTERRUPTED, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 100


STEPS: dict[str, Callable[[AdapterStore], object]] = {
    "step": lambda store: store.step("a", *gradients("a", 0)),
    "step_many": lambda store: store.step_many([(tenant, *gradients(tenant, 0)) for tenant in "abab"]),
    "publish": lambda store: store.publish("a"),
    "flush": lambda store: store.flush(),
    "create": lambda store: store.create("new"),
    "remove": lambda store: store.remove("b"),
}


@pytest.mark.parametrize("call", STEPS)
def test_interrupt_as_anything_is_given_back_leaves_nothing_owned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """At each moment near the end of a call that has tenants in hand, or that writes one to make room."""
    with make_store(tmp_path / "s", room=2.5) as store:
        for tenant in "abc":
            store.create(tenant)
        memory, when = store._memory, 0
        with monkeypatch.context() as patch:
            patch.setattr(durable.os, "fsync", lambda fd: None)  # a thousand times would take too long
            while True:
                if call == "remove":  # its file may be gone, and it not forgotten yet: then once more
                    with contextlib.suppress(InputError):
                        store.remove("b")
                for name in [name for name in ("new",) if name in store]:
                    store.remove(name)
                if "b" not in store:
                    store.create("b")
                for tenant in "ab":
                    store.step(tenant, *gradients(tenant, 0))
                store.step("c", *gradients("c", 0))  # a or b leaves
                when += 1 if when < 40 else 17
                if interrupted(lambda: STEPS[call](store), when) is None:
                    break
                assert not memory.lock.locked()
                for one in memory.tenants.values():
                    assert (one.owner, one.depth) == (0, 0), (when, one.name)
        assert when > 20


def test_interrupt_as_others_are_told_tells_them_all_the_same(tmp_path: Path) -> None:
    with make_store(tmp_path / "s") as store:
        store.create("a")
        began = threading.Event()
        with in_thread(lambda: hold_interrupted(store, began)) as held:
            assert began.wait(60)
            with in_thread(lambda: store.step("a", *gradients("a", 0))) as stepped:  # would hang, and says so
                pass
        assert isinstance(held[0], KeyboardInterrupt)
        assert [record.step for record in stepped] == [0]


def hold_interrupted(store: AdapterStore, began: threading.Event) -> None:
    """Use a tenant until another thread waits for it, and be interrupted as that is told."""
    waiters = store._memory.changed._waiters  # type: ignore[attr-defined]

    def interrupt(frame: Any, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name == "notify_all":
            sys.setprofile(None)
            raise KeyboardInterrupt

    with store._acquired("a"):
        began.set()
        wait_for(lambda: len(waiters) == 1)
        sys.setprofile(interrupt)
