"""`cylora bench`: how fast a step is on this machine, against the same work in NumPy, each result checked."""

import gc
import json
import multiprocessing
import os
import random
import statistics
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cylora import __version__
from cylora._cli_info import system_facts
from cylora._cli_numpy import (
    BETA1,
    BETA2,
    EPS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    make_in_place,
    make_naive,
    true_norm,
    true_steps,
)
from cylora.adapter import LoraAdapter
from cylora.config import LoraConfig, LoraTrainingConfig, thread_count
from cylora.flat import FloatArray
from cylora.formats.durable import replace_file
from cylora.tasks.protocol import RunFailure
from cylora.trainer import LoraTrainer

__all__ = ["bench"]

# One adapter each, by (d_in, d_out, rank).
CASES = ((16, 8, 8), (512, 512, 8), (4096, 4096, 16), (8192, 8192, 64), (8192, 32768, 256))
QUICK_CASES = CASES[:2]
CYLORA, IN_PLACE, NAIVE = "cylora", "NumPy in place", "NumPy naive"
TURNS, QUICK_TURNS = 15, 5
TURN_SECONDS, QUICK_TURN_SECONDS = 0.01, 0.002
# Norms of the gradients that are checked: clipped, as the timed steps are, not clipped, clipped.
CHECK_NORMS = (5.0, 0.5, 20.0)
# A step moves a parameter by about one learning rate, of which float32 moments err by some 1e-7; the parameter itself
# is rounded twice a step. NumPy's float32 dot product is off by up to 2e-5.
STEP_TOLERANCE = 1e-5 * LEARNING_RATE
ROUNDING = 2 * 2.0**-24
NORM_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Row:
    """One size: medians of microseconds per step, and by how many tolerances each result is off."""

    parameters: int
    microseconds: dict[str, float]
    error_in_tolerances: dict[str, float]

    @property
    def wrong(self) -> list[str]:
        """Whose results are not within the tolerance (a NaN is not)."""
        return [name for name, error in self.error_in_tolerances.items() if not error <= 1.0]


@dataclass(frozen=True, slots=True)
class _Subject:
    step: Callable[..., Any]  # returns the gradient's norm, or a record that has it
    args: tuple[Any, ...]
    load: Callable[[FloatArray], None]
    read: Callable[[], FloatArray]

    def timer(self) -> timeit.Timer:
        names = {f"a{i}": arg for i, arg in enumerate(self.args)}
        # Written out: step(*args) would unpack a tuple each time, which no user pays.
        return timeit.Timer(f"step({', '.join(names)})", globals={"step": self.step, **names})


def bench(json_file: Path | None, threads: int | None, *, quick: bool) -> int:
    """Do what `cylora bench` was asked to do and return the exit code; a failure is raised.

    Parameters
    ----------
    json_file : where to write every figure, or None.
    threads : cylora's, or None for its default.
    quick : small sizes and short turns only.
    """
    count = thread_count(threads)
    facts = system_facts()
    print(", ".join(f"{name} {facts[name]}" for name in ("CPU", "instruction set", "Python", "NumPy")))
    print(f"cylora {__version__} with {count} thread{'s' if count > 1 else ''}, NumPy with 1; microseconds per step\n")
    heads = (CYLORA, IN_PLACE, NAIVE)
    print(f"{'parameters':>10}" + "".join(f"{name:>19}" for name in heads), flush=True)
    rows = []
    # NumPy's BLAS reads the number of its threads when it loads, which in this process it has done.
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            for shape in QUICK_CASES if quick else CASES:
                row = pool.submit(measure, shape, count, quick=quick).result()
                rows.append(row)
                print(_line(row), flush=True)
    finally:
        if before is None:
            del os.environ["OPENBLAS_NUM_THREADS"]
        else:
            os.environ["OPENBLAS_NUM_THREADS"] = before
    if json_file is not None:
        document = {"machine": facts, "threads": count, "results": [asdict(row) for row in rows]}
        replace_file(json_file, (json.dumps(document, indent=1) + "\n").encode())
    wrong = [f"{name} at {row.parameters:,} parameters" for row in rows for name in row.wrong]
    if wrong:
        raise RunFailure(f"results must match the float64 reference; these do not: {', '.join(wrong)}")
    print("\neach result within its tolerance of a float64 reference")
    return 0


def measure(shape: tuple[int, int, int], threads: int, *, quick: bool) -> Row:
    """Check everybody on one adapter, then time them in turns of shuffled order."""
    d_in, d_out, rank = shape
    size = rank * (d_in + d_out)
    rng = np.random.default_rng(1)
    start = rng.standard_normal(size, dtype=np.float32) * np.float32(0.05)
    drawn = [rng.standard_normal(size, dtype=np.float32) for _ in CHECK_NORMS]
    gradients = [g * np.float32(norm / np.sqrt(size)) for g, norm in zip(drawn, CHECK_NORMS, strict=True)]
    subjects = {
        CYLORA: _cylora(shape, start, threads),
        IN_PLACE: _in_place(start),
        NAIVE: _naive(start),
    }
    truth = true_steps(start, gradients)
    errors = {name: _error(subject, gradients, truth) for name, subject in subjects.items()}
    return Row(size, _medians(subjects, quick=quick), errors)


def _cylora(shape: tuple[int, int, int], start: FloatArray, threads: int) -> _Subject:
    d_in, d_out, rank = shape
    config = LoraTrainingConfig(
        lora_config=LoraConfig(rank=rank),
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        beta1=BETA1,
        beta2=BETA2,
        eps=EPS,
        warmup_steps=0,
        threads=threads,
    )
    adapter, trainer = LoraAdapter(d_in, d_out, config.lora_config, seed=0), LoraTrainer(config)
    adapter.flat.vector[:] = start
    grad_a, grad_b = np.empty((rank, d_in), np.float32), np.empty((d_out, rank), np.float32)

    def load(values: FloatArray) -> None:
        grad_a.ravel()[:], grad_b.ravel()[:] = values[: grad_a.size], values[grad_a.size :]

    return _Subject(trainer.step, (0.5, adapter, grad_a, grad_b), load, adapter.flat.vector.copy)


def _in_place(start: FloatArray) -> _Subject:
    adam, grads = make_in_place([start]), [np.empty_like(start)]
    return _Subject(adam.step, (grads,), lambda values: np.copyto(grads[0], values), adam.parameters[0].copy)


def _naive(start: FloatArray) -> _Subject:
    adam, grads = make_naive([start]), [np.empty_like(start)]

    def read() -> FloatArray:  # the array of today: each step makes new ones
        return adam.parameters[0].copy()

    return _Subject(adam.step, (grads,), lambda values: np.copyto(grads[0], values), read)


def _error(subject: _Subject, gradients: list[FloatArray], truth: np.ndarray) -> float:
    """Step with each gradient; the largest error of a norm or a parameter, in tolerances. Gradient 0 stays loaded."""
    errors = []
    for values in gradients:
        subject.load(values)
        result, norm = subject.step(*subject.args), true_norm(values)
        errors.append(abs(getattr(result, "grad_norm", result) - norm) / norm / NORM_TOLERANCE)
    allowed = len(gradients) * (STEP_TOLERANCE + ROUNDING * np.abs(truth))
    errors.append(np.max(np.abs(subject.read() - truth) / allowed))
    subject.load(gradients[0])
    return float(np.max(errors))  # NumPy's, unlike Python's, hands on a NaN


def _medians(subjects: dict[str, _Subject], *, quick: bool) -> dict[str, float]:
    """Microseconds per step: the median over turns, of several calls each, in shuffled order."""
    turns, turn_seconds = (QUICK_TURNS, QUICK_TURN_SECONDS) if quick else (TURNS, TURN_SECONDS)
    timers = {name: subject.timer() for name, subject in subjects.items()}
    calls = {name: _calls_lasting(turn_seconds, timer) for name, timer in timers.items()}
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    order = list(subjects)
    gc.collect()
    for _ in range(turns):
        random.shuffle(order)
        for name in order:
            timers[name].timeit(max(1, calls[name] // 8))  # what is in the cache belongs to the turn before
            taken[name].append(timers[name].timeit(calls[name]) / calls[name])
    return {name: statistics.median(seconds) * 1e6 for name, seconds in taken.items()}


def _calls_lasting(seconds: float, timer: timeit.Timer) -> int:
    """Find out how many calls in a row take about that long; at least one."""
    calls = 1
    while (taken := timer.timeit(calls)) < seconds / 8:
        calls *= 4
    return max(1, round(calls * seconds / taken))


def _line(row: Row) -> str:
    base = row.microseconds[CYLORA]
    cells = [f"{row.parameters:>10,}", f"{base:>19,.2f}"]
    for name in (IN_PLACE, NAIVE):
        cells.append(f"{f'{row.microseconds[name]:,.2f}  {row.microseconds[name] / base:4.1f}x':>19}")
    return "".join(cells) + (f"  WRONG: {', '.join(row.wrong)}" if row.wrong else "")
