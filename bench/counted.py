"""What is counted by instructions.py, run inside callgrind: ``python bench/counted.py PLAN``.

Callgrind dumps its counter whenever `os.getppid` enters the C library, which nothing else here calls: what is executed
between two such marks, a stretch, is one part of its output. PLAN receives, as JSON, what each part was: ``[case,
amount]`` (of parameters, calls, jobs), or null for what lies between stretches. A mark costs the same each time, so a
figure is the difference of two stretches, of which one does twice as much.

Inputs are made by integer arithmetic alone and the number of steps before each stretch is fixed.
"""

import gc
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import repeat
from pathlib import Path

import numpy as np

import cylora
from cylora.optimizer import Adam

SIZE = 65_536  # a whole number of blocks; the slope is taken from here to twice as much
# Calls for a stretch: one report in ten steps (log_every). 130 of them before, so that the interpreter has specialised
# its code and the history's room (128 rows, then 256) lasts for all stretches.
CALLS = 10
WARM_CALLS = 130
STRETCHES = 3  # the least counts: sometimes the interpreter or an allocator does some work that was put off
JOBS = 100
STATES = ("float32", "bfloat16", "8bit")
GRADIENTS = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}

Stretch = tuple[int, Callable[[int], object]]  # amount, and what does so much when called with it


def values(size: int, dtype: str = "float32", scale: float = 1.0) -> np.ndarray:
    """Numbers between -scale and scale, the same everywhere; bfloat16 as the upper halves of float32."""
    mixed = (np.arange(size, dtype=np.uint64) * 2_654_435_761) % 2**32
    floats = ((mixed.astype(np.float64) / 2**31 - 1.0) * scale).astype(np.float32)
    if dtype == "bfloat16":
        return (floats.view(np.uint32) >> 16).astype(np.uint16)
    return floats.astype(GRADIENTS[dtype])


def check(claim: bool, what: str) -> None:
    """Stop if what was counted is not what was meant."""
    if not claim:
        raise AssertionError(f"counted something else: {what}")


# ------------------------------------------------------------------ per parameter


def norm_of(dtype: str) -> Iterator[Stretch]:
    for size in (SIZE, SIZE, 2 * SIZE):
        grads = [values(size, dtype)]
        yield size, lambda _, grads=grads: cylora.grad_norm(grads)


def clip() -> Iterator[Stretch]:
    for size in (SIZE, SIZE, 2 * SIZE):
        grads = [values(size)]
        yield size, lambda _, grads=grads: cylora.clip_grad_norm_(grads, 1.0)


def adam_step(state: str, dtype: str = "float32", mode: str = "decoupled", scale: float = 1.0) -> Iterator[Stretch]:
    """Do the second step of an Adam: its moments are no longer zero, unless all gradients are."""
    for size in (SIZE, SIZE, 2 * SIZE):
        parameters, gradient = values(size, scale=0.05), values(size, dtype, scale)
        adam = Adam(
            parameters, weight_decay=0.01, weight_decay_mode=mode, max_grad_norm=1.0, state_dtype=state, threads=1
        )
        adam.step(gradient)
        yield size, lambda _, adam=adam, gradient=gradient: adam.step(gradient)
        check(adam.t == 2 and np.any(adam.m) == (scale != 0.0), f"{adam.t} steps, scale {scale}")


def adam_quiet(state: str) -> Iterator[Stretch]:
    """Gradients that have become zero: the moments decay."""
    for size in (SIZE, SIZE, 2 * SIZE):
        adam = Adam(values(size, scale=0.05), weight_decay=0.01, state_dtype=state, threads=1)
        adam.step(values(size))
        gradient = np.zeros(size, np.float32)
        yield size, lambda _, adam=adam, gradient=gradient: adam.step(gradient)
        check(adam.t == 2 and np.any(adam.m), "moments are gone")


def micro_batch() -> Iterator[Stretch]:
    for size in (SIZE, SIZE, 2 * SIZE):
        adapter = cylora.LoraAdapter(size // 32, size // 32, cylora.LoraConfig(rank=16), seed=0)
        trainer, gradient = cylora.LoraTrainer(), values(size)
        trainer.accumulate(1.0, adapter, gradient)
        yield size, lambda _, t=trainer, a=adapter, g=gradient: t.accumulate(1.0, a, g)
        check(trainer.accumulated == 2, f"{trainer.accumulated} micro-batches")


# ------------------------------------------------------------------ per call, at 192 parameters


def pair(seed: int = 0) -> tuple[cylora.LoraAdapter, np.ndarray, np.ndarray]:
    adapter = cylora.LoraAdapter(16, 8, cylora.LoraConfig(rank=8), seed=seed)
    return adapter, values(128).reshape(8, 16), values(64).reshape(8, 8)


def many_calls(loop: Callable[[int], object]) -> Iterator[Stretch]:
    for _ in range(WARM_CALLS // CALLS):
        loop(CALLS)
    for _ in range(STRETCHES):
        yield CALLS, loop
        yield 2 * CALLS, loop


def trainer_step(warmup_steps: int = 0, **settings: object) -> Iterator[Stretch]:
    adapter, grad_a, grad_b = pair()
    trainer = cylora.LoraTrainer(cylora.LoraTrainingConfig(warmup_steps=warmup_steps, threads=1, **settings))

    def loop(calls: int) -> None:
        for _ in repeat(None, calls):
            trainer.step(0.5, adapter, grad_a, grad_b)

    yield from many_calls(loop)
    last = trainer.last_step()
    check(trainer.total_steps() == WARM_CALLS + 3 * CALLS * STRETCHES, f"{trainer.total_steps()} steps")
    check(last.step < max(warmup_steps, 256) and not last.skipped, f"{last}")


def trainer_step_of_set() -> Iterator[Stretch]:
    adapters = cylora.AdapterSet({"q_proj": (16, 8)}, cylora.LoraConfig(rank=8), seed=0)
    gradients = cylora.Gradients(adapters)
    gradients.vector[:] = values(192)
    trainer = cylora.LoraTrainer(cylora.LoraTrainingConfig(warmup_steps=0, threads=1))

    def loop(calls: int) -> None:
        for _ in repeat(None, calls):
            trainer.step(0.5, adapters, gradients)

    yield from many_calls(loop)


def trainer_step_rejected() -> Iterator[Stretch]:
    adapter, grad_a, grad_b = pair()
    trainer = cylora.LoraTrainer(cylora.LoraTrainingConfig(warmup_steps=0, threads=1))
    trainer.step(0.5, adapter, grad_a, grad_b)
    grad_b[3, 5] = math.nan

    def loop(calls: int) -> None:
        for _ in repeat(None, calls):
            try:
                trainer.step(0.5, adapter, grad_a, grad_b)
            except cylora.NonFiniteGradientError:
                continue
            check(False, "a NaN was accepted")

    yield from many_calls(loop)
    check(trainer.total_steps() == 1, f"{trainer.total_steps()} steps")


def accumulated_step() -> Iterator[Stretch]:
    adapter, grad_a, grad_b = pair()
    trainer = cylora.LoraTrainer(cylora.LoraTrainingConfig(warmup_steps=0, threads=1))

    def loop(calls: int) -> None:
        for _ in repeat(None, calls):
            trainer.accumulate(0.5, adapter, grad_a, grad_b)
            trainer.accumulate(0.5, adapter, grad_a, grad_b)
            trainer.step_accumulated()

    yield from many_calls(loop)


def small_adam_step() -> Iterator[Stretch]:
    adam, gradient = Adam(values(192, scale=0.05), weight_decay=0.01, max_grad_norm=1.0, threads=1), values(192)

    def loop(calls: int) -> None:
        for _ in repeat(None, calls):
            adam.step(gradient)

    yield from many_calls(loop)


def small_norm() -> Iterator[Stretch]:
    grads = [values(128), values(64)]

    def loop(calls: int) -> None:
        for _ in repeat(None, calls):
            cylora.grad_norm(grads)

    yield from many_calls(loop)


def many_adapters() -> Iterator[Stretch]:
    config = cylora.LoraTrainingConfig(warmup_steps=0, threads=1)
    first, grad_a, grad_b = pair()
    adapters = [first, *(pair(seed)[0] for seed in range(1, 2 * JOBS))]
    jobs = [(cylora.LoraTrainer(config), 0.5, adapter, grad_a, grad_b) for adapter in adapters]
    for _ in range(2):
        cylora.step_many(jobs, threads=1)
    for _ in range(STRETCHES):
        yield JOBS, lambda n: cylora.step_many(jobs[:n], threads=1)
        yield 2 * JOBS, lambda n: cylora.step_many(jobs[:n], threads=1)
    check([job[0].total_steps() for job in jobs[:: 2 * JOBS - 1]] == [2 + 2 * STRETCHES, 2 + STRETCHES], "steps")


PER_PARAMETER = {
    **{f"grad_norm, {dtype}": lambda dtype=dtype: norm_of(dtype) for dtype in GRADIENTS},
    "clip_grad_norm_": clip,
    **{
        f"Adam.step, state {state}, gradient {dtype}": lambda state=state, dtype=dtype: adam_step(state, dtype)
        for state in STATES
        for dtype in GRADIENTS
    },
    **{f"Adam.step, state {state}, l2": lambda state=state: adam_step(state, mode="l2") for state in STATES},
    **{f"Adam.step, state {state}, silent": lambda state=state: adam_step(state, scale=0.0) for state in STATES},
    **{f"Adam.step, state {state}, quiet": lambda state=state: adam_quiet(state) for state in STATES},
    "LoraTrainer.accumulate": micro_batch,
}
PER_CALL = {
    "LoraTrainer.step": trainer_step,
    "LoraTrainer.step, in the warm-up": lambda: trainer_step(1000),
    "LoraTrainer.step, cosine": lambda: trainer_step(schedule="cosine"),
    "LoraTrainer.step, state 8bit": lambda: trainer_step(state_dtype="8bit"),
    "LoraTrainer.step, Gradients": trainer_step_of_set,
    "LoraTrainer.step, rejected": trainer_step_rejected,
    "accumulate twice and step_accumulated": accumulated_step,
    "step_many, per adapter": many_adapters,
    "Adam.step": small_adam_step,
    "grad_norm": small_norm,
}


def main(plan: Path) -> None:
    """Run every case and write down the order."""
    mark, stretches = os.getppid, []

    def count(name: str | None, amount: int, work: Callable[[int], object]) -> None:
        mark()
        stretches.append(None)
        work(amount)
        mark()
        stretches.append(name and [name, amount])

    gc.disable()
    for _ in range(2 * CALLS):
        count(None, 0, abs)
    for name, case in {**PER_PARAMETER, **PER_CALL}.items():
        for amount, work in case():
            count(name, amount, work)
    with suppress(FileNotFoundError):
        plan.unlink()
    plan.write_text(json.dumps(stretches))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
