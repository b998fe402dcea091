"""One trainer, several threads; signals; buffers that shrink under a step: an orderly result or a clear error.

What could crash an interpreter, and what sends signals, runs in a process of its own.
"""

import contextlib
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from training import fingerprint, make_adapter, make_pair, make_trainer, same_bits

from cylora import (
    AdapterSet,
    Gradients,
    InputError,
    LoraConfig,
    LoraTrainer,
    StateError,
    TrainerBusyError,
    TrainingStep,
)

TESTS = Path(__file__).parent
PATIENCE = 120  # seconds in which threads meet even on a loaded machine


@pytest.fixture
def impatient():
    """Let threads take turns as often as the interpreter allows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def run_threads(*works) -> None:
    """Run functions at the same time; the first exception of any is this one's."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(works))

    def guarded(work) -> None:
        try:
            start.wait()
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def yielding(step: int) -> float:
    """A schedule whose Python code gives other threads their chance in the middle of a step."""
    time.sleep(0)
    return 1e-3


def whole(trainer: LoraTrainer, adapter) -> None:
    """Assert that the records, the counters and the moments tell the same number of steps."""
    history = trainer.training_history
    assert trainer.total_steps() == len(history) == trainer._adam.t == history[-1].step + 1
    assert history.column("step").tolist() == list(range(len(history)))
    assert not trainer._adam.busy


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("threads", [2, 4])
def test_threads_stepping_one_trainer_take_turns_or_are_refused(threads: int) -> None:
    """10,000 tries, more if none has met another. All gradients are equal, so whatever the order, the parameters follow
    from the number of steps.
    """
    adapter, trainer, pair = make_adapter(), make_trainer(schedule=yielding), make_pair()
    done, busy = [0] * threads, [0] * threads

    def work(me: int):
        def tries() -> None:
            end = time.monotonic() + PATIENCE
            while done[me] + busy[me] < 10_000 // threads or (not any(busy) and time.monotonic() < end):
                try:
                    trainer.step(1.0, adapter, *pair)
                    done[me] += 1
                except TrainerBusyError:
                    busy[me] += 1

        return tries

    run_threads(*map(work, range(threads)))
    whole(trainer, adapter)
    assert sum(done) == trainer.total_steps()
    assert sum(done) + sum(busy) >= 10_000
    assert sum(done) > 0
    assert sum(busy) > 0
    twin, other = make_adapter(), make_trainer(schedule=yielding)
    for _ in range(sum(done)):
        other.step(1.0, twin, *pair)
    assert fingerprint(trainer, adapter) == fingerprint(other, twin)


@pytest.mark.usefixtures("impatient")
def test_threads_in_large_steps_meet_a_busy_trainer() -> None:
    """While the kernel computes without the GIL, a second step must be refused, not run into the first."""
    adapters = AdapterSet({"wide": (4000, 4000)}, LoraConfig(rank=16), seed=0)
    gradients, trainer = Gradients(adapters), make_trainer()
    gradients.vector[...] = 1
    counts = {"done": 0, "busy": 0}

    def tries() -> None:
        end = time.monotonic() + PATIENCE
        while sum(counts.values()) < 600 or (counts["busy"] == 0 and time.monotonic() < end):
            try:
                trainer.step(1.0, adapters, gradients)
                counts["done"] += 1
            except TrainerBusyError:
                counts["busy"] += 1

    run_threads(tries, tries, tries)
    whole(trainer, adapters)
    assert counts["busy"] > 0


@pytest.mark.usefixtures("impatient")
def test_micro_batches_of_two_threads_are_all_there_or_refused() -> None:
    """Each trial starts without the buffer. Losses are 1, so a lost or doubled micro-batch shows in the sums."""
    for trial in range(300):
        adapter, trainer = make_adapter(), make_trainer()
        ones = np.ones(33, np.float32)
        added: list[int] = []

        def tries(trainer=trainer, adapter=adapter, added=added, ones=ones) -> None:
            for _ in range(10):
                try:
                    trainer.accumulate(1.0, adapter, ones)
                    added.append(1)
                except TrainerBusyError:
                    pass

        run_threads(tries, tries)
        state = trainer.state_dict()["accumulated"]
        assert (state["count"], state["loss"], state["weight"]) == (len(added),) * 3, trial
        assert set(state["gradient"].tolist()) == {float(len(added))}, trial


@pytest.mark.usefixtures("impatient")
def test_steps_micro_batches_and_discards_do_not_mix() -> None:
    """A step never uses the sum of micro-batches twice, nor a weight that is not theirs.

    Gradients are all ones, so the norm of a mean is that of one gradient, whatever was added.
    """
    adapter, trainer = make_adapter(), make_trainer()
    ones = np.ones(33, np.float32)
    norm = trainer.step(1.0, adapter, ones).grad_norm
    refusals: set[str] = set()

    def accumulate() -> None:
        for i in range(3000):
            try:
                trainer.accumulate(1.0, adapter, ones, weight=1.0 + i % 3)
                if i % 3 == 0:
                    trainer.step_accumulated()
            except TrainerBusyError:
                pass
            except StateError as error:  # the other thread was faster
                refusals.add(str(error))

    def interfere() -> None:
        for i in range(3000):
            try:
                if i % 3 == 0:
                    trainer.discard_accumulated()
                elif i % 3 == 1:
                    trainer.step_accumulated()
                else:
                    trainer.step(1.0, adapter, ones)
            except TrainerBusyError:
                pass
            except StateError as error:
                refusals.add(str(error))

    run_threads(accumulate, interfere)
    assert all("got none" in message or "micro-batches wait" in message for message in refusals)
    whole(trainer, adapter)
    norms = trainer.training_history.column("grad_norm")
    np.testing.assert_allclose(norms, norm, rtol=1e-6)
    np.testing.assert_allclose(trainer.training_history.column("loss"), 1.0, rtol=1e-12)


@pytest.mark.usefixtures("impatient")
def test_states_taken_by_another_thread_are_whole() -> None:
    """Equal gradients: after n steps m is 1 - 0.9^n everywhere, so moments of different steps in a state would show."""
    adapters = AdapterSet({"wide": (1000, 1000)}, LoraConfig(rank=16), seed=0)
    ones, trainer = np.ones(adapters.param_count(), np.float32), make_trainer()
    trainer.step(1.0, adapters, ones)
    states: list[dict] = []
    finished = threading.Event()

    def train() -> None:
        try:
            end = time.monotonic() + PATIENCE
            while len(states) < 50 and time.monotonic() < end:
                with contextlib.suppress(TrainerBusyError):
                    trainer.step(1.0, adapters, ones)
                time.sleep(0)
        finally:
            finished.set()

    def save() -> None:
        while not finished.is_set():
            try:
                state = trainer.state_dict()
            except TrainerBusyError:
                continue
            states.append({"m": set(state["adam"]["m"].tolist()), "v": set(state["adam"]["v"].tolist()),
                           "t": state["adam"]["t"], "n": state["history"]["total_steps"]})  # fmt: skip

    run_threads(train, save)
    assert len(states) >= 50
    for state in states:
        assert len(state["m"]) == len(state["v"]) == 1
        assert state["t"] == state["n"]


@pytest.mark.usefixtures("impatient")
def test_loading_while_another_thread_steps_leaves_one_or_the_other() -> None:
    adapter, trainer, pair = make_adapter(), make_trainer(), make_pair()
    trainer.step(1.0, adapter, *pair)
    state = trainer.state_dict()
    stop = threading.Event()
    counts = {"loads": 0, "steps": 0}

    def load() -> None:
        try:
            end = time.monotonic() + PATIENCE
            while min(counts.values()) < 1500 and time.monotonic() < end:
                with contextlib.suppress(TrainerBusyError):
                    trainer.load_state_dict(state)
                    counts["loads"] += 1
        finally:
            stop.set()

    def step() -> None:
        while not stop.is_set():
            try:
                trainer.step(1.0, adapter, *pair)
                counts["steps"] += 1
            except TrainerBusyError:
                pass

    run_threads(load, step)
    whole(trainer, adapter)
    assert min(counts.values()) >= 1500
    # All gradients are equal: the moments follow from the number of steps since the last load.
    twin, other = make_adapter(), make_trainer()
    for _ in range(trainer.total_steps()):
        other.step(1.0, twin, *pair)
    assert same_bits(trainer._adam.m, other._adam.m)
    assert same_bits(trainer._adam.v, other._adam.v)


@pytest.mark.usefixtures("impatient")
def test_first_steps_of_two_threads_bind_one_adapter() -> None:
    for _ in range(200):
        trainer, adapters, outcome = make_trainer(), [make_adapter(0), make_adapter(1)], []

        def first(adapter, trainer=trainer, outcome=outcome):
            def attempt() -> None:
                try:
                    trainer.step(1.0, adapter, *make_pair())
                    outcome.append(adapter)
                except (StateError, TrainerBusyError):
                    pass

            return attempt

        run_threads(*map(first, adapters))
        assert outcome
        assert all(one is trainer._adapters for one in outcome)
        whole(trainer, trainer._adapters)
        unused = [i for i in range(2) if adapters[i] is not trainer._adapters]
        assert same_bits(adapters[unused[0]].flat.vector, make_adapter(unused[0]).flat.vector)


def test_a_step_inside_a_step_is_refused_ten_thousand_times() -> None:
    adapter, pair, refused = make_adapter(), make_pair(), []

    def rate(step: int) -> float:
        with pytest.raises(
            TrainerBusyError, match="a step is under way in another thread or further up this call stack"
        ):
            trainer.step(1.0, adapter, *pair)
        refused.append(step)
        return 1e-3

    trainer = make_trainer(schedule=rate)
    for _ in range(10_000):
        trainer.step(1.0, adapter, *pair)
    assert refused == list(range(10_000))
    whole(trainer, adapter)


def test_a_step_inside_on_step_is_refused_ten_thousand_times() -> None:
    adapter, pair, refused = make_adapter(), make_pair(), []

    def report(record: TrainingStep) -> None:
        for call in (trainer.step, trainer.accumulate):
            with pytest.raises(TrainerBusyError, match="on_step may read it, but not step it"):
                call(1.0, adapter, *pair)
        refused.append(record.step)

    trainer = LoraTrainer(make_trainer(log_every=1).config, on_step=report)
    for _ in range(10_000):
        trainer.step(1.0, adapter, *pair)
    assert refused == list(range(10_000))
    whole(trainer, adapter)
    twin, other = make_adapter(), make_trainer(log_every=1)
    for _ in range(10_000):
        other.step(1.0, twin, *pair)
    assert fingerprint(trainer.state_dict(), adapter) == fingerprint(other.state_dict(), twin)


def in_a_process(program: str, *arguments: object, timeout: float = 300) -> str:
    """Run a program that can import the tests' helpers; return what it printed."""
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n" + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


RESIZING = """
    import array, mmap, random, sys, threading
    import numpy as np
    from cylora import Adam, InputError, TrainerBusyError, clip_grad_norm_, grad_norm
    from training import make_adapter, make_pair, make_trainer

    N, TRIES = 60_000, 2500  # large enough for the kernels to let go of the GIL
    sys.setswitchinterval(1e-6)
    counts = {"done": 0, "refused": 0, "kept": 0, "changed": 0}
    tally = threading.Lock()

    def count(what):
        with tally:
            counts[what] += 1

    class Shared:
        # one provider that several threads lend out, resize and close at the same time
        def __init__(self, kind):
            self.kind = kind
            self.renew()

        def renew(self):
            if self.kind == "array":
                self.memory = array.array("f", bytes(4 * N))
            elif self.kind == "bytearray":
                self.memory = bytearray(4 * N)
            else:
                self.memory = mmap.mmap(-1, 4 * N)

        def lend(self):
            memory = self.memory
            return memory if self.kind == "array" else memoryview(memory).cast("f")

        def change(self, how):
            memory = self.memory
            if self.kind == "array":
                memory.pop() if len(memory) > N else memory.append(1.0)
            elif self.kind == "bytearray":
                memory.extend(bytes(4096)) if how else memory.clear()
            else:
                memory.close()

    def work(seed, shared, call):
        rng = random.Random(seed)
        for i in range(TRIES):
            if seed % 2 or i % 3 == 0:
                try:
                    call(shared.lend())
                    count("done")
                except (InputError, TrainerBusyError):
                    count("refused")
                except (ValueError, TypeError) as error:  # a closed mmap, a buffer whose length no longer divides by 4
                    assert "mmap" in str(error) or "memoryview" in str(error), error
                    count("refused")
            else:
                try:
                    shared.change(rng.random() < 0.5)
                    count("changed")
                except (BufferError, ValueError, IndexError):
                    count("kept")
                if kind != "array" and rng.random() < 0.5:
                    shared.renew()

    which = sys.argv[1]
    parameters = np.zeros(N, np.float32)
    adam = Adam(parameters)
    for kind in ("bytearray", "mmap", "array"):
        counts["kept"] = 0  # in the end those of array.array, whose BufferError comes only from a call that holds it
        norm, clip = (lambda g: grad_norm([g, g])), (lambda g: clip_grad_norm_([g], 0.5))
        call = {"step": adam.step, "norm": norm, "clip": clip}[which]
        shared = Shared(kind)
        threads = [threading.Thread(target=work, args=(seed, shared, call)) for seed in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    assert np.isfinite(parameters).all() and not adam.busy
    print(*counts.values())
"""


@pytest.mark.parametrize("call", ["step", "norm", "clip"])
def test_buffers_resized_and_closed_under_a_call_never_crash_it(call: str) -> None:
    """4 threads, 30,000 tries for each call; two use the memory, two mostly resize, close and replace it."""
    done, refused, kept, changed = map(int, in_a_process(RESIZING, call).split())
    assert done + refused + changed >= 20_000
    assert min(done, kept, changed) > 0
    assert refused > 0 or call != "step"


INTERRUPTED = """
    import os, random, signal, sys, threading, time
    import numpy as np
    from training import fingerprint, make_adapter, make_pair, make_trainer

    seed, interrupts = int(sys.argv[1]), int(sys.argv[2])
    rng = random.Random(seed)
    config = {"history_limit": None if seed % 2 else 50}
    config["schedule"] = (lambda step: 1e-3 / (1 + step)) if seed % 3 else "constant"
    adapter, trainer, pair = make_adapter(), make_trainer(**config), make_pair()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.setswitchinterval(1e-5)  # else the other thread is let in only after hundreds of steps
    main, caught, waiting = threading.main_thread().ident, 0, threading.Event()

    def shoot():
        for _ in range(interrupts):
            waiting.wait()
            waiting.clear()
            time.sleep(rng.random() * 2e-4)
            signal.pthread_kill(main, signal.SIGINT)

    shooter = threading.Thread(target=shoot, daemon=True)
    shooter.start()
    while caught < interrupts:
        try:
            waiting.set()
            while True:
                trainer.step(1.0, adapter, *pair)
        except KeyboardInterrupt:
            caught += 1
        adam = trainer._adam
        if adam is not None:
            assert not adam.busy and not trainer._calling_back
            assert trainer.total_steps() == adam.t, (trainer.total_steps(), adam.t)
            assert len(trainer.training_history) == min(adam.t, config["history_limit"] or adam.t)
    steps = trainer.total_steps()
    twin, other = make_adapter(), make_trainer(**config)
    for _ in range(steps):
        other.step(1.0, twin, *pair)
    assert fingerprint(trainer.state_dict(), adapter) == fingerprint(other.state_dict(), twin)
    print(caught, steps)
"""


@pytest.mark.parametrize("interrupts", [200, pytest.param(1000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("seed", range(3))
def test_interrupts_at_random_moments_leave_the_state_whole(
    seed: int, interrupts: int, figures: Callable[..., None]
) -> None:
    """A KeyboardInterrupt strikes a stepping loop so often; a twin that does the counted steps has the same bits."""
    caught, steps = map(int, in_a_process(INTERRUPTED, seed, interrupts).split())
    assert caught == interrupts
    assert steps > 0
    figures(interrupts=caught, steps=steps)


INTERRUPTED_WIDE = """
    import random, signal, sys, threading, time
    import numpy as np
    from cylora import AdapterSet, Gradients, LoraConfig
    from training import fingerprint, make_trainer

    width, interrupts = int(sys.argv[1]), int(sys.argv[2])
    rng, signal_number = random.Random(0), signal.SIGINT
    signal.signal(signal_number, signal.default_int_handler)
    main, waiting, sent, seconds = threading.main_thread().ident, threading.Event(), [], []

    def start():
        adapters, trainer = AdapterSet({"wide": (width, width)}, LoraConfig(rank=16), seed=0), make_trainer()
        gradients = Gradients(adapters)
        gradients.vector[...] = np.random.default_rng(0).standard_normal(gradients.vector.size, np.float32)
        trainer.step(1.0, adapters, gradients)  # the first one meets its memory
        begun = time.monotonic()
        trainer.step(1.0, adapters, gradients)
        return trainer, adapters, gradients, time.monotonic() - begun

    def shoot():
        for _ in range(interrupts):
            waiting.wait()
            waiting.clear()
            time.sleep(rng.random() * 3 * one_step)
            sent.append(time.monotonic())
            signal.pthread_kill(main, signal_number)

    trainer, adapters, gradients, one_step = start()
    shooter = threading.Thread(target=shoot, daemon=True)
    shooter.start()
    while len(seconds) < interrupts:
        try:
            waiting.set()
            while True:
                trainer.step(1.0, adapters, gradients)
        except KeyboardInterrupt:
            seconds.append(time.monotonic() - sent[-1])
        assert not trainer._adam.busy and not trainer._calling_back
        assert trainer.total_steps() == len(trainer.training_history) == trainer._adam.t
    other, twins, _, _ = start()
    for _ in range(trainer.total_steps() - 2):
        other.step(1.0, twins, gradients)
    assert fingerprint(trainer.state_dict(), adapters) == fingerprint(other.state_dict(), twins)
    seconds.sort()
    print(adapters.param_count(), len(seconds), trainer.total_steps())
    print(*(1000 * seconds[int(share * (interrupts - 1))] for share in (0.5, 0.99, 1)))
"""


@pytest.mark.parametrize(
    ("width", "interrupts"), [(4000, 20), pytest.param(500_000, 1000, marks=pytest.mark.nightly)], ids=str
)
def test_an_interrupt_comes_through_when_the_step_is_over(
    width: int, interrupts: int, figures: Callable[..., None]
) -> None:
    """No step is cut short; of 16 million parameters one is over so soon that 99 % of interrupts wait 50 ms or less."""
    counts, milliseconds = in_a_process(INTERRUPTED_WIDE, width, interrupts, timeout=1800).splitlines()
    parameters, caught, steps = map(int, counts.split())
    assert (parameters, caught) == (32 * width, interrupts)
    median, p99, longest = map(float, milliseconds.split())
    figures(parameters=parameters, interrupts=caught, steps=steps, median_ms=median, p99_ms=p99, longest_ms=longest)
    if width == 500_000:
        assert p99 <= 50


def test_several_trainers_run_in_parallel_as_if_alone() -> None:
    trainers = [(make_trainer(), make_adapter(seed)) for seed in range(4)]

    def work(trainer: LoraTrainer, adapter):
        def loop() -> None:
            for step in range(300):
                trainer.step(1.0, adapter, *make_pair(step))

        return loop

    run_threads(*[work(*one) for one in trainers])
    for seed, (trainer, adapter) in enumerate(trainers):
        twin, other = make_adapter(seed), make_trainer()
        work(other, twin)()
        assert fingerprint(trainer, adapter) == fingerprint(other, twin)


def test_a_busy_trainer_can_be_read() -> None:
    adapter, seen = make_adapter(), []

    def rate(step: int) -> float:
        seen.append(
            (trainer.total_steps(), len(trainer.training_history), trainer.average_loss(), trainer.is_complete())
        )
        return 1e-3

    trainer = make_trainer(schedule=rate)
    for _ in range(3):
        trainer.step(2.0, adapter, *make_pair())
    assert seen == [(0, 0, 0.0, False), (1, 1, 2.0, False), (2, 2, 2.0, False)]
    with pytest.raises(InputError):
        trainer.step(2.0, adapter, None)


def test_a_step_goes_to_the_adapter_it_was_given_or_nowhere() -> None:
    """Another thread binds the trainer between this step's look at the adapter and its call of the kernel."""
    trainer, mine, other = make_trainer(), make_adapter(0), make_adapter(1)
    ready = trainer._ready

    def overtaken(adapter):
        adam = ready(adapter)
        trainer._ready = ready
        trainer.step(1.0, other, *make_pair(1))
        return adam

    trainer._ready = overtaken
    with pytest.raises(TrainerBusyError, match="this trainer is busy"):
        trainer.step(1.0, mine, *make_pair(0))
    assert trainer._adapters is other
    assert trainer.total_steps() == trainer._adam.t == 1
    assert same_bits(mine.flat.vector, make_adapter(0).flat.vector)
