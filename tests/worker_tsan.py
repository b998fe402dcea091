"""What threads do with cylora, to be watched by ThreadSanitizer; tests/test_tsan.py starts it.

``worker_tsan.py WHAT ROUNDS``: one of the functions of `WORKS`. It prints what it has done.
"""

import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from cylora import (
    AdapterSet,
    Gradients,
    LoraConfig,
    LoraTrainer,
    LoraTrainingConfig,
    TrainerBusyError,
    grad_norm,
    step_many,
)
from cylora.kernels.threads import configure, started
from cylora.serving import AdapterPublisher, AdapterStore


def make(size: int = 2048, **config: Any) -> tuple[LoraTrainer, AdapterSet, Gradients]:
    adapters = AdapterSet({"layer": (size, size)}, LoraConfig(rank=8), seed=0)
    gradients = Gradients(adapters)
    gradients.vector[...] = np.random.default_rng(0).standard_normal(gradients.vector.size, np.float32)
    return LoraTrainer(LoraTrainingConfig(warmup_steps=0, log_every=0, **config)), adapters, gradients


def together(*works: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
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


def pool(rounds: int) -> str:
    """Steps that helpers share, with state of each form: helpers that spin, that sleep, and that just fall asleep."""
    for state_dtype in ("float32", "bfloat16", "8bit"):
        trainer, adapters, gradients = make(threads=4, state_dtype=state_dtype, ema_decay=0.9)
        for spin_us in (0, 5, 50, 500):
            configure(spin_us=spin_us)
            for _ in range(rounds):
                trainer.step(1.0, adapters, gradients)
                trainer.accumulate(1.0, adapters, gradients)
                trainer.step_accumulated()
    return f"{started()} helpers"


def parallel(rounds: int) -> str:
    """Python threads with a trainer each: one gets the helpers, the others do without."""

    def steps() -> None:
        trainer, adapters, gradients = make(threads=3)
        for _ in range(rounds):
            trainer.step(1.0, adapters, gradients)

    together(*[steps] * 4)
    return f"{started()} helpers"


def many(rounds: int) -> str:
    """`step_many` with threads, in two Python threads, over trainers of their own and one that both have."""
    shared = make()

    def steps() -> None:
        jobs = [
            (trainer, 1.0, adapters, gradients) for trainer, adapters, gradients in (make(64 + i) for i in range(20))
        ]
        for _ in range(rounds):
            trainer, adapters, gradients = shared
            results = step_many([*jobs, (trainer, 1.0, adapters, gradients)], threads=3)
            for result in results:
                if isinstance(result, Exception) and not isinstance(result, TrainerBusyError):
                    raise result

    together(steps, steps)
    return f"{shared[0].total_steps()} steps of the shared one"


def tenants(rounds: int) -> str:
    """Rounds of two stores in two Python threads: compact state, where a step asks for the memory of the next one."""

    def steps() -> None:
        config = LoraTrainingConfig(warmup_steps=0, log_every=0, state_dtype="bfloat16")
        with tempfile.TemporaryDirectory() as folder:
            store = AdapterStore(lambda _: make(64)[1], config, folder=folder, memory_budget=2**30, threads=3)
            _, _, gradients = make(64)
            for number in range(150):
                store.create(str(number))
            for _ in range(rounds):
                for result in store.step_many([(name, 1.0, gradients.vector) for name in store.tenants()]):
                    if isinstance(result, Exception):
                        raise result
            store.close()

    together(steps, steps)
    return f"{started()} helpers"


def one_trainer(rounds: int) -> str:
    """Two threads step it, one reads what a busy trainer tells, one asks for its state."""
    trainer, adapters, gradients = make(threads=3, history_limit=50)
    trainer.step(1.0, adapters, gradients)
    over = threading.Event()

    def steps() -> None:
        while trainer.total_steps() < rounds:
            with suppress(TrainerBusyError):
                trainer.step(1.0, adapters, gradients)

    def states() -> None:
        while not over.is_set():
            with suppress(TrainerBusyError):
                trainer.state_dict()
            over.wait(1e-4)

    reader = threading.Thread(target=states)
    reader.start()
    try:
        together(steps, steps)
    finally:
        over.set()
        reader.join()
    return f"{trainer.total_steps()} steps"


def publish(rounds: int) -> str:
    """One thread steps with helpers, one publishes and rolls back, two read; they hold some versions for a while."""
    trainer, adapters, gradients = make(threads=3)
    publisher = AdapterPublisher(adapters, trainer)
    publisher.publish()
    over, reads = threading.Event(), [0, 0]

    def steps() -> None:
        while not over.is_set():
            with suppress(TrainerBusyError):
                trainer.step(1.0, adapters, gradients)

    def publishing() -> None:
        try:
            for number in range(rounds):
                snapshot = publisher.publish(timeout=60)
                if number % 5 == 4:
                    publisher.rollback(snapshot.version)
        finally:
            over.set()

    def reading(me: int) -> Callable[[], None]:
        def read() -> None:
            held = []
            while not over.is_set():
                snapshot = publisher.latest
                assert snapshot is not None
                assert abs(grad_norm([snapshot.vector]) - snapshot.norm) <= 1e-12 * snapshot.norm
                held = [*held[-1:], snapshot]
                reads[me] += 1

        return read

    together(steps, publishing, reading(0), reading(1))
    return f"{publisher.counters()['published']} versions"


def race(rounds: int) -> str:
    """What nobody may do: two trainers step the same parameters at the same time."""
    (one, adapters, gradients), (other, _, _) = make(), make()

    def steps(trainer: LoraTrainer) -> Callable[[], None]:
        def work() -> None:
            for _ in range(rounds):
                trainer.step(1.0, adapters, gradients)

        return work

    together(steps(one), steps(other))
    return "a race"


WORKS = {work.__name__: work for work in (pool, parallel, many, tenants, one_trainer, publish, race)}

if __name__ == "__main__":
    configure("always")
    sys.setswitchinterval(1e-5)
    print(WORKS[sys.argv[1]](int(sys.argv[2])))
