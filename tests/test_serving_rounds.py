"""AdapterStore.step_many: a round in compiled code is n calls of `step`, to the bit, whoever shares the work."""

import gc
import os
import platform
import random
import shlex
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import CONFIG, Twin, by_use, gradients, make_store, new_adapters, print_of, size_of
from test_many import Loss, Member, shared  # noqa: F401 - a fixture
from test_serving_store_threads import in_thread, wait_for, waiting
from training import fingerprint, make_adapter, make_pair

from cylora import (
    Gradients,
    InputError,
    LoraAdapter,
    LoraTrainer,
    LoraTrainingConfig,
    NonFiniteGradientError,
    StateError,
    StoreError,
    TrainerBusyError,
    TrainingStep,
)
from cylora.optimizer import Owned, Round, release
from cylora.serving import AdapterStore

COUNT = 200  # tenants: three groups and a part of one


def store_of(members: list[Member], folder: Path, threads: int) -> AdapterStore:
    """Return a store with a tenant like each member. ``on_step`` is the trainer's own and no store's: it logs here."""
    store = AdapterStore(
        lambda name: members[int(name)].adapter,
        config_for=lambda name: members[int(name)].trainer.config,
        folder=folder,
        memory_budget=2**40,
        threads=threads,
    )
    for index in range(len(members)):
        store.create(str(index))
    return store


def learned(trainer: LoraTrainer, adapters: Any) -> str:
    """Return a fingerprint of all but the config, where a store has its own limit of the history."""
    return fingerprint(trainer.state_dict()["adam"], list(trainer.training_history), adapters)


def as_job(member: Member, step: int) -> tuple[Any, ...]:
    """Return a member's job, under its name and with Gradients of its own layout."""
    _, loss, _, *rest = member.job(step)
    return str(member.index), loss, *rest


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("threads", [1, 2, 64])
def test_round_is_single_steps_to_the_bit(tmp_path: Path, threads: int) -> None:
    """Every size, configuration, state and kind of gradient; steps that must ask Python among those that need not."""
    members = [Member(index) for index in range(COUNT)]
    rng = random.Random(threads)
    with store_of(members, tmp_path / "s", threads) as store:
        for step in range(7):
            order = rng.sample(range(COUNT), COUNT)
            results = store.step_many([as_job(members[index], step) for index in order])
            expected = [members[index].trainer.step(*members[index].job(step)[1:]) for index in order]
            assert repr(results) == repr(expected)  # a skipped step's norm is NaN, which equals no other
        for member in members:
            with store.use(str(member.index)) as (trainer, adapters):
                assert learned(trainer, adapters) == learned(member.trainer, member.adapter)
        assert any(member.trainer.skipped_steps() for member in members)
        assert all(tenant.owner == 0 and tenant.depth == 0 for tenant in store._memory.tenants.values())


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 129, 200])
def test_any_number_of_tenants(tmp_path: Path, count: int, threads: int) -> None:
    store, twins = crowd(tmp_path, count, threads)
    with store:
        for name, twin in twins.items():
            assert print_of(store, name) == twin.print()


def crowd(tmp_path: Path, count: int = 150, threads: int = 2, **config: Any) -> tuple[AdapterStore, dict[str, Twin]]:
    """Return a store of tenants that have made three steps, and their twins."""
    store = make_store(tmp_path / "s", room=300, store={"threads": threads}, **config)
    twins = {f"t{index}": Twin(f"t{index}", **config) for index in range(count)}
    for name in twins:
        store.create(name)
    for step in range(3):
        same_steps(store, twins, step)
    return store, twins


def same_steps(store: AdapterStore, twins: dict[str, Twin], step: int) -> None:
    """Step all tenants together and all twins one by one."""
    results = store.step_many([(name, *gradients(name, step)) for name in twins])
    assert results == [twin.step(*gradients(name, step)) for name, twin in twins.items()]


def bad(cause: str, store: AdapterStore, name: str) -> tuple[tuple[Any, ...], type[Exception], str]:
    """Return a job that ends in an error, and which."""
    a, b = make_pair(3)
    if cause == "NaN":
        a[1, 2] = np.nan
        return (name, 1.0, a, b), NonFiniteGradientError, r"gradient of A must be finite, got nan at \[1, 2\]"
    if cause == "shape":
        return (name, 1.0, a[:, 1:].copy(), b), InputError, "grad_a must be a C-contiguous"
    if cause == "second shape":
        return (name, 1.0, a, b[1:].copy()), InputError, "grad_b must be a C-contiguous"
    if cause == "flat size":
        return (name, 1.0, np.zeros(5, np.float32)), InputError, "gradient must be a C-contiguous"
    if cause == "dtype":
        return (name, 1.0, a.astype(np.float64), b), InputError, "grad_a must be"
    if cause == "own memory":
        with store.use(name) as (_, adapters):
            memory = adapters.flat.vector
        return (name, 1.0, memory), InputError, "must not overlap the parameters"
    if cause == "second in own memory":
        with store.use(name) as (_, adapters):
            memory = adapters.b_matrix
        return (name, 1.0, a, memory), InputError, "grad_b must not overlap the parameters"
    if cause == "loss":
        return (name, "much", a, b), InputError, "loss must be"
    if cause == "layout":
        return (name, 1.0, Gradients(LoraAdapter(9, 9, seed=0))), InputError, "got one of another layout"
    if cause == "micro-batch":
        with store.use(name) as (trainer, adapters):
            trainer.accumulate(1.0, adapters, a, b)
        return (name, 1.0, a, b), StateError, "1 micro-batches wait"
    assert cause == "loss raises"
    return (name, Loss(lambda: 1 / 0), a, b), ZeroDivisionError, "division"


CAUSES = (
    "NaN", "shape", "second shape", "flat size", "dtype", "own memory", "second in own memory", "loss", "layout",
    "micro-batch", "loss raises",
)  # fmt: skip


@pytest.mark.parametrize("place", [0, 70, 149])
@pytest.mark.parametrize("cause", CAUSES)
def test_bad_job_is_an_error_in_its_place_and_touches_nobody(
    tmp_path: Path,
    cause: str,
    place: int,
    shared: None,  # noqa: F811
) -> None:
    store, twins = crowd(tmp_path)
    with store:
        name = f"t{place}"
        job, kind, message = bad(cause, store, name)
        before = print_of(store, name)
        jobs = [(other, *gradients(other, 3)) for other in twins]
        jobs[place] = job
        results = store.step_many(jobs)
        assert type(results[place]) is kind
        with pytest.raises(kind, match=message):
            raise results[place]
        assert print_of(store, name) == before
        for other, result in zip(twins, results, strict=True):
            if other != name:
                assert result == twins[other].step(*gradients(other, 3))
                assert print_of(store, other) == twins[other].print()
        if cause == "micro-batch":
            with store.use(name) as (trainer, _):
                trainer.discard_accumulated()
        same_steps(store, {name: twins[name]}, 4)
        assert print_of(store, name) == twins[name].print()


def test_tenant_that_comes_again_is_stepped_again_in_order(tmp_path: Path) -> None:
    store, twins = crowd(tmp_path)
    steps_of(store, twins, [*twins, "t3", "t149", "t3", *list(twins)[:70], "t3"])


def steps_of(store: AdapterStore, twins: dict[str, Twin], names: list[str]) -> None:
    """Step tenants together and their twins in this order, and compare all, too."""
    jobs = [(name, float(index), *make_pair(index)) for index, name in enumerate(names)]
    with store:
        assert store.step_many(jobs) == [twins[name].step(*rest) for name, *rest in jobs]
        for name, twin in twins.items():
            assert print_of(store, name) == twin.print()


def test_names_of_a_kind_of_their_own_are_names_too(tmp_path: Path) -> None:
    """A str of a subclass might compare itself in Python code, so the compiled part leaves it alone."""

    class Name(str):
        __slots__ = ()

    store, twins = crowd(tmp_path, 5)
    steps_of(store, twins, ["t0", Name("t1"), "t2", Name("t1"), Name("t0"), "t3", "t2", "t1"])


def test_tuples_of_a_kind_of_their_own_are_what_is_in_them(tmp_path: Path) -> None:
    """Whatever they say of their length."""

    class Lying(tuple):
        __slots__ = ()

        def __len__(self) -> int:
            return 3

    store, twins = crowd(tmp_path, 2)
    with store:
        same = gradients("t0", 3)
        results = store.step_many([Lying(("t0", *same)), Lying(()), Lying(("t1",)), ("t1", *gradients("t1", 3))])
        assert results[0] == twins["t0"].step(*same)
        assert results[3] == twins["t1"].step(*gradients("t1", 3))
        for result, got in zip(results[1:3], (0, 1), strict=True):
            with pytest.raises(InputError, match=f"got a tuple of {got}"):
                raise result


def test_config_that_steps_its_tenant_while_that_is_read_brings_it_in_once(tmp_path: Path) -> None:
    config, inner = LoraTrainingConfig(**CONFIG), []

    def config_for(tenant: str) -> LoraTrainingConfig:
        if tenant == "a" and is_armed:
            is_armed.clear()
            inner.extend(store.step_many([("a", *gradients("a", step)) for step in (1, 2)]))
        return config

    is_armed: list[bool] = []
    twin = Twin("a")
    store = AdapterStore(
        new_adapters, config_for=config_for, folder=tmp_path / "s", memory_budget=int(2.5 * size_of())
    )
    with store:
        for tenant in "abc":
            store.create(tenant)  # a leaves
        is_armed.append(True)
        results = store.step_many([("a", *gradients("a", step)) for step in (3, 4, 5)])
        assert inner + results == [twin.step(*gradients("a", step)) for step in (1, 2, 3, 4, 5)]
        assert store.resident_bytes == size_of() * len(store._memory.resident)
        assert print_of(store, "a") == twin.print()


@pytest.mark.parametrize("which", ["config_for", "new_adapters"])
def test_flush_while_a_tenant_arrives_does_not_wait_for_who_wants_that(tmp_path: Path, which: str) -> None:
    config, is_armed, wanted = LoraTrainingConfig(**CONFIG), [], threading.Event()
    late: list[Any] = []

    def flush() -> None:
        is_armed.clear()
        wanted.set()
        wait_for(lambda: waiting(store) == 1)
        with pytest.raises(StoreError, match="another thread is using it"):
            store.flush()

    def config_for(tenant: str) -> LoraTrainingConfig:
        if which == "config_for" and tenant == "a" and is_armed:
            flush()
        return config

    def make(tenant: str) -> Any:
        if which == "new_adapters" and tenant == "d":
            flush()
        return new_adapters(tenant)

    def uses() -> None:
        with store.use("c"):
            entered.set()
            assert wanted.wait(60)
            late.append(store.step("a" if which == "config_for" else "d", 1.0, *make_pair()))

    entered = threading.Event()
    store = AdapterStore(make, config_for=config_for, folder=tmp_path / "s", memory_budget=int(2.5 * size_of()))
    with store:
        for tenant in "abc":
            store.create(tenant)
        is_armed.append(True)
        with in_thread(uses) as done:
            assert entered.wait(60)
            if which == "config_for":
                store.step("a", 1.0, *make_pair())
            else:
                store.create("d")
        assert done == [None]
        assert late[0].step == (1 if which == "config_for" else 0)


def test_state_loaded_in_use_is_what_the_next_round_goes_on_from(tmp_path: Path) -> None:
    """The optimizer that the store knew refuses then; it looks for the new one."""
    store, twins = crowd(tmp_path)
    with store:
        early = twins["t5"].trainer.state_dict()
        for step in (3, 4):
            same_steps(store, twins, step)
        with store.use("t5") as (trainer, _):
            trainer.load_state_dict(early)
        twins["t5"].trainer.load_state_dict(early)
        for step in (5, 6):
            same_steps(store, twins, step)
        assert print_of(store, "t5") == twins["t5"].print()


def test_trainer_that_somebody_kept_and_holds_is_busy(tmp_path: Path) -> None:
    store, twins = crowd(tmp_path)
    with store:
        with store.use("t7") as (trainer, adapters):
            pass
        results = trainer.hold(adapters, lambda _: store.step_many([(name, *gradients(name, 3)) for name in twins]))
        assert isinstance(results[7], TrainerBusyError)
        del results[7], twins["t7"]
        assert results == [twin.step(*gradients(name, 3)) for name, twin in twins.items()]


def test_rounds_of_full_histories_ask_no_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring that is full stays where it is."""
    store, twins = crowd(tmp_path, history_limit=3)

    def fail(*_: object) -> bool:
        raise AssertionError

    with store:
        monkeypatch.setattr("cylora.history.TrainingHistory.make_room", fail)
        monkeypatch.setattr(LoraTrainer, "prepared_step", fail)
        for step in range(3, 7):
            same_steps(store, twins, step)
        monkeypatch.undo()


def test_collector_has_nothing_to_look_through_in_records(tmp_path: Path) -> None:
    store, twins = crowd(tmp_path, 1)
    with store:
        (record,) = store.step_many([("t0", *gradients("t0", 3))])
        assert not gc.is_tracked(record)
        assert record == twins["t0"].step(*gradients("t0", 3))


@pytest.mark.parametrize("change", [lambda _: None, lambda a: a.fill(np.nan)], ids=["good", "NaN"])
def test_rounds_leave_no_reference(tmp_path: Path, change: Callable[[np.ndarray], None]) -> None:
    store, twins = crowd(tmp_path)
    with store:
        pairs = [make_pair(index) for index in range(len(twins))]
        change(pairs[3][0])
        jobs = [(name, 1.5, *pair) for name, pair in zip(twins, pairs, strict=True)]
        things = [None, TrainingStep, jobs, *jobs, *pairs[3], *pairs[70], *store._memory.tenants.values()]
        counts = []
        for calls in (20, 200):
            for _ in range(calls):
                store.step_many(jobs)
            gc.collect()
            counts.append([sys.getrefcount(thing) for thing in things])
        assert all(abs(before - after) <= 60 for before, after in zip(*counts, strict=True))


def test_least_recently_used_leaves_first_whatever_came_between(tmp_path: Path) -> None:
    """Against a list that is kept in order."""
    rng, model, room = random.Random(0), [], 6
    names = [f"n{index}" for index in range(12)]
    with make_store(tmp_path / "s", room=room) as store:
        for name in names:
            store.create(name)
            model = [*model[-room + 1 :], name]
        for _ in range(400):
            few = rng.sample(names, rng.choice((1, 1, 2, 5)))
            if rng.random() < 0.5:
                store.step(few[0], 1.0, *make_pair())
                few = few[:1]
            else:
                store.step_many([(name, 1.0, *make_pair()) for name in few])
            for name in few:
                model = [*[other for other in model if other != name][-room + 1 :], name]
            assert sorted(store._memory.resident) == sorted(model)
            assert by_use(store) == model
        assert store.resident_bytes == room * size_of()


# ---------------------------------------------------------------------- the compiled part alone


def test_take_stops_at_what_it_cannot_have() -> None:
    tenants = {name: Owned(name) for name in "abcd"}
    for name in "abd":
        tenants[name].trainer = object()  # c is on disk
    tenants["d"].owner = 1  # another thread's
    jobs: list[Any] = [("a", 1.0, None), ("b", 1.0, None), ("a", 2.0, None), ("c", 1.0, None), ("d", 1.0, None), 5]
    current = Round(jobs, [0, 1, 2, 3])
    current.begin()
    current.take(tenants)
    assert [one.name for one in current.held] == ["a", "b"]
    assert (current.mine, current.later, current.at, current.is_over, current.place) == ([0, 1], [2], 3, False, 3)
    assert tenants["a"].used < tenants["b"].used
    assert tenants["a"].owner == tenants["b"].owner > 0
    assert current.has_come(tenants["a"])
    assert not current.has_come(tenants["c"])
    notified: list[int] = []
    release(threading.Lock(), lambda: notified.append(tenants["a"].owner), current.held)
    assert notified[0] > 0  # before, under the lock
    assert current.held == []
    assert [(one.owner, one.depth) for one in tenants.values()] == [(0, 0), (0, 0), (0, 0), (1, 0)]
    for jobs_, places in ((jobs, [4]), (jobs, [5]), ([("e", 1.0, None)], [0]), ([("a", 1.0)], [0]), ([[]], [0])):
        other = Round(jobs_, places)
        other.begin()
        other.take(tenants)
        assert (other.held, other.at) == ([], 0)


def test_what_one_thread_has_already_it_takes_again() -> None:
    one = Owned("a")
    one.trainer = object()
    rounds = [Round([("a", 1.0, None)], [0]) for _ in range(2)]
    for current in rounds:
        current.begin()
        current.take({"a": one})
        assert current.held == [one]
    assert one.depth == 2
    for depth in (1, 0):
        release(threading.Lock(), lambda: None, rounds.pop().held)
        assert one.depth == depth
    assert one.owner == 0


def test_round_without_anybody_does_nothing() -> None:
    current = Round([], [])
    current.begin()
    assert current.is_over
    current.take({})
    assert current.step([], 2) == []


@pytest.mark.parametrize("config", [{"log_every": 2}, {"log_every": 0}])
def test_steps_are_logged_as_single_ones_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: dict[str, int]
) -> None:
    config_of = LoraTrainingConfig(warmup_steps=0, **config)
    with AdapterStore(lambda _: make_adapter(), config_of, folder=tmp_path / "s", memory_budget=2**30) as store:
        store.create("a")
        with caplog.at_level("INFO", "cylora"):
            for _ in range(5):
                store.step_many([("a", 1.0, *make_pair())])
    logged = [record.getMessage().split(":")[0] for record in caplog.records]
    assert logged == (["step 1", "step 3"] if config["log_every"] else [])


# ------------------------------------------------------------------ the collector


def test_lists_are_hidden_from_collections_during_a_round_only(tmp_path: Path) -> None:
    jobs = tuple((str(index), *gradients(str(index), 0)) for index in range(COUNT))
    seen: list[int] = []

    def lists() -> int:
        return sum(type(one) is list and len(one) == COUNT for one in gc.get_objects())

    def look(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(lists())

    with make_store(tmp_path, room=2 * COUNT) as store:
        for name, *_ in jobs:
            store.create(name)
        store.step_many(jobs)  # the first goes another way
        threshold = gc.get_threshold()
        gc.collect()
        before = lists()
        gc.callbacks.append(look)
        gc.set_threshold(COUNT // 2)  # so that up to CPython 3.11 the first one comes after as many records
        try:
            results = store.step_many(jobs)
        finally:
            gc.set_threshold(*threshold)
            gc.callbacks.remove(look)
        assert all(isinstance(result, TrainingStep) for result in results)
        assert sys.version_info >= (3, 12) or seen[0] == before
        assert gc.is_tracked(results)
        del results
        assert lists() == before


# ------------------------------------------------------------------ no memory

STARVING_CALLOC = """
#include <stddef.h>
extern void *__libc_calloc(size_t, size_t);
int calls_left;
size_t wanted;
void *calloc(size_t n, size_t size) {
    return n == wanted && size == sizeof(void *) && calls_left-- == 0 ? NULL : __libc_calloc(n, size);
}
"""
STARVED = """
    import ctypes
    import os
    import sys
    from pathlib import Path
    from stores import gradients, make_store

    library, which = ctypes.CDLL(sys.argv[1]), int(sys.argv[2])
    store = make_store(Path("store"), room=20.5)
    names = [str(index) for index in range(40)]
    for name in names:
        store.create(name)
    for step in range(2):
        for some in (names[:20], names[20:]):
            store.step_many([(name, *gradients(name, step)) for name in some])
    ctypes.c_int.in_dll(library, "calls_left").value = which
    ctypes.c_size_t.in_dll(library, "wanted").value = 20 + 1
    try:
        store.step_many([(name, *gradients(name, 2)) for name in (*names[20:], *names[:20])])
    except MemoryError:
        print("MemoryError", sum(tenant.owner != 0 for tenant in store._memory.tenants.values()))
    ctypes.c_size_t.in_dll(library, "wanted").value = 0
    store.close()
    print(ctypes.c_int.in_dll(library, "calls_left").value)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="calls the calloc of glibc")
@pytest.mark.parametrize("which", [0, 2])  # in the first and in the second of two batches
def test_batch_without_memory_leaves_no_owner(tmp_path: Path, which: int) -> None:
    source, library, program = tmp_path / "starving.c", tmp_path / "starving.so", tmp_path / "starved.py"
    source.write_text(STARVING_CALLOC)
    subprocess.run([*shlex.split(os.environ.get("CC", "cc")), "-shared", "-fPIC", "-o", library, source], check=True)
    program.write_text(textwrap.dedent(STARVED))
    done = subprocess.run(
        [sys.executable, program, library, str(which)],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(Path(__file__).parent)},
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    error, owned, left = done.stdout.split()
    assert (error, owned) == ("MemoryError", "0")
    assert int(left) < 0
