"""No call keeps anything it should let go: reference counts, objects and blocks after 10,000 calls of each path."""

import array
import contextlib
import gc
import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from dlpack import FastTensor, NumpyTensor, OldTensor, Tensor
from training import make_adapter, make_pair, make_set, make_trainer

from cylora import (
    Adam,
    AdapterSet,
    CyloraError,
    FlatBuffer,
    Gradients,
    LoraAdapter,
    LoraConfig,
    LoraTrainer,
    LoraTrainingConfig,
    TrainingHistory,
    clip_grad_norm_,
    grad_norm,
)  # fmt: skip

CALLS = 10_000
# The interpreter's own caches and free lists go on filling for a while: at most 300 blocks were seen. A leak of one
# block in ten calls would be 1,000.
SLACK_OBJECTS, SLACK_BLOCKS = 60, 600


class Things:
    """The arguments whose reference counts are watched, and trainers that are past their first step."""

    def __init__(self) -> None:
        self.adapter, self.set, self.stranger = make_adapter(dropout=0.5), make_set(), make_adapter(3)
        self.a, self.b = make_pair()
        self.nan, self.wrong, self.strided = (
            self.a * np.float32(np.nan),
            self.a[:2].copy(),
            np.ones(66, np.float32)[::2],
        )
        self.gradients, self.foreign = Gradients(self.set), Gradients(self.adapter)
        self.array, self.view = array.array("f", self.a.ravel()), memoryview(self.a)
        self.tensor, self.old, self.fast = (kind(self.a) for kind in (Tensor, OldTensor, FastTensor))
        self.numpys, self.on_gpu, self.next_version = NumpyTensor(self.a), Tensor(self.a, device=(2, 0)), Tensor(self.a)
        self.next_version.settings["version"] = (2, 0)
        self.raising, self.converted = self._Raising(), self._Converted(self.a)
        self.used = self.tensor.__dlpack__()
        grad_norm([self._Given(self.used)])
        self.given = self._Given(self.used)
        self.loss, self.bad_loss = 1.25, object()
        self.x, self.g = np.ones((2, 6), np.float32), np.ones((2, 5), np.float32)
        self.weight, self.mask = np.zeros((5, 6), np.float32), np.ones((2, 6), np.bool_)
        self.rng, self.flat = np.random.default_rng(0), FlatBuffer([("x", (3, 4))])
        self.trainer, self.whole = make_trainer(history_limit=4), make_trainer(history_limit=4)
        self.skipping = make_trainer(history_limit=4, nonfinite="skip")
        self.bad_schedule = make_trainer(schedule=lambda step: "x")
        self.failing = make_trainer(schedule=self._raise)
        self.parameters = np.ones(33, np.float32)
        self.adam = Adam(self.parameters)
        self.config = LoraTrainingConfig()
        self.trainer.step(1.0, self.adapter, self.a, self.b)
        self.whole.step(1.0, self.set, self.gradients)
        self.skipping.step(1.0, self.adapter, self.a, self.b)
        self.state, self.history = self.trainer.state_dict(), TrainingHistory(4)
        self.text = self.trainer.training_history[0].to_json()

    @staticmethod
    def _raise(step: int) -> float:
        raise ZeroDivisionError

    class _Raising:
        def __dlpack__(self, **asked: Any) -> Any:
            raise BufferError("never")

    class _Given:
        def __init__(self, capsule: Any) -> None:
            self.capsule = capsule

        def __dlpack__(self, **asked: Any) -> Any:
            return self.capsule

    class _Converted:
        def __init__(self, array: Any) -> None:
            self.array = array

        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return self.array


def _accumulated(t: Things) -> None:
    t.trainer.accumulate(t.loss, t.adapter, t.a, t.b)
    t.trainer.step_accumulated()


def _discarded(t: Things) -> None:
    t.trainer.accumulate(t.loss, t.adapter, t.a, t.b)
    t.trainer.discard_accumulated()


def _pending(t: Things) -> None:
    t.trainer.accumulate(t.loss, t.adapter, t.a, t.b)
    try:
        t.trainer.step(t.loss, t.adapter, t.a, t.b)
    finally:
        t.trainer.discard_accumulated()


PATHS: dict[str, Callable[[Things], Any]] = {
    "step pair": lambda t: t.trainer.step(t.loss, t.adapter, t.a, t.b),
    "step providers": lambda t: t.trainer.step(t.loss, t.adapter, t.array, t.b),
    "step memoryview": lambda t: t.trainer.step(t.loss, t.adapter, t.view, t.b),
    "step DLPack": lambda t: t.trainer.step(t.loss, t.adapter, t.tensor, t.b),
    "step DLPack from before versions": lambda t: t.trainer.step(t.loss, t.adapter, t.old, t.b),
    "step DLPack by C functions": lambda t: t.trainer.step(t.loss, t.adapter, t.fast, t.b),
    "step DLPack of NumPy": lambda t: t.trainer.step(t.loss, t.adapter, t.numpys, t.b),
    "step __array__": lambda t: t.trainer.step(t.loss, t.adapter, t.converted, t.b),
    "accumulate DLPack": lambda t: t.trainer.accumulate(t.loss, t.adapter, t.fast, t.b),
    "grad_norm DLPack": lambda t: grad_norm([t.fast, t.numpys, t.converted, t.tensor.values]),
    "clip_grad_norm_ DLPack": lambda t: clip_grad_norm_([t.fast, t.b], 1.0),
    "step set": lambda t: t.whole.step(t.loss, t.set, t.gradients),
    "step skipped": lambda t: t.skipping.step(t.loss, t.adapter, t.nan, t.b),
    "accumulate and step": _accumulated,
    "accumulate and discard": _discarded,
    "step numpy loss": lambda t: t.trainer.step(np.float32(1), t.adapter, t.a, t.b),
    "state_dict": lambda t: t.trainer.state_dict(),
    "load_state_dict": lambda t: t.trainer.load_state_dict(t.state),
    "Adam.step": lambda t: t.adam.step(t.parameters * np.float32(0.5)),
    "Adam": lambda t: Adam(t.parameters),
    "grad_norm": lambda t: grad_norm([t.a, t.b, t.array]),
    "clip_grad_norm_": lambda t: clip_grad_norm_([t.x, t.g], 1.0),
    "apply": lambda t: t.adapter.apply(t.x, mask=t.mask),
    "apply rng": lambda t: t.adapter.apply(t.x, rng=t.rng),
    "gradients": lambda t: t.adapter.gradients(t.x, t.g, mask=t.mask, out=t.foreign["adapter"]),
    "input_gradient": lambda t: t.adapter.input_gradient(t.g),
    "merge and unmerge": lambda t: (t.adapter.merge_into(t.weight), t.adapter.unmerge_from(t.weight)),
    "history append": lambda t: t.history.append(loss=t.loss, learning_rate=0.1, grad_norm=1.0),
    "history read": lambda t: (t.trainer.training_history[-1], t.trainer.training_history.column("loss")),
    "read_jsonl": lambda t: TrainingHistory.read_jsonl(io.StringIO(t.text), 1),
    "FlatBuffer": lambda t: t.flat.like(),
    "new trainer": lambda t: LoraTrainer(t.config).step(t.loss, t.adapter, t.a, t.b),
    "refused: nan": lambda t: t.trainer.step(t.loss, t.adapter, t.nan, t.b),
    "refused: too large": lambda t: t.adam.step(np.full(33, 1e30, np.float32)),
    "refused: shape of a": lambda t: t.trainer.step(t.loss, t.adapter, t.wrong, t.b),
    "refused: shape of b": lambda t: t.trainer.step(t.loss, t.adapter, t.a, t.wrong),
    "refused: strides": lambda t: t.trainer.step(t.loss, t.adapter, t.strided),
    "refused: no buffer": lambda t: t.trainer.step(t.loss, t.adapter, t.bad_loss, t.b),
    "refused: DLPack on a GPU": lambda t: t.trainer.step(t.loss, t.adapter, t.on_gpu, t.b),
    "refused: DLPack of another version": lambda t: t.trainer.step(t.loss, t.adapter, t.next_version, t.b),
    "refused: DLPack, shape of b": lambda t: t.trainer.step(t.loss, t.adapter, t.fast, t.tensor),
    "refused: DLPack raises": lambda t: t.trainer.step(t.loss, t.adapter, t.raising, t.b),
    "refused: DLPack used up": lambda t: t.trainer.step(t.loss, t.adapter, t.given, t.b),
    "refused: DLPack, loss": lambda t: t.trainer.step(t.bad_loss, t.adapter, t.numpys, t.b),
    "refused: DLPack not to be written": lambda t: clip_grad_norm_([t.fast, t.old], 1.0),
    "refused: clip __array__": lambda t: clip_grad_norm_([t.converted], 1.0),
    "refused: None": lambda t: t.trainer.step(t.loss, t.adapter, None),
    "refused: overlap": lambda t: t.trainer.step(t.loss, t.adapter, t.adapter.flat.vector),
    "refused: loss": lambda t: t.trainer.step(t.bad_loss, t.adapter, t.a, t.b),
    "refused: rate": lambda t: t.bad_schedule.step(t.loss, t.adapter, t.a, t.b),
    "refused: schedule raises": lambda t: t.failing.step(t.loss, t.adapter, t.a, t.b),
    "refused: stranger": lambda t: t.trainer.step(t.loss, t.stranger, t.a, t.b),
    "refused: no adapter": lambda t: t.trainer.step(t.loss, t.bad_loss, t.a, t.b),
    "refused: gradients of another": lambda t: t.whole.step(t.loss, t.set, t.foreign),
    "refused: pair for a set": lambda t: t.whole.step(t.loss, t.set, t.a, t.b),
    "refused: pending": _pending,
    "refused: nothing accumulated": lambda t: t.trainer.step_accumulated(),
    "refused: accumulate nan": lambda t: t.trainer.accumulate(t.loss, t.adapter, t.nan, t.b),
    "refused: accumulate shape": lambda t: t.trainer.accumulate(t.loss, t.adapter, t.a, t.wrong),
    "refused: weight": lambda t: t.trainer.accumulate(t.loss, t.adapter, t.a, t.b, weight=t.bad_loss),
    "refused: Adam.step": lambda t: t.adam.step(t.a),
    "refused: Adam": lambda t: Adam(t.strided),
    "refused: grad_norm": lambda t: grad_norm([t.a, t.b, t.strided, t.a]),
    "refused: clip": lambda t: clip_grad_norm_([t.a, t.bad_loss], 1.0),
    "refused: clip overlap": lambda t: clip_grad_norm_([t.a, t.a], 1.0),
    "refused: clip nan": lambda t: clip_grad_norm_([t.a, t.nan], 1.0),
    "refused: state": lambda t: t.trainer.load_state_dict(t.state | {"version": 99}),
    "refused: bad history": lambda t: t.trainer.load_state_dict(t.state | {"history": {}}),
    "refused: apply": lambda t: t.adapter.apply(t.g),
    "refused: gradients": lambda t: t.adapter.gradients(t.x, t.g),
    "refused: merge": lambda t: t.adapter.merge_into(t.x),
    "refused: jsonl": lambda t: TrainingHistory.read_jsonl(io.StringIO("{}")),
    "refused: set": lambda t: AdapterSet({"a": (0, 1)}, seed=0),
    "refused: adapter": lambda t: LoraAdapter(4, 0, seed=0),
    "refused: config": lambda t: LoraConfig(rank=0),
}  # fmt: skip


def many(call: Callable[[Things], Any], things: Things, times: int) -> None:
    for _ in range(times):
        with contextlib.suppress(CyloraError, ZeroDivisionError):
            call(things)


def counted(things: Things) -> tuple[dict[str, int], int, int]:
    gc.collect()
    counts = {name: sys.getrefcount(value) for name, value in vars(things).items()}
    return counts, len(gc.get_objects()), sys.getallocatedblocks()


@pytest.mark.parametrize("path", PATHS)
def test_ten_thousand_calls_keep_nothing(path: str) -> None:
    things, call = Things(), PATHS[path]
    if path.startswith("refused"):
        with pytest.raises((CyloraError, ZeroDivisionError)):
            call(things)
    else:
        call(things)
    many(call, things, 500)
    references, objects, blocks = counted(things)
    many(call, things, CALLS)
    references_after, objects_after, blocks_after = counted(things)
    assert references_after == references
    assert objects_after <= objects + SLACK_OBJECTS
    assert blocks_after <= blocks + SLACK_BLOCKS


def test_the_count_notices_a_leak() -> None:
    """Each of the three would see a call that keeps its argument, or an object of its own, or memory."""
    kept: list[Any] = []
    things = Things()
    before = counted(things)
    many(lambda t: kept.append(t.a), things, 100)
    assert counted(things)[0]["a"] == before[0]["a"] + 100
    many(lambda t: kept.append([]), things, CALLS // 10)
    assert counted(things)[1] > before[1] + SLACK_OBJECTS
    assert counted(things)[2] > before[2] + SLACK_BLOCKS
