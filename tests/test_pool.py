"""The pool of threads, through a foreign module that cimports it: what is shared is done once, in order, by all.

What forks, exits or limits itself runs in a process of its own.
"""

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
import threading
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
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


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
    """Each piece sleeps, so that even one processor gets round to everybody."""
    configure(spin_us=spin_us)
    for _ in range(3):
        notes = Notes(8 * threads)
        assert notes.work(teams, threads, pause_us=2000)
        assert notes.each_done(1)
        assert len(set(notes.ids.tolist())) == threads
        assert teams.own_thread() in notes.ids
    assert started() >= threads - 1


@pytest.mark.usefixtures("always")
def test_workers_begin_with_the_same_items_each_time(teams) -> None:
    """The caller has the first, so that its processor meets the same memory at each step."""
    for _ in range(20):
        notes = Notes(16)
        notes.work(teams, 2, pause_us=200)
        assert notes.ids[0] == teams.own_thread()


MAX_HELPERS = 63


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("state", ["flush", "down", "up", "zero"])
def test_helpers_have_the_standard_floating_point_state(teams, state: str) -> None:
    """Helpers that are started from a thread with another state, too; the caller keeps its own."""
    clean, others = fp_state.STATES["clean"] & fp_state.MACHINE["control"], min(started() + 2, MAX_HELPERS)
    before = fp_state.control()
    try:
        expected = fp_state.enter(state)
        notes = Notes(8 * (others + 1))
        notes.work(teams, others + 1, pause_us=2000)
        after = fp_state.control()
    finally:
        fp_state.enter("clean")
    assert before == clean
    assert after == expected
    assert started() >= others
    own = notes.ids == teams.own_thread()
    states = notes.states & np.uint64(fp_state.MACHINE["control"])
    assert set(states[own].tolist()) == {expected}
    assert set(states[~own].tolist()) == {clean}


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
    holder = threading.Thread(target=teams.occupy, args=(2, 300_000))
    holder.start()
    while teams.opens(2, 1e6):
        pass
    notes = Notes(5)
    assert not notes.work(teams, 2)
    assert notes.each_done(0)
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
"""


def in_a_process(folder: Path, program: str, *arguments: object, timeout: float = 60) -> str:
    """Run a program that can import teams; return what it prints."""
    paths = [str(folder), str(TESTS), str(Path(cylora.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(program),
         *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
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
        assert any(work(3, 24, 1000) == (True, 3) for _ in range(50))
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
        assert teams.opens(2, 1000.0) and started() == 1
        time.sleep(0.05)
        assert [teams.opens(2, 40.0) for _ in range(8)][-1]
        time.sleep(0.05)
        assert not teams.opens(2, 40.0)
        assert teams.opens(2, 1000.0)
        assert started() == 1  # a second would have too little to do
    """
    in_a_process(folder, program)


@pytest.mark.skipif(PROCESSORS < 2, reason="needs two processors")
def test_rule_measured_rests_after_a_loss_and_tries_again(folder) -> None:
    """A helper that is kept from its work for 50 ms costs those 50 ms; then nothing is shared for a second."""
    program = """
        begun = time.monotonic()
        while time.monotonic() < begun + 0.05:  # until a helper has joined
            begun = time.monotonic()
            assert work(2, 8, 1000, helper_pause_us=50_000)[0]
        lost = time.monotonic()
        opened = False
        while not opened and time.monotonic() < lost + 10:
            time.sleep(0.01)
            opened = teams.opens(2, 1e6)
        assert opened and 0.8 < time.monotonic() - lost < 5, time.monotonic() - lost
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
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert status == 0, status
                return
            time.sleep(0.0005)
        os.kill(child, 9)
        raise SystemExit("the child hangs")

    def all_take_part():  # at once, or on a busy machine sooner or later
        end = time.monotonic() + 10
        while work(3, 24, 1000) != (True, 3):
            if time.monotonic() > end:
                return False
        return True

    def check():
        assert started() == 0
        assert work()[0]
        assert all_take_part()
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
        assert all_take_part()
    """
    in_a_process(folder, textwrap.dedent(FORKS) + textwrap.dedent(program), timeout=120)


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
    in_a_process(folder, textwrap.dedent(FORKS) + textwrap.dedent(program), timeout=120)


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
        in_a_process(folder, program, timeout=30)
