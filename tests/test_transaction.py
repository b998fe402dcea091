"""A step happens wholly or not at all: after each way to refuse one, every byte is as before and the next step as ever.

Each cause is tried on an adapter and on a set, with history unlimited and limited, at the first step, after some steps,
and just where the history's arrays are full, so that a refused step would have grown them.
"""

import array
import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from training import fingerprint, make_adapter, make_set

from cylora import (
    AdapterSet,
    Gradients,
    InputError,
    LoraAdapter,
    LoraConfig,
    LoraTrainer,
    LoraTrainingConfig,
    NonFiniteGradientError,
    StateError,
    TrainerBusyError,
    history,
)  # fmt: skip

NAN, INF = math.nan, math.inf
BFLOAT16 = ml_dtypes.bfloat16
HALVES = (np.float16, BFLOAT16, np.uint16)


class SwitchedSchedule:
    """A schedule that is well-behaved until a test gives it something else to do."""

    def __init__(self) -> None:
        self.instead: Callable[[int], Any] | None = None

    def __call__(self, step: int) -> Any:
        return 0.01 / (1 + step) if self.instead is None else self.instead(step)


@dataclass
class Setting:
    """A trainer with its adapters, ready to be given a bad step."""

    adapters: LoraAdapter | AdapterSet
    config: dict[str, Any]
    dtype: Any = np.float32  # of good gradients
    schedule: SwitchedSchedule = field(default_factory=SwitchedSchedule)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def __post_init__(self) -> None:
        settings = {"max_grad_norm": INF, "log_every": 0, "schedule": self.schedule} | self.config
        self.trainer = LoraTrainer(LoraTrainingConfig(**settings))

    @property
    def size(self) -> int:
        return self.adapters.param_count()

    def vector(self) -> np.ndarray:
        return self.rng.normal(size=self.size).astype(self.dtype)

    def good_step(self) -> None:
        self.trainer.step(float(self.rng.normal()), self.adapters, self.vector())

    def spoilt(self, index: int, value: float) -> np.ndarray:
        gradient = np.full(self.size, 0.5, np.float32)
        gradient[index] = value
        return gradient

    def step(self, gradient: Any, loss: Any = 1.0, adapters: Any = None) -> None:
        self.trainer.step(loss, self.adapters if adapters is None else adapters, gradient)

    @contextmanager
    def scheduled(self, instead: Callable[[int], Any]) -> Iterator[None]:
        self.schedule.instead = instead
        try:
            yield
        finally:
            self.schedule.instead = None


def _with_schedule(instead: Callable[[Setting, int], Any]) -> Callable[[Setting], None]:
    def cause(s: Setting) -> None:
        with s.scheduled(lambda step: instead(s, step)):
            s.step(np.ones(s.size, np.float32))

    return cause


def _raises(error: BaseException) -> Callable[[Setting, int], Any]:
    def instead(s: Setting, step: int) -> Any:
        raise error

    return instead


class _Number:
    """A number whose conversion to float does something else."""

    def __init__(self, convert: Callable[[], Any]) -> None:
        self.convert = convert

    def __float__(self) -> float:
        return self.convert()


def _fail() -> float:
    raise ZeroDivisionError


def _misaligned(s: Setting, dtype: Any = np.float32) -> np.ndarray:
    raw = np.zeros((s.size + 1) * np.dtype(dtype).itemsize, np.uint8)
    return raw[1 : 1 + s.size * np.dtype(dtype).itemsize].view(dtype)


def _spoilt_half(s: Setting, index: int, value: float, dtype: Any) -> np.ndarray:
    """Return a gradient of halves; as uint16 the bits of bfloat16."""
    gradient = s.spoilt(index, value).astype(BFLOAT16 if dtype is np.uint16 else dtype)
    return gradient.view(dtype)


def _pending(s: Setting) -> None:
    s.trainer.accumulate(1.0, s.adapters, np.ones(s.size, np.float32))
    try:
        s.step(np.ones(s.size, np.float32))
    finally:
        s.trainer.discard_accumulated()


def _moments(s: Setting) -> None:
    moments = s.trainer._adam._moments.stored_m if s.trainer._adam else s.adapters.flat.vector
    s.step(moments if moments.dtype == np.float32 else s.adapters.flat.vector)


def _stored_moments(s: Setting) -> None:
    """The bytes of the moments, as halves: of bfloat16 state they even have the right number."""
    moments = s.trainer._adam._moments.stored_m if s.trainer._adam else s.adapters.flat.vector
    if moments.itemsize == 1:
        moments = s.adapters.flat.vector
    s.step(moments.view(np.uint16)[-s.size :])


def _loss_that_steps(s: Setting) -> None:
    s.step(np.ones(s.size, np.float32), _Number(lambda: s.step(np.ones(s.size, np.float32))))


def _a_set_as_pair(s: Setting) -> None:
    half = np.ones(s.size // 2, np.float32)
    s.trainer.step(1.0, s.adapters, half, half)


SHAPE, BUSY, RATE = (
    r"must be a C-contiguous, aligned array of float32, float16, bfloat16 or \(bfloat16's bits\) uint16 of shape",
    "this trainer is busy",
    "learning rate must be a number",
)
LOSS, TOO_LARGE = "loss must be a real number, got", r"norm must be at most 2\^63"
CAUSES: list[tuple[str, Callable[[Setting], None], type[BaseException], str | None]] = [
    *[
        (f"{value} in {where}", lambda s, i=index, v=value: s.step(s.spoilt(i(s), v)), NonFiniteGradientError,
         f"gradient of .* must be finite, got {value} at")
        for value in (NAN, INF, -INF)
        for where, index in {
            "first of A": lambda s: 0, "middle": lambda s: s.size // 2, "last of B": lambda s: s.size - 1,
        }.items()
    ],
    ("all NaN", lambda s: s.step(np.full(s.size, NAN, "f4")), NonFiniteGradientError, "gradient of .* must be finite"),
    ("norm too large", lambda s: s.step(np.full(s.size, 3e38, "f4")), NonFiniteGradientError, TOO_LARGE),
    ("one element too large", lambda s: s.step(s.spoilt(3, 1e19)), NonFiniteGradientError, TOO_LARGE),
    ("too short", lambda s: s.step(np.ones(s.size - 1, np.float32)), InputError, SHAPE),
    ("too long", lambda s: s.step(np.ones(s.size + 1, np.float32)), InputError, SHAPE),
    ("empty", lambda s: s.step(np.ones(0, np.float32)), InputError, SHAPE),
    ("a row", lambda s: s.step(np.ones((1, s.size), np.float32)), InputError, SHAPE),
    ("a column", lambda s: s.step(np.ones((s.size, 1), np.float32)), InputError, SHAPE),
    ("0-d", lambda s: s.step(np.float32(1)), InputError, SHAPE),
    *[
        (f"dtype {dtype}", lambda s, d=dtype: s.step(np.ones(s.size, d)), InputError, SHAPE)
        for dtype in ("f8", ">f4", ">f2", ">u2", "i2", "i4", "u4", "c8", "O", "S4", "V4", "V2")
    ],
    *[
        (f"{value} in {np.dtype(dtype)} at {where}",
         lambda s, i=index, v=value, d=dtype: s.step(_spoilt_half(s, i(s), v, d)), NonFiniteGradientError,
         f"gradient of .* must be finite, got {value} at")
        for value in (NAN, -INF)
        for where, index in {"the first": lambda s: 0, "the last": lambda s: s.size - 1}.items()
        for dtype in HALVES
    ],
    ("bfloat16 too large", lambda s: s.step(np.full(s.size, 3e38, BFLOAT16)), NonFiniteGradientError, TOO_LARGE),
    *[
        (f"{what} {np.dtype(dtype)}", lambda s, d=dtype, f=make: s.step(f(s, d)), InputError, message)
        for what, make, message in (
            ("short", lambda s, d: np.ones(s.size - 1, d), SHAPE),
            ("row of", lambda s, d: np.ones((1, s.size), d), SHAPE),
            ("strided", lambda s, d: np.ones(2 * s.size, d)[::2], SHAPE),
            ("misaligned", _misaligned, SHAPE),
        )
        for dtype in HALVES
    ],
    ("the parameters as halves", lambda s: s.step(s.adapters.flat.vector.view(np.float16)[: s.size]), InputError,
     "must not overlap the parameters"),
    ("the stored moments", _stored_moments, InputError, "must not overlap the parameters"),
    ("strided", lambda s: s.step(np.ones(2 * s.size, np.float32)[::2]), InputError, "strides"),
    ("backwards", lambda s: s.step(np.ones(s.size, np.float32)[::-1]), InputError, "strides"),
    ("broadcast", lambda s: s.step(np.broadcast_to(np.float32(1), s.size)), InputError, "strides"),
    ("misaligned", lambda s: s.step(_misaligned(s)), InputError, "misaligned"),
    ("a list", lambda s: s.step([1.0] * s.size), InputError, "got list, which offers no buffer"),
    ("None", lambda s: s.step(None), InputError, "got NoneType, which offers no buffer"),
    ("doubles", lambda s: s.step(array.array("d", [1.0] * s.size)), InputError, "format 'd'"),
    ("bytes", lambda s: s.step(bytes(4 * s.size)), InputError, "format 'B'"),
    ("int32 of ctypes", lambda s: s.step((ctypes.c_int32 * s.size)()), InputError, "format '<i'"),
    ("the parameters", lambda s: s.step(s.adapters.flat.vector), InputError, "must not overlap the parameters"),
    ("the moments", _moments, InputError, "must not overlap the parameters"),
    ("gradients of others", lambda s: s.step(Gradients(make_adapter(0, alpha=1) if isinstance(s.adapters, AdapterSet)
                                                       else make_set())), InputError, "must be a Gradients made for"),
    ("a pair of wrong sizes", _a_set_as_pair, InputError, "grad_a must be|got a pair"),
    ("no adapter", lambda s: s.step(np.ones(s.size, "f4"), adapters=3), InputError, "adapter must be a LoraAdapter or"),
    *[
        (f"loss {loss!r}", lambda s, x=loss: s.step(np.ones(s.size, np.float32), x), InputError, LOSS)
        for loss in (None, "1.0", b"1", True, 1j, [1.0], np.ones(1), np.ones((2, 2)), {}, 10**400, np.complex64(1))
    ],
    ("loss that raises", lambda s: s.step(np.ones(s.size, "f4"), _Number(_fail)), ZeroDivisionError, None),
    ("loss that is not converted", lambda s: s.step(np.ones(s.size, "f4"), _Number(lambda: "1")), InputError, LOSS),
    ("loss that steps", _loss_that_steps, TrainerBusyError, BUSY),
    *[
        (f"schedule returns {rate!r}", _with_schedule(lambda s, step, r=rate: r), InputError, RATE)
        for rate in (None, "0.1", NAN, INF, -1e-9, 1.1e6, True, 1j, [0.1], np.ones(1))
    ],
    *[
        (f"schedule raises {error!r}", _with_schedule(_raises(error)), type(error), None)
        for error in (
            ValueError("x"), KeyboardInterrupt(), SystemExit(3), MemoryError(), StopIteration(), GeneratorExit(),
        )
    ],
    ("schedule steps", _with_schedule(lambda s, step: s.step(np.ones(s.size, "f4"))), TrainerBusyError, BUSY),
    ("schedule accumulates", _with_schedule(
        lambda s, step: s.trainer.accumulate(1.0, s.adapters, np.ones(s.size, "f4"))), TrainerBusyError, BUSY),
    ("schedule loads", _with_schedule(
        lambda s, step: s.trainer.load_state_dict(LoraTrainer().state_dict())), TrainerBusyError, BUSY),
    ("schedule saves", _with_schedule(lambda s, step: s.trainer.state_dict()), TrainerBusyError, BUSY),
    ("schedule discards", _with_schedule(lambda s, step: s.trainer.discard_accumulated()), TrainerBusyError, BUSY),
    ("micro-batches wait", _pending, StateError, "1 micro-batches wait"),
    ("no micro-batches", lambda s: s.trainer.step_accumulated(), StateError, "needs at least one accumulated"),
]  # fmt: skip
TIMES = {"at first": 0, "after some": 3, "where the arrays are full": 8}


def make(kind: str, limit: int | None) -> Setting:
    return Setting(make_adapter() if kind == "adapter" else make_set(), {"history_limit": limit})


def test_there_are_enough_causes() -> None:
    assert len(CAUSES) >= 45
    assert len({name for name, *_ in CAUSES}) == len(CAUSES)


@pytest.mark.parametrize("kind", ["adapter", "set"])
@pytest.mark.parametrize(("name", "cause", "error", "message"), CAUSES, ids=[name for name, *_ in CAUSES])
def test_a_refused_step_leaves_every_byte(
    name: str,
    cause: Callable[[Setting], None],
    error: type[BaseException],
    message: str | None,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(history, "FIRST_CAPACITY", 8)
    for limit in (None, 8):
        for steps in TIMES.values():
            setting, twin = make(kind, limit), make(kind, limit)
            for one in (setting, twin):
                for _ in range(steps):
                    one.good_step()
            host = np.random.get_state(), np.geterr(), np.geterrcall()  # noqa: NPY002 - the host's own generator
            before = fingerprint(setting.trainer, setting.adapters, setting.rng)
            with pytest.raises(error, match=message):
                cause(setting)
            assert fingerprint(setting.trainer, setting.adapters, setting.rng) == before
            assert fingerprint(setting.trainer, setting.adapters) == fingerprint(twin.trainer, twin.adapters)
            assert str((np.random.get_state(), np.geterr(), np.geterrcall())) == str(host)  # noqa: NPY002
            setting.rng = np.random.default_rng(5)
            twin.rng = np.random.default_rng(5)
            for one in (setting, twin):
                one.good_step()
                one.good_step()
            assert fingerprint(setting.trainer, setting.adapters) == fingerprint(twin.trainer, twin.adapters)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_a_refused_step_leaves_every_byte_of_compact_state(state_dtype: str, dtype: Any) -> None:
    """Of more than one chunk, the last one short, after gradients in halves; the next steps are a twin's."""
    for name, cause, error, message in CAUSES:
        for steps in (0, 3):
            sets = (AdapterSet({"a": (90, 40), "b": (50, 7)}, LoraConfig(rank=4), seed=0) for _ in range(2))
            setting, twin = (Setting(adapters, {"state_dtype": state_dtype}, dtype) for adapters in sets)
            for one in (setting, twin):
                for _ in range(steps):
                    one.good_step()
            before = fingerprint(setting.trainer, setting.adapters)
            with pytest.raises(error, match=message):
                cause(setting)
            assert fingerprint(setting.trainer, setting.adapters) == before, name
            for one in (setting, twin):
                one.rng = np.random.default_rng(5)
                one.good_step()
                one.good_step()
            assert setting.trainer._adam._moments.dtype == state_dtype
            assert fingerprint(setting.trainer, setting.adapters) == fingerprint(twin.trainer, twin.adapters), name


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", HALVES)
def test_skipping_keeps_compact_state(state_dtype: str, dtype: Any) -> None:
    """The skipped steps do not count for the noise either: the next good step is that of a twin that met none."""
    setting, twin = (Setting(make_set(), {"nonfinite": "skip", "state_dtype": state_dtype}) for _ in range(2))
    for one in (setting, twin):
        one.good_step()
    before = fingerprint(setting.adapters, setting.trainer._adam._moments.to_dict())
    for index in range(50):
        setting.step(_spoilt_half(setting, index, INF, dtype))
    assert fingerprint(setting.adapters, setting.trainer._adam._moments.to_dict()) == before
    assert (setting.trainer._adam.t, setting.trainer.skipped_steps()) == (1, 50)
    for one in (setting, twin):
        one.schedule.instead = lambda step: 0.01
        one.good_step()
    assert fingerprint(setting.adapters, setting.trainer._adam._moments.to_dict()) == fingerprint(
        twin.adapters, twin.trainer._adam._moments.to_dict()
    )


@pytest.mark.parametrize("kind", ["adapter", "set"])
def test_a_thousand_refusals_in_a_row_leave_every_byte(kind: str) -> None:
    setting, twin = make(kind, None), make(kind, None)
    for one in (setting, twin):
        one.good_step()
    before = fingerprint(setting.trainer, setting.adapters)
    for index in range(1000):
        with pytest.raises(NonFiniteGradientError):
            setting.step(setting.spoilt(index % setting.size, NAN))
    assert fingerprint(setting.trainer, setting.adapters) == before
    for one in (setting, twin):
        one.good_step()
    assert fingerprint(setting.trainer, setting.adapters) == fingerprint(twin.trainer, twin.adapters)


@pytest.mark.parametrize("matrix", ["A", "B"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_message_names_matrix_and_element(matrix: str, value: float) -> None:
    adapter = make_adapter()
    for place in np.ndindex(adapter.flat[matrix].shape):
        pair = {"A": np.ones((3, 6), np.float32), "B": np.ones((5, 3), np.float32)}
        pair[matrix][place] = value
        with pytest.raises(NonFiniteGradientError) as caught:
            LoraTrainer().step(1.0, adapter, pair["A"], pair["B"])
        assert str(caught.value) == f"gradient of {matrix} must be finite, got {value} at [{place[0]}, {place[1]}]"


def test_an_interrupt_while_the_history_grows_does_not_lose_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays are new by then: a kernel that went on with the old ones would write over the first records."""
    monkeypatch.setattr(history, "FIRST_CAPACITY", 8)
    setting, twin = make("adapter", None), make("adapter", None)
    for one in (setting, twin):
        for _ in range(8):
            one.good_step()
    make_room = history.TrainingHistory.make_room

    def interrupted(self: history.TrainingHistory, known: int = 0) -> bool:
        make_room(self, known)
        raise KeyboardInterrupt

    before = fingerprint(setting.trainer, setting.adapters)
    with monkeypatch.context() as patch:
        patch.setattr(history.TrainingHistory, "make_room", interrupted)
        with pytest.raises(KeyboardInterrupt):
            setting.step(np.ones(setting.size, np.float32))
    assert fingerprint(setting.trainer, setting.adapters) == before
    for one in (setting, twin):
        for _ in range(30):
            one.good_step()
    assert fingerprint(setting.trainer, setting.adapters) == fingerprint(twin.trainer, twin.adapters)


@pytest.mark.parametrize("limit", [None, 8])
def test_skipping_keeps_parameters_moments_and_count(limit: int | None) -> None:
    setting = Setting(make_set(), {"nonfinite": "skip", "history_limit": limit})
    setting.good_step()
    before = [x.tobytes() for x in (setting.adapters.flat.vector, setting.trainer._adam.m, setting.trainer._adam.v)]
    for index in range(50):
        setting.step(setting.spoilt(index, NAN))
    assert [
        x.tobytes() for x in (setting.adapters.flat.vector, setting.trainer._adam.m, setting.trainer._adam.v)
    ] == before
    assert (setting.trainer._adam.t, setting.trainer.total_steps(), setting.trainer.skipped_steps()) == (1, 51, 50)
