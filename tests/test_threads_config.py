"""`threads`: the same bits for any number, at any size, in any rhythm; forks, exits and second threads do no harm."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_fork import in_child
from test_threads import in_a_process, run_threads, whole
from training import fingerprint, make_trainer, same_bits

from cylora import Adam, AdapterSet, LoraConfig, LoraTrainer, NonFiniteGradientError, TrainerBusyError
from cylora.formats.checkpoint import save_checkpoint
from cylora.kernels.threads import configure, started

WORKER = Path(__file__).parent / "worker_processes.py"
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

BLOCK = 8192
# Around one block and two, where the GIL is let go, and around 12 us and 100 us of work, where sharing begins to pay.
SIZES = (BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1, 31_000, 32_000, 65_537, 262_000, 264_000)


@pytest.fixture(params=["measured", "always"])
def rule(request: pytest.FixtureRequest) -> Iterator[str]:
    former, _ = configure(rule_name=request.param)
    yield request.param
    configure(rule_name=former)


@pytest.fixture
def shared() -> Iterator[None]:
    former, _ = configure(rule_name="always")
    yield
    configure(rule_name=former)


def gradient(size: int, step: int) -> np.ndarray:
    """Return another gradient for each step without drawing one anew, which would take longer than the step."""
    values = np.random.default_rng(0).normal(size=size + 64).astype(np.float32)
    return values[step % 64 : step % 64 + size].copy()


def adam(size: int, threads: int, **settings: Any) -> tuple[Adam, np.ndarray]:
    p = np.random.default_rng(1).normal(size=size).astype(np.float32)
    return Adam(p, threads=threads, max_grad_norm=1.0, weight_decay=0.01, **settings), p


def marks(optimizer: Adam, p: np.ndarray) -> list[bytes]:
    return [p.tobytes(), optimizer.m.tobytes(), optimizer.v.tobytes()]


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("size", SIZES)
def test_bits_do_not_depend_on_threads_at_any_size(size: int, state_dtype: str, rule: str) -> None:
    """A hot loop, then steps with pauses in which helpers fall asleep, then a hot loop again."""
    alone, *several = (adam(size, threads, state_dtype=state_dtype) for threads in (1, 2, 4, 16))
    gradients = [gradient(size, step) for step in range(4)]
    for step in range(24):
        norm = alone[0].step(gradients[step % 4])
        for one, _ in several:
            if 8 <= step < 12:
                time.sleep(0.002)
            assert one.step(gradients[step % 4]) == norm
    for one in several:
        assert marks(*one) == marks(*alone)


def test_a_refused_gradient_is_found_by_whichever_thread(shared: None) -> None:
    """The message names the first element that is not finite, and nothing has changed."""
    size = 10 * BLOCK + 5
    (one, p), places = adam(size, 4), (0, BLOCK - 1, BLOCK, 5 * BLOCK + 3, size - 1)
    one.step(gradient(size, 0))
    before = marks(one, p)
    for place in places:
        for later in (place, size - 1):
            g = gradient(size, 1)
            g[later], g[place] = np.inf, np.nan
            with pytest.raises(NonFiniteGradientError, match=rf"must be finite, got nan at \[{place}\]"):
                one.step(g)
    assert marks(one, p) == before


def test_several_python_threads_share_what_helpers_there_are(rule: str) -> None:
    """One of them gets the helpers, the others do without; each has a trainer of its own size."""
    sizes = (40_000, 65_537, 100_000, 270_000)
    together = [adam(size, threads) for size, threads in zip(sizes, (2, 4, 16, 3), strict=True)]

    def work(one: Adam, size: int) -> Callable[[], None]:
        gradients = [gradient(size, step) for step in range(4)]

        def steps() -> None:
            for step in range(60):
                one.step(gradients[step % 4])

        return steps

    run_threads(*(work(one, size) for (one, _), size in zip(together, sizes, strict=True)))
    for (one, p), size in zip(together, sizes, strict=True):
        alone = adam(size, 1)
        work(alone[0], size)()
        assert marks(one, p) == marks(*alone)


# ---------------------------------------------------------------------- what starts threads


STARTS = """
    import os, sys
    import numpy as np
    import cylora
    from cylora.kernels.threads import configure, started
    assert started() == 0
    if len(sys.argv) > 3:
        os.environ["CYLORA_NUM_THREADS"] = sys.argv[3]
    configure(rule_name=sys.argv[2])
    how = int(sys.argv[1]) or None
    adapter = cylora.LoraAdapter(8192, 64, cylora.LoraConfig(rank=16), seed=0)
    trainer = cylora.LoraTrainer(cylora.LoraTrainingConfig(threads=how))
    assert started() == 0
    trainer.step(1.0, adapter, np.ones(adapter.param_count(), np.float32))
    print(started())
"""


@pytest.mark.parametrize(
    ("arguments", "helpers"),
    [
        ((0, "always"), 0),
        ((1, "always"), 0),
        ((2, "always"), 1),
        ((4, "always"), 3),
        ((4, "never"), 0),
        ((0, "always", "3"), 2),
        ((2, "always", "5"), 1),
    ],
)
def test_only_the_first_step_with_threads_starts_helpers(arguments: tuple, helpers: int) -> None:
    assert int(in_a_process(STARTS, *arguments)) == helpers


@pytest.mark.parametrize("threads", ["0", "65", "x", "2.0", "-1"])
def test_a_wrong_environment_is_named_when_a_trainer_needs_it(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CYLORA_NUM_THREADS", threads)
    with pytest.raises(ValueError, match=f"CYLORA_NUM_THREADS must be an integer in 1..64, got '{threads}'"):
        Adam(np.zeros(4, np.float32))
    Adam(np.zeros(4, np.float32), threads=1).step(np.ones(4, np.float32))


# ---------------------------------------------------------------------- forks and exits


def trained(threads: int, size: int = 4096) -> tuple[LoraTrainer, AdapterSet, np.ndarray]:
    adapters = AdapterSet({"layer": (size, size)}, LoraConfig(rank=8), seed=0)
    trainer = make_trainer(threads=threads)
    g = gradient(adapters.param_count(), 0)
    trainer.step(1.0, adapters, g)
    return trainer, adapters, g


def check_forks(forks: int, folder: Path) -> None:
    """The child has no helper: it starts its own, steps, saves and exits. The parent's go on, to the same file."""
    (trainer, adapters, g), (other, twins, _) = trained(4), trained(1)
    mine, theirs = folder / "parent", folder / "child"
    for number in range(forks):
        other.step(1.0, twins, g)
        expected = fingerprint(other, twins)

        def child(expected: str = expected) -> None:
            assert started() == 0
            trainer.step(1.0, adapters, g)
            assert started() == 3
            assert fingerprint(trainer, adapters) == expected
            save_checkpoint(trainer, adapters, theirs)

        assert in_child(child) == 0, number
        trainer.step(1.0, adapters, g)
        assert fingerprint(trainer, adapters) == expected
        save_checkpoint(trainer, adapters, mine)
        assert mine.read_bytes() == theirs.read_bytes()
        theirs.unlink()


@pytest.mark.parametrize("forks", [100, pytest.param(1000, marks=pytest.mark.nightly)])
def test_children_forked_between_steps_go_on_to_the_same_bits(
    shared: None, forks: int, tmp_path: Path, figures: Callable[..., None]
) -> None:
    check_forks(forks, tmp_path)
    figures(forks=forks, hangs=0)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("spawn", 2),
        ("forkserver", 10),
        pytest.param("spawn", 1000, marks=pytest.mark.nightly),
        pytest.param("forkserver", 1000, marks=pytest.mark.nightly),
    ],
)
def test_children_that_multiprocessing_starts_go_on_to_the_same_bits(
    method: str, count: int, tmp_path: Path, figures: Callable[..., None]
) -> None:
    done = subprocess.run(
        [sys.executable, WORKER, method, str(count), tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == count
    figures(method=method, children=count, hangs=0)


def test_children_forked_while_another_thread_shares_a_step_step_trainers_of_their_own(shared: None) -> None:
    """The fork meets the pool in any state, with a team open that the child has not."""
    (busy, adapters, g), (idle, twins, _) = trained(4), trained(4, 1024)
    (other, others, h) = trained(1, 1024)
    other.step(1.0, others, h)
    expected, stop = fingerprint(other, others), threading.Event()

    def steps() -> None:
        while not stop.is_set():
            busy.step(1.0, adapters, g)

    def child() -> None:
        idle.step(1.0, twins, h)
        assert fingerprint(idle, twins) == expected

    thread = threading.Thread(target=steps)
    thread.start()
    try:
        outcomes = [in_child(child) for _ in range(50)]
    finally:
        stop.set()
        thread.join()
    assert outcomes == [0] * 50
    child()


EXIT = """
    import os, sys, threading, time
    import numpy as np
    import cylora
    from cylora.kernels.threads import configure

    how, delay = sys.argv[1], float(sys.argv[2])
    configure(rule_name="always")
    adapters = [cylora.LoraAdapter(4096, 4096, cylora.LoraConfig(rank=16), seed=i) for i in range(2)]
    trainers = [cylora.LoraTrainer(cylora.LoraTrainingConfig(threads=4)) for _ in range(2)]
    g = np.ones(adapters[0].param_count(), np.float32)
    begun = threading.Event()

    def steps(i):
        while True:
            if i:
                cylora.step_many([(trainers[i], 1.0, adapters[i], g)], threads=2)
            else:
                trainers[i].step(1.0, adapters[i], g)
            begun.set()

    for i in range(2):
        threading.Thread(target=steps, args=(i,), daemon=True).start()
    begun.wait()
    time.sleep(delay)
    if how == "exit":
        sys.exit(0)
    if how == "exec":
        os.execv(sys.executable, [sys.executable, "-c", "pass"])
    if how == "_exit":
        os._exit(0)
"""


@pytest.mark.parametrize("how", ["exit", "end", "exec", "_exit"])
def test_a_process_may_end_while_daemon_threads_step(how: str) -> None:
    for number in range(3):
        in_a_process(EXIT, how, number * 0.0007)


@pytest.mark.nightly
@pytest.mark.parametrize("how", ["exit", "end"])
def test_three_hundred_processes_end_while_daemon_threads_step(how: str) -> None:
    for number in range(150):
        in_a_process(EXIT, how, number % 50 * 0.0002)


# ---------------------------------------------------------------------- two threads on one trainer


@pytest.mark.parametrize("threads", [2, 4])
def test_python_threads_on_one_trainer_with_threads_take_turns_or_are_refused(threads: int, shared: None) -> None:
    """Gradients are equal, so the parameters follow from the number of steps; large enough to let go of the GIL."""
    adapters = AdapterSet({"layer": (1500, 1500)}, LoraConfig(rank=8), seed=0)
    trainer, g = make_trainer(threads=threads), gradient(adapters.param_count(), 0)
    counts = [{"done": 0, "busy": 0} for _ in range(3)]

    def tries(mine: dict[str, int]) -> Callable[[], None]:
        def work() -> None:
            while sum(mine.values()) < 1500 or (not any(c["busy"] for c in counts) and sum(mine.values()) < 50_000):
                try:
                    trainer.step(1.0, adapters, g)
                    mine["done"] += 1
                except TrainerBusyError:
                    mine["busy"] += 1

        return work

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        run_threads(*map(tries, counts))
    finally:
        sys.setswitchinterval(interval)
    whole(trainer, adapters)
    done = sum(mine["done"] for mine in counts)
    assert done == trainer.total_steps()
    assert sum(mine["busy"] for mine in counts) > 0
    twins, other = AdapterSet({"layer": (1500, 1500)}, LoraConfig(rank=8), seed=0), make_trainer(threads=1)
    for _ in range(done):
        other.step(1.0, twins, g)
    assert fingerprint(trainer, adapters) == fingerprint(other, twins)


def test_a_schedule_that_steps_another_trainer_finds_helpers_free(shared: None) -> None:
    """Schedules run before a team is opened; what one of them shares does not mix with the step around it."""
    (inner, inners, g), (alone, alones, _) = trained(4, 512), trained(1, 512)

    def rate(step: int) -> float:
        inner.step(1.0, inners, g)
        with contextlib.suppress(TrainerBusyError):
            outer.step(1.0, adapters, h)
        return 1e-3

    adapters = AdapterSet({"layer": (700, 700)}, LoraConfig(rank=8), seed=1)
    twins = AdapterSet({"layer": (700, 700)}, LoraConfig(rank=8), seed=1)
    h = gradient(adapters.param_count(), 3)
    outer, other = make_trainer(threads=4, schedule=rate), make_trainer(threads=1, schedule=lambda step: 1e-3)
    for _ in range(20):
        outer.step(1.0, adapters, h)
        other.step(1.0, twins, h)
        alone.step(1.0, alones, g)
    assert fingerprint(outer, adapters) == fingerprint(other, twins)
    assert same_bits(inners.flat.vector, alones.flat.vector)
    assert inner.total_steps() == 21
