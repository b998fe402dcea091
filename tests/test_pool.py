"""The pool of threads, through a foreign module that cimports it: what is shared is done once, in order, by all.

What forks, exits or limits itself runs in a process of its own.
"""

import importlib.util
import itertools
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fp_state
import numpy as np
import pytest

import cylora
from cylora.kernels.threads import configure, started

TESTS = Path(__file__).parent
THREADS = (1, 2, 3, 4, 7, 8, 16)
GRAINS = (1, 2, 3, 16, 1000)
ITEMS = (0, 1, 2, 3, 5, 8, 16, 17, 64, 129)
PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PATIENCE = 60  # seconds in which even a loaded machine gets round to every thread
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def sooner_or_later(come_true: Callable[[], bool]) -> None:
    """Try until what depends on the system's scheduler comes true."""
    end = time.monotonic() + PATIENCE
    while not come_true():
        assert time.monotonic() < end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with the module teams, compiled against the cylora that these tests run on."""
    source = tmp_path_factory.mktemp("teams") / "source"
    shutil.copytree(TESTS / "data" / "pool_package", source)
    paths = [str(Path(cylora.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(source.parent / "built")],
        cwd=source, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return source.parent / "built"


@pytest.fixture(scope="module")
def teams(folder):
    """The module teams."""
    (library,) = folder.glob("teams.*.so")
    spec = importlib.util.spec_from_file_location("teams", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def always():
    """Share whatever the size, on any machine."""
    former = configure("always")
    yield
    configure(*former)


class Notes:
    """Arrays for `teams.work`, and what it made of them."""

    def __init__(self, items: int) -> None:
        self.first, self.second, self.ids = (np.zeros(items, np.int64) for _ in range(3))
        self.states = np.zeros(items, np.uint64)

    def work(self, teams, threads: int, grain: int = 1, work_us: float = 1e6, **options) -> bool:
        opened, wrong = teams.work(threads, work_us, grain, self.first, self.second, self.ids, self.states, **options)
        assert wrong == 0
        return opened

    def each_done(self, times: int) -> bool:
        return bool((self.first == times).all() and (self.second == times).all())


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("threads", THREADS)
def test_every_item_is_done_once_and_the_phases_in_order(teams, threads: int) -> None:
    for items, grain, _ in itertools.product(ITEMS, GRAINS, range(20)):
        notes = Notes(items)
        opened = notes.work(teams, threads, grain)
        assert opened == (threads > 1)
        assert notes.each_done(int(opened)), (items, grain)


@pytest.mark.usefixtures("always")
def test_single_phase_teams_alternate_with_others(teams) -> None:
    """The two jobs of the pool take turns; an odd number of phases must not confuse them."""
    for i in range(2000):
        notes = Notes(7)
        assert notes.work(teams, 2 + i % 3, second_phase=i % 5 > 2)
        assert (notes.first == 1).all()
        assert (notes.second == (i % 5 > 2)).all()


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("spin_us", [0, 50])
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_all_threads_of_a_team_take_part(teams, threads: int, spin_us: float) -> None:
    """Each piece sleeps, so that even one processor gets round to everybody; a busy one may need several teams."""
    configure(spin_us=spin_us)

    def all_in_one() -> bool:
        notes = Notes(8 * threads)
        assert notes.work(teams, threads, pause_us=2000)
        assert notes.each_done(1)
        assert len(set(notes.ids.tolist())) <= threads
        return len(set(notes.ids.tolist())) == threads and teams.own_thread() in notes.ids

    for _ in range(3):
        sooner_or_later(all_in_one)
    assert started() >= threads - 1


@pytest.mark.usefixtures("always")
def test_workers_begin_with_the_same_items_each_time(teams) -> None:
    """The caller has the first, so that its processor meets the same memory at each step.

    If the system keeps it from them for long, a helper may take them, but only when it has done all of its own.
    """
    own = teams.own_thread()

    def begins_with_its_own() -> bool:
        notes = Notes(16)
        notes.work(teams, 2, pause_us=200)
        assert notes.ids[0] == own or (notes.ids[8:] == notes.ids[0]).all()
        return notes.ids[0] == own

    for _ in range(20):
        sooner_or_later(begins_with_its_own)


MAX_HELPERS = 63


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("state", ["flush", "down", "up", "zero"])
def test_helpers_have_the_standard_floating_point_state(teams, state: str) -> None:
    """Helpers that are started from a thread with another state, too; the caller keeps its own."""
    clean, others = fp_state.STATES["clean"] & fp_state.MACHINE["control"], min(started() + 2, MAX_HELPERS)
    before, own, seen = fp_state.control(), teams.own_thread(), set()
    control = np.uint64(fp_state.MACHINE["control"])

    def all_were_seen() -> bool:
        notes = Notes(8 * (others + 1))
        notes.work(teams, others + 1, pause_us=2000)
        seen.update(zip(notes.ids.tolist(), (notes.states & control).tolist(), strict=True))
        return len({thread for thread, _ in seen}) == others + 1

    try:
        expected = fp_state.enter(state)
        sooner_or_later(all_were_seen)
        after = fp_state.control()
    finally:
        fp_state.enter("clean")
    assert before == clean
    assert after == expected
    assert started() >= others
    assert {found for thread, found in seen if thread == own} == {expected}
    assert {found for thread, found in seen if thread != own} == {clean}


@pytest.mark.usefixtures("always")
def test_callers_at_the_same_time_get_one_team_and_the_others_none(teams) -> None:
    counts = {True: 0, False: 0}
    failures = []

    def call(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(1500):
                notes = Notes(int(rng.integers(1, 40)))
                opened = notes.work(teams, int(rng.integers(2, 6)), int(rng.integers(1, 4)))
                assert notes.each_done(int(opened))
                counts[opened] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert counts[True] > 0


@pytest.mark.usefixtures("always")
def test_an_open_team_refuses_others_until_it_is_closed(teams) -> None:
    over = np.zeros(1, np.int64)
    holder = threading.Thread(target=teams.occupy, args=(2, over))
    holder.start()
    sooner_or_later(lambda: over[0] == 1)
    try:
        notes = Notes(5)
        assert not notes.work(teams, 2)
        assert notes.each_done(0)
        assert not teams.opens(2, 1e6)
    finally:
        over[0] = 2
        holder.join()
    assert teams.opens(2, 1e6)


def test_rule_measured_leaves_small_work_and_one_thread_alone(teams) -> None:
    assert configure()[0] == "measured"
    for threads, work_us in [(1, 1e6), (0, 1e6), (-3, 1e6), (2, 5.0), (2, 0.0), (2, -1.0), (2, float("nan"))]:
        assert not any(teams.opens(threads, work_us) for _ in range(10)), (threads, work_us)


def test_rule_never_means_never(teams) -> None:
    former = configure("never")
    try:
        assert not any(teams.opens(8, 1e9) for _ in range(10))
    finally:
        configure(*former)


def test_configure_returns_what_was_and_refuses_nonsense() -> None:
    former = configure()
    assert configure("always", 7.5) == former
    assert configure(*former) == ("always", 7.5)
    with pytest.raises(ValueError, match="rule_name must be one of measured, always, never, got 'often'"):
        configure("often")
    for spin_us in (-1, 1e7, float("nan")):
        with pytest.raises(ValueError, match=r"spin_us must be in \[0, 1e6\], got"):
            configure(spin_us=spin_us)
    assert configure() == former


# ------------------------------------------------------------------ processes of their own

PRELUDE = """
    import os, sys, threading, time
    import numpy as np
    from cylora.kernels.threads import configure, started
    import teams

    def work(threads=3, items=33, pause_us=0, **options):
        first, second, ids = (np.zeros(items, np.int64) for _ in range(3))
        states = np.zeros(items, np.uint64)
        opened, wrong = teams.work(threads, 1e6, 1, first, second, ids, states, pause_us, **options)
        assert not wrong and (first == opened).all() and (second == opened).all()
        return opened, len(set(ids.tolist()))

    def tasks():
        return len(os.listdir("/proc/self/task"))

    def sooner_or_later(come_true):
        end = time.monotonic() + 60
        while not come_true():
            assert time.monotonic() < end
"""


def in_a_process(folder: Path, program: str, timeout: float = 300, **environment: str) -> str:
    """Run a program that can import teams; return what it prints."""
    paths = [str(folder), str(TESTS), str(Path(cylora.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True, text=True, check=False, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@LINUX
def test_nothing_starts_before_the_first_team(folder) -> None:
    program = """
        before = tasks()
        assert started() == 0
        configure("never"); assert not teams.opens(4, 1e6)
        configure("measured"); assert not teams.opens(4, 1.0) and not teams.opens(1, 1e6)
        assert started() == 0 and tasks() == before
        configure("always")
        for threads, expected in [(3, 2), (2, 2), (5, 4), (1000, 63)]:
            assert teams.opens(threads, 1.0) and started() == expected and tasks() == before + expected
    """
    in_a_process(folder, program)


@LINUX
def test_helpers_leave_signals_to_the_main_thread(folder) -> None:
    """All but those that tell of a crash in the thread itself."""
    program = """
        import signal
        before, mask = set(os.listdir("/proc/self/task")), signal.pthread_sigmask(signal.SIG_BLOCK, [])
        configure("always")
        # Until they have come to life, the system blocks every signal.
        sooner_or_later(lambda: work(3, 24, 1000) == (True, 3))
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
        own = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGKILL, signal.SIGSTOP}
        for task in set(os.listdir("/proc/self/task")) - before:
            (line,) = (line for line in open(f"/proc/self/task/{task}/status") if line.startswith("SigBlk"))
            blocked = int(line.split()[1], 16)
            for number in signal.valid_signals():
                assert bool(blocked >> (number - 1) & 1) == (number not in own), number
    """
    in_a_process(folder, program)


@LINUX
def test_threads_that_cannot_be_started_are_done_without(folder) -> None:
    program = """
        import resource
        configure("always")
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + 65536, limits[1]))
        assert not teams.opens(4, 1e6) and started() == 0
        resource.setrlimit(resource.RLIMIT_AS, limits)
        assert work()[0] and started() == 2
    """
    in_a_process(folder, program)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot confine the process")
def test_rule_measured_works_alone_on_one_processor(folder) -> None:
    program = """
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        assert not any(teams.opens(8, 1e6) for _ in range(10)) and started() == 0
    """
    in_a_process(folder, program)


@pytest.mark.skipif(PROCESSORS < 2, reason="needs two processors")
def test_rule_measured_shares_what_is_worth_it(folder) -> None:
    """Large work always; small work when steps follow one another closely, so that helpers are awake."""
    program = """
        def in_a_row():
            time.sleep(0.05)
            return [teams.opens(2, 40.0) for _ in range(8)][-1]

        def not_after_a_pause():
            time.sleep(0.05)
            return not teams.opens(2, 40.0)

        assert teams.opens(2, 1000.0) and started() == 1
        for _ in range(3):
            sooner_or_later(in_a_row)
            sooner_or_later(not_after_a_pause)
            assert teams.opens(2, 1000.0)
        assert started() == 1  # a second would have too little to do
    """
    in_a_process(folder, program)


@pytest.mark.skipif(PROCESSORS < 2, reason="needs two processors")
def test_rule_measured_rests_after_a_loss_and_tries_again(folder) -> None:
    """A helper that is kept from its work for 100 ms costs those 100 ms; then nothing is shared for a second.

    On a busy machine there are other losses, and the caller may lose less because it was kept from its work too.
    """
    program = """
        def rests_for_a_second():
            begun = time.monotonic()
            if work(2, 8, 1000, helper_pause_us=100_000) != (True, 2):
                time.sleep(0.01)  # it rests already, or the helper came too late
                return False
            while not teams.opens(2, 1e6):
                time.sleep(0.01)
            return 1 < time.monotonic() - begun < 5

        sooner_or_later(rests_for_a_second)
    """
    in_a_process(folder, program)


@pytest.mark.skipif(PROCESSORS < 2, reason="needs two processors")
def test_rule_measured_goes_by_what_work_reports(folder) -> None:
    """A helper that takes 6 ms longer than its caller, for as much, is a gain; one that has done nothing is a loss."""
    program = """
        def rests(**options):
            if work(2, 2, 30_000, helper_pause_us=6_000, **options) != (True, 2):
                time.sleep(0.01)
                return None
            return not teams.opens(2, 1e6)

        sooner_or_later(lambda: rests() is False)
        sooner_or_later(lambda: rests(reports=True) is True)
        sooner_or_later(lambda: rests() is False)
    """
    in_a_process(folder, program)


FORKS = """
    def child_of(check):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                check()
                code = 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                os._exit(code)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert status == 0, status
                return
            time.sleep(0.0005)
        os.kill(child, 9)
        raise SystemExit("the child hangs")

    def all_take_part():  # at once, or on a busy machine sooner or later
        sooner_or_later(lambda: work(3, 24, 1000) == (True, 3))

    def check():
        assert started() == 0
        assert work()[0]
        all_take_part()
        assert started() == 2
"""


def test_forked_child_starts_its_own_helpers(folder) -> None:
    """100 children, forked while helpers spin or sleep; some fork again."""
    program = """
        configure("always")
        for i in range(100):
            work()
            if i % 3 == 0:
                time.sleep(0.001)
            child_of((lambda: (check(), child_of(check))) if i % 10 == 0 else check)
            assert work()[0] and started() == 2
        all_take_part()
    """
    in_a_process(folder, textwrap.dedent(FORKS) + textwrap.dedent(program), timeout=900)


def test_forked_child_of_a_process_in_the_middle_of_a_team_has_a_free_pool(folder) -> None:
    program = """
        configure("always")
        stop = threading.Event()
        def steps():
            while not stop.is_set():
                assert work(3, 33, 100)[0]
        thread = threading.Thread(target=steps)
        thread.start()
        try:
            for i in range(100):
                child_of(check)
        finally:
            stop.set()
            thread.join()
        assert work()[0]
    """
    in_a_process(folder, textwrap.dedent(FORKS) + textwrap.dedent(program), timeout=900)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="holds up the pthread_atfork of glibc")
def test_forked_child_of_a_process_that_is_opening_its_first_team_has_a_free_pool(folder) -> None:
    """What frees the pool in children is registered by then: a fork that has begun runs nothing registered later."""
    program = """
        import ctypes
        hold, entered = (ctypes.c_int.in_dll(ctypes.CDLL(None), name) for name in ("hold", "entered"))
        configure("always")
        hold.value = 1
        thread = threading.Thread(target=work)
        thread.start()
        sooner_or_later(lambda: entered.value or started() == 2)
        child_of(check)
        thread.join()
        assert not entered.value
        all_take_part()
        child_of(check)
    """
    (library,) = folder.glob("held_atfork.*.so")
    in_a_process(folder, textwrap.dedent(FORKS) + textwrap.dedent(program), LD_PRELOAD=str(library))


@pytest.mark.parametrize("end", ["return", "sys.exit(0)", "os._exit(0)", "os.kill(os.getpid(), 15)"])
@pytest.mark.parametrize("state", ["spinning", "sleeping", "working"])
def test_process_ends_whatever_its_helpers_do(folder, end: str, state: str) -> None:
    program = f"""
        import signal
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        configure("always", 1e6 if {state!r} == "spinning" else 10)
        work(5, 64)
        def steps():
            while True:
                work(5, 64, 50)
        if {state!r} == "working":
            threading.Thread(target=steps, daemon=True).start()
        time.sleep(0.02)
        def main():
            {end}
        main()
    """
    for _ in range(3):
        in_a_process(folder, program)
