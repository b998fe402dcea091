"""AdapterStore from several threads: each tenant is one thread's at a time, and nobody waits for ever."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from stores import CONFIG, Twin, gradients, make_store, new_adapters, print_of, size_of
from test_threads import run_threads
from training import make_pair

from cylora import InputError, LoraTrainingConfig, StateError, StoreError
from cylora.formats import load_checkpoint
from cylora.serving import AdapterStore
from cylora.serving.residency import NotNowError
from cylora.serving.tenant_files import TenantFolder

SECONDS = 60  # against a hang


class Gate:
    """A schedule that keeps the steps of one tenant under way until it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, step: int) -> float:
        self.entered.set()
        assert self.opened.wait(SECONDS)
        return 1e-2


def gated_store(folder: Path, gate: Gate, *, room: float) -> AdapterStore:
    """Return a store in which tenant "slow" is stepped by the gate."""

    def config_for(tenant: str) -> LoraTrainingConfig:
        return LoraTrainingConfig(**CONFIG | ({"schedule": gate} if tenant == "slow" else {}))

    return AdapterStore(new_adapters, folder=folder, memory_budget=int(room * size_of()), config_for=config_for)


@contextmanager
def in_thread(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run ``work`` beside the body; give the list that its result, or exception, comes into."""
    results: list[Any] = []

    def guarded() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    try:
        yield results
    finally:
        thread.join(SECONDS)
        assert not thread.is_alive(), "hangs"


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    tick = threading.Event()
    for _ in range(SECONDS * 200):
        if condition():
            return
        tick.wait(0.005)
    raise AssertionError("it did not come to that")


def waiting(store: AdapterStore) -> int:
    """Return how many threads wait for a tenant or for room."""
    return len(store._memory.changed._waiters)  # type: ignore[attr-defined]


@pytest.mark.parametrize("room", [100, 4.5])
def test_threads_with_tenants_of_their_own_do_what_one_thread_does(tmp_path: Path, room: float) -> None:
    """Four threads of three tenants each; there is room for all, or every other step reads one and writes one."""
    groups = [[f"{group}{index}" for index in range(3)] for group in "abcd"]
    twins = {tenant: Twin(tenant) for group in groups for tenant in group}
    with make_store(tmp_path / "s", room=room) as store:
        for tenant in twins:
            store.create(tenant)

        def work(group: list[str], several: bool) -> None:
            for step in range(8):
                jobs = [(tenant, *gradients(tenant, step)) for tenant in group]
                results = store.step_many(jobs) if several else [store.step(*job) for job in jobs]
                assert results == [twins[tenant].step(*rest) for tenant, *rest in jobs]

        run_threads(
            *(lambda group=group, place=place: work(group, place % 2 == 0) for place, group in enumerate(groups))
        )
        assert store.resident_bytes <= room * size_of()
        assert {tenant: print_of(store, tenant) for tenant in twins} == {t: twins[t].print() for t in twins}


def test_one_tenant_is_stepped_by_one_thread_after_the_other(tmp_path: Path) -> None:
    with make_store(tmp_path / "s", room=1.5) as store:
        for tenant in "ab":
            store.create(tenant)
        steps: list[int] = []

        def work() -> None:
            for _ in range(20):
                for tenant in "ab":
                    record = store.step(tenant, 1.0, *make_pair())
                    if tenant == "a":
                        steps.append(record.step)
                steps.extend(record.step for record in store.step_many([("a", 1.0, *make_pair())] * 2))

        run_threads(work, work, work)
        assert sorted(steps) == list(range(180))


def test_step_of_a_busy_tenant_waits_its_turn_and_others_go_on(tmp_path: Path) -> None:
    gate = Gate()
    with gated_store(tmp_path / "s", gate, room=10) as store:
        for tenant in ("slow", "a", "b"):
            store.create(tenant)
        with in_thread(lambda: store.step("slow", 1.0, *make_pair())) as first:
            assert gate.entered.wait(SECONDS)
            with in_thread(lambda: store.step("slow", 2.0, *make_pair())) as second:
                wait_for(lambda: waiting(store) == 1)
                assert store.step("a", 1.0, *make_pair()).step == 0
                store.publish("b")
                assert store.latest("slow") is None
                gate.opened.set()
        assert (first[0].step, first[0].loss) == (0, 1.0)
        assert (second[0].step, second[0].loss) == (1, 2.0)


def test_many_steps_do_not_hold_others_while_they_wait_for_one(tmp_path: Path) -> None:
    gate = Gate()
    with gated_store(tmp_path / "s", gate, room=10) as store:
        for tenant in ("slow", "a", "b"):
            store.create(tenant)
        with in_thread(lambda: store.step("slow", 1.0, *make_pair())):
            assert gate.entered.wait(SECONDS)
            jobs = [(tenant, 1.0, *make_pair()) for tenant in ("a", "slow", "b")]
            with in_thread(lambda: store.step_many(jobs)) as results:
                wait_for(lambda: waiting(store) == 1)
                assert store.step("a", 1.0, *make_pair()).step == 1  # its step is done, and nobody has it
                gate.opened.set()
        assert [record.step for record in results[0]] == [0, 1, 0]


def test_room_is_waited_for_while_others_are_in_a_step(tmp_path: Path) -> None:
    gate = Gate()
    with gated_store(tmp_path / "s", gate, room=1) as store:
        for tenant in ("a", "slow"):
            store.create(tenant)
        with in_thread(lambda: store.step("slow", 1.0, *make_pair())) as slow:
            assert gate.entered.wait(SECONDS)
            with (
                in_thread(lambda: store.step("a", 1.0, *make_pair())) as one,
                in_thread(lambda: store.step_many([("a", 1.0, *make_pair())])) as many,
            ):
                wait_for(lambda: waiting(store) == 2)
                gate.opened.set()
        assert slow[0].step == 0
        assert sorted([one[0].step, many[0][0].step]) == [0, 1]
        assert store.resident_bytes == size_of()


def test_room_in_a_tenant_that_is_used_is_not_waited_for(tmp_path: Path) -> None:
    """Also not by somebody who began to wait while it was only being stepped."""
    gate = Gate()
    with gated_store(tmp_path / "s", gate, room=1) as store:
        for tenant in ("a", "slow"):
            store.create(tenant)

        def use_and_step() -> None:
            with store._acquired("slow") as (entry, trainer, adapters):
                trainer.step(1.0, adapters, *make_pair())
                store._memory.pin(entry, is_pinned=True)
                held.set()
                assert over.wait(SECONDS)
                store._memory.pin(entry, is_pinned=False)

        held, over = threading.Event(), threading.Event()
        with in_thread(use_and_step):
            assert gate.entered.wait(SECONDS)
            with in_thread(lambda: store.step("a", 1.0, *make_pair())) as results:
                wait_for(lambda: waiting(store) == 1)
                gate.opened.set()
                assert held.wait(SECONDS)
            assert isinstance(results[0], StoreError)
            over.set()
        assert store.step("a", 1.0, *make_pair()).step == 0


def test_arriving_tenant_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is full of one that is being read: when it is there, it can leave again."""
    gate = Gate()
    real = TenantFolder.load

    def load(self: TenantFolder, tenant: str, **changes: Any) -> Any:
        if tenant == "a":
            gate(0)
        return real(self, tenant, **changes)

    with make_store(tmp_path / "s", room=1) as store:
        for tenant in "abc":
            store.create(tenant)
        monkeypatch.setattr(TenantFolder, "load", load)
        with in_thread(lambda: store.step("a", 1.0, *make_pair())) as first:
            assert gate.entered.wait(SECONDS)
            with in_thread(lambda: store.step("b", 1.0, *make_pair())) as second:
                wait_for(lambda: waiting(store) == 1)
                gate.opened.set()
        assert (first[0].step, second[0].step) == (0, 0)


def test_tenant_that_is_removed_while_others_wait_for_it_is_unknown_to_them(tmp_path: Path) -> None:
    with make_store(tmp_path / "s") as store:
        store.create("a")
        held: list[Any] = []
        store._memory.own("a", held)
        with in_thread(lambda: store.remove("a")) as removed, in_thread(lambda: store.check("a", 1.0)) as checked:
            wait_for(lambda: waiting(store) == 1 and bool(checked))
            with in_thread(lambda: store.step("a", 1.0, *make_pair())) as stepped:
                wait_for(lambda: waiting(store) == 2)
                store._memory.release(held)
        assert removed == [None]
        assert isinstance(stepped[0], InputError) or stepped[0].step == 0  # whoever came first
        assert "a" not in store
        assert store.resident_bytes == 0


def test_tenant_that_is_removed_during_a_flush_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TenantFolder.save

    def save(self: TenantFolder, tenant: str, *rest: Any) -> None:
        real(self, tenant, *rest)
        if tenant == "a":
            store.remove("b")

    with make_store(tmp_path / "s") as store:
        for tenant in "abc":
            store.create(tenant)
        with monkeypatch.context() as patch:
            patch.setattr(TenantFolder, "save", save)
            store.flush()
        assert sorted(path.name for path in (tmp_path / "s").glob("tenant-*")) == [
            "tenant-a.safetensors",
            "tenant-c.safetensors",
        ]


def test_close_waits_for_steps_and_turns_away_who_waits(tmp_path: Path) -> None:
    gate = Gate()
    store = gated_store(tmp_path / "s", gate, room=10)
    for tenant in ("slow", "a"):
        store.create(tenant)
    with in_thread(lambda: store.step("slow", 1.0, *make_pair())) as stepped:
        assert gate.entered.wait(SECONDS)
        with in_thread(lambda: store.step("slow", 1.0, *make_pair())) as late:
            wait_for(lambda: waiting(store) == 1)
            with in_thread(store.close) as one, in_thread(store.close) as other:
                wait_for(lambda: bool(late))
                with pytest.raises(StateError, match="this store is closed"):
                    store.step("a", 1.0, *make_pair())
                gate.opened.set()
    assert stepped[0].step == 0
    assert isinstance(late[0], StateError)
    assert one == other == [None]
    with gated_store(tmp_path / "s", gate, room=10) as again, again.use("slow") as (trainer, _):
        assert trainer.total_steps() == 1


def test_two_threads_that_close_inside_use_do_not_wait_for_each_other(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    for tenant in "ab":
        store.create(tenant)

    def close_inside() -> None:
        with store.use("a"):
            store.close()

    def close_inside_too() -> None:
        with store.use("b"):
            begun.set()
            wait_for(lambda: store._memory._closer is not None)
            assert store.latest("a") is None  # it is open still
            store.close()

    begun = threading.Event()
    with in_thread(close_inside_too) as late:
        assert begun.wait(SECONDS)
        with in_thread(close_inside) as first:
            wait_for(lambda: store._memory._closer is not None)
            with in_thread(store.close) as third:  # uses nothing, so it waits as ever
                pass
    assert first == third == [None]
    with pytest.raises(StateError, match="by another thread, which waits for what this one has in use"):
        raise late[0]
    with pytest.raises(StateError, match="this store is closed"):
        store.latest("a")


def test_interrupted_close_leaves_the_store_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with gated_store(tmp_path / "s", gate, room=10) as store:
        store.create("slow")
        with in_thread(lambda: store.step("slow", 1.0, *make_pair())):
            assert gate.entered.wait(SECONDS)
            with monkeypatch.context() as patch:

                def interrupted(*_: object) -> None:
                    raise KeyboardInterrupt

                patch.setattr(store._memory.changed, "wait", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    store.close()
            gate.opened.set()
        assert store.step("slow", 1.0, *make_pair()).step == 1


# ---------------------------------------------------------------------- flush inside use

LEFT = "another thread is using it, and this one, which is using a tenant itself, must not wait for that"


def steps_on_disk(folder: Path) -> dict[str, int]:
    """Return how many steps of each tenant are in its file."""
    checkpoints = [load_checkpoint(path, schedule="constant") for path in folder.glob("tenant-*")]
    return {one.extra["tenant"]: one.trainer.total_steps() for one in checkpoints}


def test_threads_that_flush_inside_use_do_not_wait_for_each_other(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")  # no with: it would wait for threads that hang
    for tenant in "abc":
        store.create(tenant)
        store.step(tenant, 1.0, *make_pair())
    both = threading.Barrier(2)

    def work(tenant: str) -> str:
        with store.use(tenant):
            both.wait(SECONDS)
            with pytest.raises(StoreError) as caught:
                store.flush()
            both.wait(SECONDS)
        return str(caught.value)

    with in_thread(lambda: work("a")) as one, in_thread(lambda: work("b")) as other:
        pass
    message = "1 of 3 tenants could not be written and stay in memory, the first {!r}: " + LEFT
    assert one + other == [message.format("b"), message.format("a")]
    assert steps_on_disk(tmp_path / "s") == {"a": 1, "b": 1, "c": 1}  # its own, and that of nobody, by each
    store.flush()
    assert store.counters()["failed_writes"] == 0
    store.close()


def test_flush_inside_use_waits_for_steps_and_does_not_keep_who_wants_its_tenant_for_ever(tmp_path: Path) -> None:
    gate = Gate()
    with gated_store(tmp_path / "s", gate, room=10) as store:
        for tenant in ("slow", "a"):
            store.create(tenant)

        def use_and_flush() -> None:
            with store.use("a") as (trainer, adapters):
                trainer.step(1.0, adapters, *make_pair())
                store.flush()

        with in_thread(lambda: store.step("slow", 1.0, *make_pair())) as stepped:
            assert gate.entered.wait(SECONDS)
            with in_thread(use_and_flush) as flushed:
                wait_for(lambda: waiting(store) == 1)
                with in_thread(lambda: store.step("a", 1.0, *make_pair())) as late:
                    wait_for(lambda: waiting(store) == 2)
                    assert flushed == []
                    gate.opened.set()
        assert (stepped[0].step, late[0].step, flushed) == (0, 1, [None])
        assert steps_on_disk(tmp_path / "s")["slow"] == 1


def test_flush_inside_use_gives_up_a_tenant_that_is_taken_for_use_meanwhile(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    for tenant in "ab":
        store.create(tenant)
    wants_a = threading.Event()

    def use_both() -> int:
        with store._acquired("b") as (entry, _, _):
            wait_for(lambda: waiting(store) == 1)
            store._memory.pin(entry, is_pinned=True)
            wants_a.set()
            with store.use("a") as (trainer, _):
                steps: int = trainer.total_steps()
            store._memory.pin(entry, is_pinned=False)
        return steps

    with in_thread(use_both) as used:
        wait_for(lambda: store._memory.find("b").owner != 0)
        with store.use("a") as (trainer, adapters):
            trainer.step(1.0, adapters, *make_pair())
            with pytest.raises(StoreError, match=f"the first 'b': {LEFT}"):
                store.flush()
            assert wants_a.is_set()
    assert used == [1]
    store.close()


def test_flush_outside_use_waits_for_who_uses_a_tenant(tmp_path: Path) -> None:
    with make_store(tmp_path / "s") as store:
        store.create("a")
        used, over = threading.Event(), threading.Event()

        def use() -> None:
            with store.use("a") as (trainer, adapters):
                used.set()
                assert over.wait(SECONDS)
                trainer.step(1.0, adapters, *make_pair())

        with in_thread(use):
            assert used.wait(SECONDS)
            with in_thread(store.flush) as flushed:
                wait_for(lambda: waiting(store) == 1)
                over.set()
        assert flushed == [None]
        assert steps_on_disk(tmp_path / "s") == {"a": 1}


def test_flush_inside_a_step_waits_for_nobody(tmp_path: Path) -> None:
    """A schedule may call anything: two of them that flush would wait for each other's step."""
    both = threading.Barrier(2)
    refused: list[str] = []

    def schedule(step: int) -> float:
        both.wait(SECONDS)
        try:
            store.flush()
        except StoreError as error:
            refused.append(str(error))
        both.wait(SECONDS)
        return 1e-2

    store = make_store(tmp_path / "s", schedule=schedule)
    for tenant in "ab":
        store.create(tenant)
    with (
        in_thread(lambda: store.step("a", 1.0, *make_pair())) as one,
        in_thread(lambda: store.step("b", 1.0, *make_pair())) as other,
    ):
        pass
    assert [one[0].step, other[0].step] == [0, 0]
    assert [message[:55] for message in refused] == ["2 of 2 tenants could not be written and stay in memory,"] * 2
    assert any(LEFT in message for message in refused)
    assert list((tmp_path / "s").glob("tenant-*")) == []
    store.close()


def test_flush_inside_use_tries_again_for_a_tenant_that_is_free_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_store(tmp_path / "s") as store:
        for tenant in "ab":
            store.create(tenant)
        own, tried = store._memory.own, []

        def taken_once(name: str, held: list[Any], *, waits: bool = True) -> Any:
            tried.append(name)
            if tried == ["a", "b"]:
                raise NotNowError
            return own(name, held, waits=waits)

        with store.use("a"), monkeypatch.context() as patch:
            patch.setattr(store._memory, "own", taken_once)
            store.flush()
        assert tried == ["a", "b", "b"]
        assert steps_on_disk(tmp_path / "s") == {"a": 0, "b": 0}


def test_flush_that_the_end_of_the_store_overtakes_is_told_so(tmp_path: Path) -> None:
    gate = Gate()
    store = gated_store(tmp_path / "s", gate, room=10)
    store.create("slow")
    with in_thread(lambda: store.step("slow", 1.0, *make_pair())):
        assert gate.entered.wait(SECONDS)
        with in_thread(store.flush) as flushed:
            wait_for(lambda: waiting(store) == 1)
            with in_thread(store.close) as closed:
                wait_for(lambda: bool(flushed))
                gate.opened.set()
    assert isinstance(flushed[0], StateError)
    assert str(flushed[0]) == "this store is closed"
    assert closed == [None]
