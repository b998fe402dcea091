"""cylora.step_many: n calls of `step` in one, to the bit; one bad job among many; who is busy with whom."""

import contextlib
import gc
import itertools
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from test_fork import in_child
from test_threads import run_threads
from training import fingerprint, make_adapter, make_pair, make_trainer, same_bits

from cylora import (
    AdapterSet,
    ConfigError,
    Gradients,
    InputError,
    LoraAdapter,
    LoraConfig,
    LoraTrainer,
    LoraTrainingConfig,
    NonFiniteGradientError,
    StateError,
    TrainerBusyError,
    TrainingStep,
    step_many,
)
from cylora.kernels.threads import configure

THREADS = (1, 2, 4)


@pytest.fixture
def shared() -> Iterator[None]:
    """Share work between threads whatever its size and the machine."""
    former, _ = configure(rule_name="always")
    yield
    configure(rule_name=former)


# ---------------------------------------------------------------------- equal to step


def in_half(floats: np.ndarray, kind: str) -> np.ndarray:
    """Return a gradient as float32, float16, or the bits of bfloat16 numbers."""
    if kind == "bits":
        return (floats.view(np.uint32) >> 16).astype(np.uint16)
    return floats.astype(np.float16) if kind == "float16" else floats


A_SET = {"q": (6, 5), "k": (300, 3)}
SHAPES: tuple[Any, ...] = ((6, 5, 3), (1, 1, 1), (40, 7, 2), (1000, 900, 16), A_SET, (513, 511, 8))
CONFIGS: tuple[dict[str, Any], ...] = (
    {"schedule": "constant", "warmup_steps": 2},
    {"schedule": "cosine", "max_steps": 5, "history_limit": 3},
    {"schedule": lambda step: 0.01 / (1 + step), "weight_decay_mode": "l2", "max_grad_norm": math.inf},
    {"schedule": "linear", "max_steps": 6, "nonfinite": "skip", "threads": 2, "beta1": 0.0},
    {"schedule": "warmup_stable_decay", "max_steps": 6, "decay_steps": 2, "threads": 4, "weight_decay": 0.1},
)
STATES = ("float32", "bfloat16", "8bit")
KINDS = (("float32", "float32"), ("float16", "bits"), ("flat", "float32"), ("flat", "bits"), ("bits", "float32"))


@dataclass
class Member:
    """One trainer of many, of a kind that follows from its index alone."""

    index: int
    heard: list[TrainingStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        i, shape = self.index, SHAPES[self.index % len(SHAPES)]
        config = {"learning_rate": 0.01 * (1 + i % 7), "warmup_steps": 0} | CONFIGS[i % len(CONFIGS)]
        config |= {"state_dtype": STATES[i // 2 % 3], "log_every": i % 4}
        self.trainer = LoraTrainer(LoraTrainingConfig(**config), on_step=self.heard.append)
        if isinstance(shape, dict):
            self.adapter: LoraAdapter | AdapterSet = AdapterSet(shape, LoraConfig(rank=2), seed=i)
        else:
            self.adapter = LoraAdapter(*shape[:2], LoraConfig(rank=shape[2]), seed=i)
        vector = self.adapter.flat.vector
        vector += np.random.default_rng(i).normal(size=vector.size).astype(np.float32)

    def job(self, step: int) -> tuple[Any, ...]:
        rng = np.random.default_rng([self.index, step])
        loss, floats = float(rng.normal()), rng.normal(size=self.adapter.param_count()).astype(np.float32)
        if step == 2 and self.trainer.config.nonfinite == "skip":
            floats[-1] = np.nan
        how, other = KINDS[(self.index + step) % len(KINDS)]
        if isinstance(self.adapter, AdapterSet):
            gradients = Gradients(self.adapter)
            gradients.vector[...] = floats
            return self.trainer, loss, self.adapter, gradients if step % 2 else in_half(floats, other)
        if how == "flat":
            return (self.trainer, loss, self.adapter, in_half(floats, other), *([None] * (step % 2)))
        cut = self.adapter.a_matrix.size
        a, b = floats[:cut].reshape(self.adapter.a_matrix.shape), floats[cut:].reshape(self.adapter.b_matrix.shape)
        return self.trainer, loss, self.adapter, in_half(a, how), in_half(b, other)

    def mark(self) -> str:
        moments = self.trainer._adam._moments.to_dict() if self.trainer._adam else None
        return fingerprint(self.trainer, self.adapter, self.heard, moments)


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("threads", THREADS)
def test_many_steps_in_one_call_are_single_steps_to_the_bit(threads: int) -> None:
    """60 trainers: every size meets every configuration, and the kinds of gradients change from step to step."""
    many, single = [Member(i) for i in range(60)], [Member(i) for i in range(60)]
    for step in range(6):
        results = step_many([member.job(step) for member in many], threads=threads)
        records = [member.trainer.step(*member.job(step)[1:]) for member in single]
        # Spelt out, because a skipped step's norm is NaN, which equals no other.
        assert repr(results) == repr(records) == repr([member.trainer.last_step() for member in many])
        assert len({result.grad_norm for result in results}) > 50
        assert all(type(result) is TrainingStep for result in results)
        assert [member.mark() for member in many] == [member.mark() for member in single]
    assert any(member.trainer.skipped_steps() for member in many)
    assert len({result.learning_rate for result in results if isinstance(result, TrainingStep)}) > 10
    for i, member in enumerate(many):  # every log_every steps, each trainer by its own
        assert [record.step for record in member.heard] == [s for s in range(6) if i % 4 and (s + 1) % (i % 4) == 0]


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("threads", [2, 64])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 200])
def test_any_number_of_jobs(count: int, threads: int) -> None:
    """From 64 jobs on, threads take several at a time."""
    adapters, twins = [make_adapter(i) for i in range(count)], [make_adapter(i) for i in range(count)]
    trainers, others = [make_trainer() for _ in range(count)], [make_trainer() for _ in range(count)]
    for step in range(3):
        jobs = [(trainers[i], 1.0, adapters[i], *make_pair(i + step)) for i in range(count)]
        assert step_many(jobs, threads=threads) == [
            others[i].step(1.0, twins[i], *make_pair(i + step)) for i in range(count)
        ]
    assert fingerprint(*trainers, *adapters) == fingerprint(*others, *twins)


def test_a_trainer_changes_between_one_and_many() -> None:
    adapter, twin, trainer, other = make_adapter(), make_adapter(), make_trainer(), make_trainer()
    for step in range(8):
        if step % 3 == 2:
            trainer.accumulate(1.0, adapter, *make_pair(step))
            other.accumulate(1.0, twin, *make_pair(step))
            assert trainer.step_accumulated() == other.step_accumulated()
        assert step_many([(trainer, 1.0, adapter, *make_pair(step))]) == [other.step(1.0, twin, *make_pair(step))]
    assert fingerprint(trainer, adapter) == fingerprint(other, twin)


def test_records_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    trainers = [make_trainer(log_every=every) for every in (1, 2, 0)]
    jobs = [(trainer, 1.0, make_adapter(), *make_pair()) for trainer in trainers]
    with caplog.at_level(logging.INFO, "cylora"):
        step_many(jobs)
        step_many(jobs)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["step 0", "step 1", "step 1"]


# ---------------------------------------------------------------------- one bad job among a thousand


class Loss:
    """A loss whose conversion to float does something."""

    def __init__(self, convert: Callable[[], Any]) -> None:
        self.convert = convert

    def __float__(self) -> float:
        return self.convert()


@dataclass
class Crowd:
    """Small adapters, each with a trainer that has done a step, and a rate that a test may replace."""

    count: int = 1000
    bad_config: dict[str, Any] = field(default_factory=dict)
    on_step: Callable[[TrainingStep], object] | None = None

    def __post_init__(self) -> None:
        self.bad = self.count // 2
        self.instead: Callable[[], float] | None = None
        self.adapters = [make_adapter(i) for i in range(self.count)]
        plain = LoraTrainingConfig(learning_rate=0.01, warmup_steps=0, log_every=0)
        self.trainers = [LoraTrainer(plain) for _ in range(self.count)]
        config = {"warmup_steps": 0, "log_every": 0, "max_grad_norm": math.inf, "schedule": self.rate} | self.bad_config
        self.trainers[self.bad] = LoraTrainer(LoraTrainingConfig(**config), on_step=self.on_step)
        for job in self.jobs(0):
            job[0].step(*job[1:])

    def rate(self, step: int) -> float:
        return 0.02 if self.instead is None else self.instead()

    def jobs(self, step: int) -> list[tuple[Any, ...]]:
        pairs = [make_pair(step * 10 + i % 10) for i in range(min(self.count, 10))]
        members = zip(self.trainers, self.adapters, strict=True)
        return [(trainer, float(i), adapter, *pairs[i % 10]) for i, (trainer, adapter) in enumerate(members)]

    def marks(self) -> list[Any]:
        """Return what each trainer and its adapter hold: of the bad one all, of the others the numbers."""
        marks: list[Any] = []
        for trainer, adapter in zip(self.trainers, self.adapters, strict=True):
            adam, history = trainer._adam, trainer.training_history
            counts = adam.t, adam.busy, trainer.total_steps(), trainer.skipped_steps(), trainer.accumulated
            arrays = adapter.flat.vector, adam.m, adam.v, *history.buffers()
            marks.append((counts, *(array.tobytes() for array in arrays), history.average_loss()))
        marks[self.bad] = fingerprint(self.trainers[self.bad], self.adapters[self.bad])
        return marks


def fail() -> Any:
    raise ZeroDivisionError("on purpose")


def nan_gradient(crowd: Crowd, job: tuple) -> Any:
    job[3][1, 2] = np.nan  # a copy of its own, see below
    return job


def waiting(crowd: Crowd, job: tuple) -> Any:
    crowd.trainers[crowd.bad].accumulate(1.0, crowd.adapters[crowd.bad], *make_pair())
    return job


def scheduled(instead: Callable[[], Any]) -> Callable[[Crowd, tuple], Any]:
    def cause(crowd: Crowd, job: tuple) -> Any:
        crowd.instead = instead
        return job

    return cause


JOB = r"a job must be \(trainer, loss, adapter, grad_a, grad_b\), got "
TRAINER = "a job must begin with a LoraTrainer, got "
CAUSES: dict[str, tuple[Callable[[Crowd, tuple], Any], type[Exception], str]] = {
    "NaN": (nan_gradient, NonFiniteGradientError, r"gradient of A must be finite, got nan at \[1, 2\]"),
    "huge": (lambda c, j: (*j[:3], np.full((3, 6), 1e30, "f4"), j[4]), NonFiniteGradientError, r"at most 2\^63"),
    "wrong shape": (lambda c, j: (*j[:3], j[4], j[3]), InputError, r"grad_a must be .* of shape \(3, 6\), got"),
    "wrong second shape": (lambda c, j: (*j[:4], j[3]), InputError, r"grad_b must be .* of shape \(5, 3\), got"),
    "wrong dtype": (lambda c, j: (*j[:3], j[3].astype("f8"), j[4]), InputError, "grad_a must be .* format 'd'"),
    "no gradient": (lambda c, j: (*j[:3], None), InputError, "got NoneType, which offers no buffer"),
    "gradients of others": (lambda c, j: (*j[:3], Gradients(AdapterSet({"q": (2, 2)}, LoraConfig(rank=1), seed=0))),
                            InputError, "must be a Gradients made for"),
    "its own parameters": (lambda c, j: (*j[:3], j[2].flat.vector), InputError, "must not overlap the parameters"),
    "no adapter": (lambda c, j: (*j[:2], "adapter", *j[3:]), InputError, "adapter must be a LoraAdapter or"),
    "another adapter": (lambda c, j: (*j[:2], make_adapter(7), *j[3:]), StateError, "must be the one of the first"),
    "a neighbour's adapter": (lambda c, j: (*j[:2], c.adapters[-1], *j[3:]), StateError, "must be the one of the"),
    "no loss": (lambda c, j: (j[0], None, *j[2:]), InputError, "loss must be a real number"),
    "loss that raises": (lambda c, j: (j[0], Loss(fail), *j[2:]), ZeroDivisionError, "on purpose"),
    "loss that is text": (lambda c, j: (j[0], Loss(lambda: "1"), *j[2:]), InputError, "loss must be a real number"),
    "schedule that raises": (scheduled(fail), ZeroDivisionError, "on purpose"),
    "schedule without number": (scheduled(lambda: None), InputError, "learning rate must be a number"),
    "schedule beyond the limit": (scheduled(lambda: 1e7), InputError, "learning rate must be a number"),
    "micro-batches wait": (waiting, StateError, "1 micro-batches wait"),
    "three items": (lambda c, j: j[:3], InputError, JOB),
    "six items": (lambda c, j: (*j, 1), InputError, JOB),
    "no items": (lambda c, j: (), InputError, JOB),
    "a list": (lambda c, j: list(j), InputError, JOB),
    "None": (lambda c, j: None, InputError, JOB + "None"),
    "an exception": (lambda c, j: ValueError("given"), InputError, JOB + "ValueError"),
    "not a trainer": (lambda c, j: ("trainer", *j[1:]), InputError, TRAINER + "str"),
    "a trainer's class": (lambda c, j: (LoraTrainer, *j[1:]), InputError, TRAINER + "type"),
}  # fmt: skip


# The others are one among a hundred: making a thousand trainers takes longer than stepping them.
THOUSAND = ("NaN", "wrong shape", "wrong dtype", "another adapter", "schedule that raises", "loss that raises", "None")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cause", CAUSES)
def test_one_bad_job_among_a_thousand_disturbs_no_other(cause: str, threads: int, shared: None) -> None:
    spoil, error, message = CAUSES[cause]
    count = 1000 if cause in THOUSAND and threads == 1 else 100
    crowd, twin = Crowd(count), Crowd(count)
    if spoil is waiting:
        waiting(twin, ())
    before = twin.marks()[twin.bad]
    jobs, bad = crowd.jobs(1), crowd.bad
    jobs[bad] = spoil(crowd, (*jobs[bad][:3], jobs[bad][3].copy(), jobs[bad][4].copy()))
    results = step_many(jobs, threads=threads)
    crowd.instead = None
    records = [job[0].step(*job[1:]) for i, job in enumerate(twin.jobs(1)) if i != bad]
    assert results[:bad] + results[bad + 1 :] == records
    assert type(results[bad]) is error
    with pytest.raises(error, match=message):
        raise results[bad]
    assert crowd.marks() == twin.marks()
    assert crowd.marks()[bad] == before
    for one in (crowd, twin):
        one.trainers[bad].discard_accumulated()
        for job in one.jobs(2):
            job[0].step(*job[1:])
    assert crowd.marks() == twin.marks()


@pytest.mark.parametrize("bad", [0, 99])
def test_the_bad_job_may_be_the_first_or_the_last(bad: int) -> None:
    crowd, twin = Crowd(100), Crowd(100)
    jobs = crowd.jobs(1)
    jobs[bad] = (*jobs[bad][:3], np.full((3, 6), np.inf, np.float32), jobs[bad][4])
    results = step_many(jobs)
    records = [job[0].step(*job[1:]) for i, job in enumerate(twin.jobs(1)) if i != bad]
    assert results[:bad] + results[bad + 1 :] == records
    assert isinstance(results[bad], NonFiniteGradientError)
    assert crowd.marks() == twin.marks()


def test_all_jobs_may_be_bad() -> None:
    crowd = Crowd(100)
    before = crowd.marks()
    results = step_many([(*job[:3], np.full((3, 6), np.nan, np.float32), job[4]) for job in crowd.jobs(1)], threads=2)
    assert all(type(result) is NonFiniteGradientError for result in results)
    assert len({id(result) for result in results}) == 100
    assert crowd.marks() == before


@pytest.mark.parametrize("threads", THREADS)
def test_a_skipped_step_is_recorded_as_skipped(threads: int, shared: None) -> None:
    crowd, twin = Crowd(100, {"nonfinite": "skip"}), Crowd(100, {"nonfinite": "skip"})
    jobs, twins = crowd.jobs(1), twin.jobs(1)
    for each in (jobs, twins):
        each[50] = (*each[50][:3], np.full((3, 6), np.nan, np.float32), each[50][4])
    vector = crowd.adapters[50].flat.vector.copy()
    results = step_many(jobs, threads=threads)
    expected = [job[0].step(*job[1:]) for job in twins]
    assert results[50].skipped
    assert sum(result.skipped for result in results) == 1
    assert list(map(repr, results)) == list(map(repr, expected))  # a norm that is NaN equals no other
    assert same_bits(crowd.adapters[50].flat.vector, vector)
    assert crowd.marks() == twin.marks()
    assert crowd.trainers[50].skipped_steps() == 1


def test_a_busy_trainer_is_refused_and_the_others_step() -> None:
    crowd, twin = Crowd(), Crowd()
    # Exclusive use of a trainer is what another thread's step is, too.
    results = crowd.trainers[crowd.bad]._while_idle(lambda: step_many(crowd.jobs(1)))
    records = [job[0].step(*job[1:]) for i, job in enumerate(twin.jobs(1)) if i != twin.bad]
    assert results[: crowd.bad] + results[crowd.bad + 1 :] == records
    assert isinstance(results[crowd.bad], TrainerBusyError)
    assert crowd.marks() == twin.marks()


def test_a_loss_may_give_a_state_to_a_trainer_whose_turn_has_not_come() -> None:
    """That one steps on from its new state, as it would in single steps; one whose turn was before is busy."""
    crowd, twin, state = Crowd(20), Crowd(20), Crowd(20).trainers[2].state_dict()
    crowd.trainers[-1].step(1.0, crowd.adapters[-1], *make_pair())
    twin.trainers[-1].step(1.0, twin.adapters[-1], *make_pair())

    def load() -> float:
        with pytest.raises(TrainerBusyError):
            crowd.trainers[0].load_state_dict(state)
        crowd.trainers[-1].load_state_dict(state)
        return 1.0

    jobs = crowd.jobs(1)
    jobs[1] = (jobs[1][0], Loss(load), *jobs[1][2:])
    results = step_many(jobs)
    twin.trainers[-1].load_state_dict(state)
    assert results == [job[0].step(*job[1:]) for job in twin.jobs(1)]
    assert crowd.marks() == twin.marks()


def test_a_retired_optimizer_is_refused_in_its_place() -> None:
    """Another thread may replace a trainer's optimizer after it was looked up: the old one then refuses for good."""
    crowd, twin = Crowd(20), Crowd(20)
    crowd.trainers[crowd.bad]._adam.retire()
    results = step_many(crowd.jobs(1))
    assert isinstance(results[crowd.bad], TrainerBusyError)
    assert "another thread has given it another state" in str(results[crowd.bad])
    records = [job[0].step(*job[1:]) for i, job in enumerate(twin.jobs(1)) if i != twin.bad]
    assert results[: crowd.bad] + results[crowd.bad + 1 :] == records
    del crowd.trainers[crowd.bad], crowd.adapters[crowd.bad], twin.trainers[twin.bad], twin.adapters[twin.bad]
    assert crowd.marks() == twin.marks()


@pytest.mark.parametrize("error", [ValueError("on purpose"), MemoryError(), StopIteration()])
def test_what_on_step_raises_stands_in_the_jobs_place_and_the_step_is_done(error: Exception) -> None:
    heard = []

    def report(record: TrainingStep) -> None:
        heard.append(record)
        if record.step == 1:
            raise error

    crowd, twin = Crowd(100, {"log_every": 1}, report), Crowd(100, {"log_every": 1})
    results = step_many(crowd.jobs(1))
    records = [job[0].step(*job[1:]) for job in twin.jobs(1)]
    assert results[50] is error
    assert results[:50] + results[51:] == records[:50] + records[51:]
    assert heard[1:] == [records[50]]
    assert crowd.marks() == twin.marks()


# ---------------------------------------------------------------------- jobs that are none


class Wrong:
    def __iter__(self) -> Iterator[Any]:
        raise ZeroDivisionError


def test_jobs_come_from_any_iterable() -> None:
    for kind in (list, tuple, iter, lambda jobs: (job for job in jobs), lambda jobs: dict(enumerate(jobs)).values()):
        crowd, twin = Crowd(10), Crowd(10)
        assert step_many(kind(crowd.jobs(1))) == [job[0].step(*job[1:]) for job in twin.jobs(1)]
        assert crowd.marks() == twin.marks()
    for nothing in ([], (), iter(()), {}, ""):
        assert step_many(nothing, threads=2) == []


@pytest.mark.parametrize("jobs", [None, 3, object(), make_trainer()])
def test_jobs_that_cannot_be_iterated_are_refused(jobs: Any) -> None:
    with pytest.raises(InputError, match=f"jobs must be an iterable of tuples, got {type(jobs).__name__}"):
        step_many(jobs)


def test_jobs_whose_iterator_raises_are_not_begun() -> None:
    crowd = Crowd(10)
    before = crowd.marks()

    def some() -> Iterator[tuple]:
        yield from crowd.jobs(1)
        raise ZeroDivisionError

    for jobs in (some(), Wrong()):
        with pytest.raises(ZeroDivisionError):
            step_many(jobs)
    assert crowd.marks() == before


def test_text_and_mappings_are_bad_jobs_each() -> None:
    for jobs in ("ab", {"a": 1, "b": 2}, b"ab", np.zeros((2, 5))):
        results = step_many(jobs)
        assert len(results) == 2
        assert all(isinstance(result, InputError) for result in results)


@pytest.mark.parametrize("threads", [0, -1, 65, 10**30, "2", True, 2.0, [2], math.nan])
def test_a_wrong_number_of_threads_is_refused_before_anything(threads: Any) -> None:
    crowd = Crowd(3)
    before = crowd.marks()
    with pytest.raises(ConfigError, match=r"threads \(if not None\) must be an integer"):
        step_many(crowd.jobs(1), threads=threads)
    assert crowd.marks() == before


def test_the_environment_gives_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Crowd(3)
    before = crowd.marks()
    for text in ("0", "65", "two", "1.5", "-1"):
        monkeypatch.setenv("CYLORA_NUM_THREADS", text)
        with pytest.raises(ConfigError, match=r"CYLORA_NUM_THREADS must be an integer in 1\.\.64, got"):
            step_many(crowd.jobs(1))
    assert crowd.marks() == before
    monkeypatch.setenv("CYLORA_NUM_THREADS", " 64 ")
    assert len(step_many(crowd.jobs(1))) == 3


def test_threads_are_named() -> None:
    with pytest.raises(TypeError, match="positional"):
        step_many([], 2)


# ---------------------------------------------------------------------- twice, and two of one


@pytest.mark.parametrize("threads", THREADS)
def test_a_trainer_that_comes_twice_is_busy_the_second_time(threads: int, shared: None) -> None:
    crowd, twin = Crowd(10), Crowd(10)
    jobs = crowd.jobs(1)
    results = step_many([*jobs, jobs[3], jobs[3]], threads=threads)
    assert results[:10] == [job[0].step(*job[1:]) for job in twin.jobs(1)]
    assert [type(result) for result in results[10:]] == [TrainerBusyError, TrainerBusyError]
    assert crowd.marks() == twin.marks()


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_new_trainer_that_comes_with_two_adapters_takes_the_first(value: float) -> None:
    """Before its first step it may change its adapter, but not for a later job of the same call, good or bad."""
    trainer, first, second = make_trainer(), make_adapter(1), make_adapter(2)
    other, twin, before = make_trainer(), make_adapter(1), fingerprint(second)
    a, b = make_pair()
    results = step_many([(trainer, 1.0, first, a, b), (trainer, 1.0, second, np.full_like(a, value), b)])
    assert results[0] == other.step(1.0, twin, a, b)
    assert isinstance(results[1], TrainerBusyError)
    assert "a step is under way" in str(results[1])
    assert fingerprint(trainer, first) == fingerprint(other, twin)
    assert fingerprint(second) == before


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("size", [(6, 5, 3), (1000, 900, 16)])
def test_two_trainers_of_one_adapter_go_one_after_the_other(size: tuple[int, int, int], threads: int) -> None:
    """In the order given, whatever stands between them and wherever their parameters lie."""

    def crew() -> tuple[list[LoraTrainer], list[LoraAdapter]]:
        adapters = [LoraAdapter(*size[:2], LoraConfig(rank=size[2]), seed=i) for i in range(7)]
        trainers = [
            make_trainer(learning_rate=0.1 * (1 + i), weight_decay=1.0, weight_decay_mode="l2") for i in range(9)
        ]
        return trainers, [*adapters[:3], adapters[0], *adapters[3:6], adapters[2], adapters[0]]

    (trainers, adapters), (others, twins) = crew(), crew()
    for step in range(5):
        pairs = [make_pair(step * 9 + i, adapters[i]) for i in range(9)]
        order = np.random.default_rng(step).permutation(9).tolist()
        results = step_many([(trainers[i], 1.0, adapters[i], *pairs[i]) for i in order], threads=threads)
        assert results == [others[i].step(1.0, twins[i], *pairs[i]) for i in order]
        assert fingerprint(*trainers, *adapters) == fingerprint(*others, *twins)


# ---------------------------------------------------------------------- interrupts


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("where", ["schedule", "loss"])
@pytest.mark.parametrize("bad", [0, 50, 99])
def test_an_interrupt_before_anything_is_written_leaves_all_as_it_was(
    error: type[BaseException], where: str, bad: int
) -> None:
    def interrupt() -> float:
        raise error

    crowd, twin = Crowd(100), Crowd(100)
    jobs, before = crowd.jobs(1), crowd.marks()
    if where == "schedule":
        crowd.instead = interrupt
        jobs[bad], jobs[crowd.bad] = jobs[crowd.bad], jobs[bad]
    else:
        jobs[bad] = (jobs[bad][0], Loss(interrupt), *jobs[bad][2:])
    with pytest.raises(error):
        step_many(jobs, threads=2)
    crowd.instead = None
    assert crowd.marks() == before
    assert step_many(crowd.jobs(1)) == [job[0].step(*job[1:]) for job in twin.jobs(1)]
    assert crowd.marks() == twin.marks()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_on_step_comes_after_all_steps(error: type[BaseException]) -> None:
    def report(record: TrainingStep) -> None:
        if record.step == 1:
            raise error

    crowd, twin = Crowd(100, {"log_every": 1}, report), Crowd(100, {"log_every": 1})
    with pytest.raises(error):
        step_many(crowd.jobs(1))
    for job in twin.jobs(1):
        job[0].step(*job[1:])
    assert crowd.marks() == twin.marks()
    assert step_many(crowd.jobs(2)) == [job[0].step(*job[1:]) for job in twin.jobs(2)]
    assert crowd.marks() == twin.marks()


# ---------------------------------------------------------------------- calls inside the call


def test_a_schedule_may_step_those_whose_turn_has_not_come() -> None:
    """Those before it, and its own trainer, are busy; nothing that it does mixes with the call around it."""
    crowd, twin = Crowd(10), Crowd(10)
    inner: list[Any] = []

    def steps() -> float:
        crowd.instead = None
        inner.extend(step_many(crowd.jobs(2)))
        for number in (0, 5):
            with pytest.raises(TrainerBusyError):
                crowd.trainers[number].step(1.0, crowd.adapters[number], *make_pair())
            with pytest.raises(TrainerBusyError):
                crowd.trainers[number].state_dict()
        return 0.02

    crowd.instead = steps
    outer = step_many(crowd.jobs(1), threads=2)
    assert [type(result) for result in inner[:6]] == [TrainerBusyError] * 6
    assert inner[6:] == [job[0].step(*job[1:]) for job in twin.jobs(2)[6:]]
    assert outer == [job[0].step(*job[1:]) for job in twin.jobs(1)]
    assert crowd.marks() == twin.marks()


def test_on_step_may_step_any_trainer_but_its_own() -> None:
    inner: list[Any] = []
    crowd: Crowd | None = None

    def report(record: TrainingStep) -> None:
        if record.step == 1 and crowd is not None:
            inner.extend(step_many(crowd.jobs(2)))

    crowd, twin = Crowd(10, {"log_every": 1}, report), Crowd(10, {"log_every": 1})
    outer = step_many(crowd.jobs(1))
    assert outer == [job[0].step(*job[1:]) for job in twin.jobs(1)]
    assert isinstance(inner[5], TrainerBusyError)
    assert "on_step may read it, but not step it" in str(inner[5])
    records = [job[0].step(*job[1:]) for i, job in enumerate(twin.jobs(2)) if i != 5]
    assert inner[:5] + inner[6:] == records
    assert crowd.marks() == twin.marks()


def test_on_step_reads_all_trainers_after_their_steps() -> None:
    seen: list[list[int]] = []
    crowd: Crowd | None = None

    def report(record: TrainingStep) -> None:
        if crowd is not None:
            seen.append([trainer.state_dict()["history"]["total_steps"] for trainer in crowd.trainers])

    crowd = Crowd(10, {"log_every": 1}, report)
    step_many(crowd.jobs(1))
    assert seen == [[2] * 10]


# ---------------------------------------------------------------------- threads, processes, references


@pytest.mark.parametrize("threads", [1, 2])
def test_four_python_threads_with_trainers_of_their_own(threads: int, shared: None) -> None:
    crowds, twins = [Crowd(40) for _ in range(4)], Crowd(40)

    def work(crowd: Crowd) -> Callable[[], None]:
        def steps() -> None:
            for step in range(1, 60):
                assert not any(isinstance(result, Exception) for result in step_many(crowd.jobs(step), threads=threads))

        return steps

    run_threads(*map(work, crowds))
    for step in range(1, 60):
        for job in twins.jobs(step):
            job[0].step(*job[1:])
    for crowd in crowds:
        assert crowd.marks() == twins.marks()


def test_two_python_threads_with_the_same_trainers_are_refused_or_served() -> None:
    """All gradients of a trainer are equal, so what it is follows from the number of its steps."""
    interval = sys.getswitchinterval()
    adapters, trainers, twins = [make_adapter(i) for i in range(30)], [make_trainer() for _ in range(30)], []
    adapters.append(LoraAdapter(2000, 2000, LoraConfig(rank=16), seed=1))  # large enough to let go of the GIL
    trainers.append(make_trainer())
    jobs = [(t, 1.0, a, *make_pair(0, a)) for t, a in zip(trainers, adapters, strict=True)]
    done, kinds = [0] * len(jobs), set()
    tally = threading.Lock()

    def tries() -> None:
        for _ in range(200):
            results = step_many(jobs)
            with tally:
                for i, result in enumerate(results):
                    kinds.add(type(result))
                    done[i] += isinstance(result, TrainingStep)

    sys.setswitchinterval(1e-6)
    try:
        run_threads(tries, tries)
    finally:
        sys.setswitchinterval(interval)
    assert kinds == {TrainingStep, TrainerBusyError}
    for i, (trainer, adapter) in enumerate(zip(trainers, adapters, strict=True)):
        assert trainer.total_steps() == done[i]
        if i < 30:
            twins = make_adapter(i), make_trainer()
            for _ in range(done[i]):
                twins[1].step(1.0, twins[0], *make_pair(0, twins[0]))
            assert fingerprint(trainer, adapter) == fingerprint(twins[1], twins[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_other_threads_run_meanwhile(threads: int, shared: None) -> None:
    """The interpreter is told never to take the GIL away: a counter moves during the call only if the call lets go."""
    adapters = [LoraAdapter(4096, 4096, LoraConfig(rank=64), seed=i) for i in range(4)]
    jobs = [(make_trainer(history_limit=1), 1.0, a, np.ones(a.param_count(), np.float32)) for a in adapters]
    step_many(jobs)  # the first steps make arrays, as a history does that grows: NumPy lets go of the GIL for it
    counter, stop = itertools.count(), threading.Event()
    ticks = [0]

    def count() -> None:
        while not stop.is_set():
            ticks[0] = next(counter)
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    thread = threading.Thread(target=count)
    try:
        thread.start()
        for _ in range(100):
            before = ticks[0]
            step_many(jobs, threads=threads)
            meanwhile = ticks[0] - before
            if meanwhile > 0:
                break
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert meanwhile > 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_after_shared_steps_goes_on_to_the_same_bits(shared: None) -> None:
    many, twins = [Member(i) for i in range(30)], [Member(i) for i in range(30)]
    for each in (many, twins):
        step_many([member.job(0) for member in each], threads=4)
    for member in twins:
        member.trainer.step(*member.job(1)[1:])
    expected = [member.mark() for member in twins]

    def child() -> None:
        step_many([member.job(1) for member in many], threads=4)
        assert [member.mark() for member in many] == expected
        assert in_child(lambda: step_many([member.job(2) for member in many], threads=2)) == 0

    for _ in range(5):
        assert in_child(child) == 0
    child()


def reference_counts(*objects: Any) -> list[int]:
    gc.collect()
    return [sys.getrefcount(thing) for thing in objects]


@pytest.mark.parametrize("cause", ["success", "skip", "on_step", "interrupt", *CAUSES])
def test_ten_thousand_calls_leave_no_reference(cause: str) -> None:
    config: dict[str, Any] = {"history_limit": 8, "nonfinite": "skip" if cause == "skip" else "raise"}
    config["log_every"] = int(cause == "on_step")
    crowd = Crowd(3, config)
    if cause == "on_step":
        crowd.trainers[1]._adam.attach_report(lambda record: fail(), 1)
    for i in (0, 2):
        crowd.trainers[i] = make_trainer(history_limit=8)
    jobs = crowd.jobs(1)
    loss = 12345.678
    jobs[1] = (jobs[1][0], loss, *jobs[1][2:])
    if cause in CAUSES and cause != "an exception":
        jobs[1] = CAUSES[cause][0](crowd, jobs[1])
    elif cause == "an exception":
        jobs[1] = ValueError("given")
    elif cause == "skip":
        jobs[1] = (*jobs[1][:3], np.full((3, 6), np.nan, np.float32), jobs[1][4])
    elif cause == "interrupt":
        crowd.instead = lambda: (_ for _ in ()).throw(KeyboardInterrupt)

    def calls(times: int) -> None:
        for _ in range(times):
            with contextlib.suppress(KeyboardInterrupt):
                step_many(jobs)

    calls(200)
    things = [None, True, False, loss, TrainingStep, jobs, *jobs, *crowd.trainers, *crowd.adapters]
    things += [item for job in jobs if isinstance(job, tuple) for item in job[1:]]
    before, blocks = reference_counts(*things), sys.getallocatedblocks()
    calls(10_000 if cause in ("success", "NaN", "wrong shape") else 1000)
    after, grown = reference_counts(*things), sys.getallocatedblocks() - blocks
    assert all(abs(a - b) <= 60 for a, b in zip(before, after, strict=True)), list(zip(before, after, strict=True))
    assert grown < 300


def test_a_history_that_another_job_writes_to_refuses_that_step_alone() -> None:
    crowd, twin = Crowd(12), Crowd(12)
    jobs, same = crowd.jobs(1), twin.jobs(1)
    first = crowd.trainers[0]

    def write() -> float:
        first.training_history.append(loss=9.0, learning_rate=0.0, grad_norm=0.0)
        return 1.0

    jobs[5] = (jobs[5][0], Loss(write), *jobs[5][2:])
    same[5] = (same[5][0], 1.0, *same[5][2:])
    before = crowd.adapters[0].flat.vector.copy()
    results = step_many(jobs)
    assert isinstance(results[0], StateError)
    assert "another job wrote to it" in str(results[0])
    assert results[1:] == [job[0].step(*job[1:]) for job in same[1:]]
    assert np.array_equal(crowd.adapters[0].flat.vector, before)
    assert first.training_history[-1].loss == 9.0
    assert crowd.marks()[1:] == twin.marks()[1:]
    assert isinstance(step_many([jobs[0]])[0], TrainingStep)
