"""Any order of steps, refused steps, saves, loads, forks, publications and rollbacks, against a model in plain Python.

The model is a value: numbers, tuples and the bytes of the arrays. Only a step makes new bytes, and those are judged by
the oracle's bounds; whatever else happens must leave or bring back exactly the bytes that the model says.
"""

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import bounds
import numpy as np
import pytest
from bounds import Case, Outcome
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from reference import Rule
from test_fork import in_child
from training import fingerprint

from cylora import AdapterSet, FormatError, InputError, LoraConfig, LoraTrainer, LoraTrainingConfig, StateError
from cylora.errors import NonFiniteGradientError, PublishError
from cylora.formats.checkpoint import load_checkpoint, save_checkpoint
from cylora.formats.peft import load_peft
from cylora.kernels.threads import configure
from cylora.serving import AdapterPublisher, AdapterSnapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

RATE, WARMUP, END, BETAS, DECAY = 1e-2, 3, 30, (0.9, 0.999), 0.01
KEEP, KEEP_ON_DISK = 3, 2
SHAPES = {"small": {"k": (3, 2), "q": (2, 2)}, "of two blocks": {"k": (400, 150), "q": (500, 20)}}
RANK = {"small": 1, "of two blocks": 8}


class State(NamedTuple):
    """All that training continues from. A record is loss, rate, norm (in words, for NaN) and whether it was skipped."""

    p: bytes
    m: bytes
    v: bytes
    applied: int
    records: tuple[tuple[float, float, str, bool], ...] = ()
    waiting: tuple[tuple[float, bytes], ...] = ()  # micro-batches: loss and gradient


class Version(NamedTuple):
    """What was published: parameters, and after how many steps."""

    p: bytes
    step: int


def rate(step: int) -> float:
    """Return warm-up and half a cosine."""
    if step < WARMUP:
        return RATE * step / WARMUP
    return 0.5 * RATE * (1 + math.cos(math.pi * min(1.0, (step - WARMUP) / (END - WARMUP))))


def floats(content: bytes) -> Any:
    return np.frombuffer(content, np.float32)


SEEDS, LOSSES, SLOTS = st.integers(0, 99), st.sampled_from([0.0, 0.25, 1.5, -2.0, 1e300]), st.integers(0, 2)


class Training(RuleBasedStateMachine):
    """A trainer with a publisher, files and readers, and beside it what they must hold."""

    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="cylora-stateful-"))
        (self.folder / "published").mkdir()
        self.counts["machines"] += 1

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize(
        size=st.sampled_from(sorted(SHAPES)), limit=st.sampled_from([None, 4]), threads=st.sampled_from([1, 3]),
        mode=st.sampled_from(["decoupled", "l2"]), max_norm=st.sampled_from([0.5, math.inf]),
        nonfinite=st.sampled_from(["raise", "skip"]),
    )  # fmt: skip
    def begin(self, size: str, limit: int | None, threads: int, mode: str, max_norm: float, nonfinite: str) -> None:
        lora = LoraConfig(rank=RANK[size])
        self.config = LoraTrainingConfig(
            lora_config=lora, learning_rate=RATE, warmup_steps=WARMUP, max_steps=END, schedule="cosine", log_every=0,
            weight_decay=DECAY, weight_decay_mode=mode, max_grad_norm=max_norm, nonfinite=nonfinite, threads=threads,
            history_limit=limit,
        )  # fmt: skip
        self.rule = Rule(RATE, *BETAS, weight_decay=DECAY, mode=mode, max_norm=max_norm)
        self.adapters, self.trainer = AdapterSet(SHAPES[size], lora, seed=0), LoraTrainer(self.config)
        self.size = self.adapters.param_count()
        zeros = bytes(4 * self.size)
        self.state = State(self.adapters.flat.vector.tobytes(), zeros, zeros, 0)
        self.saved: dict[int, State] = {}
        self.remembered: dict[int, tuple[State, dict[str, Any]]] = {}
        self.held: list[tuple[AdapterSnapshot, bytes]] = []
        self.on_disk: tuple[int, ...] = ()
        self.serve()

    def serve(self) -> None:
        """Publish from now on what is trained now."""
        self.publisher = AdapterPublisher(self.adapters, self.trainer, keep=KEEP)
        self.versions: dict[int, Version] = {}
        self.last_version = 0

    # ------------------------------------------------------------------ what is

    def observed(self) -> State:
        """Return what the trainer and its adapters hold; of the records those that are kept."""
        whole = self.trainer.state_dict()
        adam, history = whole["adam"], self.trainer.training_history
        m, v, applied = (bytes(4 * self.size),) * 2 + (0,)
        if adam is not None:
            m, v, applied = adam["m"].tobytes(), adam["v"].tobytes(), adam["t"]
        records = tuple((one.loss, one.learning_rate, repr(one.grad_norm), one.skipped) for one in history)
        return State(self.adapters.flat.vector.tobytes(), m, v, applied, records)

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        state, got = self.state, self.observed()
        total, limit = len(state.records), self.config.history_limit or len(state.records)
        kept = state.records[max(0, total - limit) :]
        assert got == state._replace(records=kept, waiting=())
        assert self.trainer.total_steps() == total
        assert self.trainer.skipped_steps() == sum(skipped for *_, skipped in state.records)
        assert [one.step for one in self.trainer.training_history] == list(range(total - len(kept), total))
        losses = [loss for loss, *_ in state.records]
        mean = sum(losses) / total if total else 0.0
        assert self.trainer.average_loss() == pytest.approx(mean, rel=1e-12, abs=1e-12)
        assert self.trainer.accumulated == len(state.waiting)
        assert self.trainer.current_lr() == pytest.approx(rate(total), rel=1e-12)
        assert self.trainer.is_complete() == (total >= END)

    @invariant()
    def versions_are_as_the_model_says(self) -> None:
        assert self.publisher.versions == tuple(self.versions)
        for number, version in self.versions.items():
            snapshot = self.publisher.get(number)
            assert (snapshot.version, snapshot.step) == (number, version.step)
            assert snapshot.vector.tobytes() == version.p
        latest = self.publisher.latest
        assert (0 if latest is None else latest.version) == self.last_version
        for snapshot, content in self.held:
            assert snapshot.vector.tobytes() == content

    # ------------------------------------------------------------------ steps

    def gradient(self, seed: int) -> Any:
        """Return multiples of 12/64, whose mean over up to four is exact in float32; some elements are 0."""
        return (np.random.default_rng(seed).integers(-9, 10, self.size) * (12 / 64)).astype(np.float32)

    def stepped(self, record: Any, loss: float, gradient: Any) -> None:
        """Judge a step by the oracle, and let the model have its bytes."""
        before, after, total = self.state, self.observed(), len(self.state.records)
        judged = Case(
            floats(before.p), gradient, floats(before.m), floats(before.v), before.applied + 1,
            self.rule._replace(rate=record.learning_rate),
        )  # fmt: skip
        bounds.check_outcome(judged, Outcome(floats(after.p), floats(after.m), floats(after.v), record.grad_norm))
        assert (record.step, record.loss, record.skipped) == (total, loss, False)
        assert record.learning_rate == pytest.approx(rate(total), rel=1e-12)
        records = (*before.records, (loss, record.learning_rate, repr(record.grad_norm), False))
        self.state = State(after.p, after.m, after.v, before.applied + 1, records)

    @rule(seed=SEEDS, loss=LOSSES)
    def step(self, seed: int, loss: float) -> None:
        self.counts["step"] += 1
        gradient = self.gradient(seed)
        if self.state.waiting:
            with pytest.raises(StateError, match="micro-batches wait"):
                self.trainer.step(loss, self.adapters, gradient)
            return
        self.stepped(self.trainer.step(loss, self.adapters, gradient), loss, gradient)

    @rule(cause=st.sampled_from(["nan", "inf", "size", "dtype", "loss", "adapters", "overlap"]), place=SEEDS)
    def bad_step(self, cause: str, place: int) -> None:
        self.counts["bad step"] += 1
        gradient, loss, adapters = self.gradient(0), 1.0, self.adapters
        errors: tuple[type[Exception], ...] = (InputError,)
        if cause in ("nan", "inf"):
            gradient[place % self.size], errors = float(cause), (NonFiniteGradientError,)
        elif cause == "size":
            gradient = gradient[1:]
        elif cause == "dtype":
            gradient = gradient.astype(np.float64)
        elif cause == "overlap":
            gradient = self.adapters.flat.vector
        elif cause == "loss":
            loss = None  # type: ignore[assignment]
        else:
            adapters, errors = AdapterSet({"other": (4, 4)}, LoraConfig(rank=1), seed=0), (InputError, StateError)
        if NonFiniteGradientError in errors and self.config.nonfinite == "skip" and not self.state.waiting:
            record = self.trainer.step(loss, adapters, gradient)
            assert record.skipped
            one = (loss, record.learning_rate, repr(record.grad_norm), True)
            assert not math.isfinite(record.grad_norm)
            self.state = self.state._replace(records=(*self.state.records, one))
            return
        with pytest.raises((*errors, StateError) if self.state.waiting else errors):
            self.trainer.step(loss, adapters, gradient)

    @precondition(lambda self: len(self.state.waiting) < 4)
    @rule(seed=SEEDS, loss=LOSSES)
    def accumulate(self, seed: int, loss: float) -> None:
        self.counts["accumulate"] += 1
        gradient = self.gradient(seed)
        self.trainer.accumulate(loss, self.adapters, gradient)
        self.state = self.state._replace(waiting=(*self.state.waiting, (loss, gradient.tobytes())))

    @rule()
    def step_accumulated(self) -> None:
        self.counts["step accumulated"] += 1
        waiting = self.state.waiting
        if not waiting:
            with pytest.raises(StateError, match="got none"):
                self.trainer.step_accumulated()
            return
        mean = sum(floats(gradient).astype(np.float64) for _, gradient in waiting) / len(waiting)
        record = self.trainer.step_accumulated(self.adapters)
        assert record.loss == pytest.approx(sum(loss for loss, _ in waiting) / len(waiting), rel=1e-12, abs=1e-12)
        self.stepped(record, record.loss, mean.astype(np.float32))

    @rule()
    def discard_accumulated(self) -> None:
        self.counts["discard"] += 1
        self.trainer.discard_accumulated()
        self.state = self.state._replace(waiting=())

    # ------------------------------------------------------------------ saving, loading, forking

    @rule(slot=SLOTS)
    def save(self, slot: int) -> None:
        self.counts["save"] += 1
        save_checkpoint(self.trainer, self.adapters, self.folder / f"{slot}", generation=slot)
        self.saved[slot] = self.state

    @rule(slot=SLOTS)
    def load(self, slot: int) -> None:
        """A new trainer with new adapters goes on; readers keep what they hold."""
        self.counts["load"] += 1
        if slot not in self.saved:
            with pytest.raises(FileNotFoundError):
                load_checkpoint(self.folder / f"{slot}")
            return
        self.trainer, self.adapters, generation, _, _ = load_checkpoint(self.folder / f"{slot}")
        assert generation == slot
        self.state = self.saved[slot]
        self.serve()

    @rule(slot=SLOTS, place=st.integers(0, 10**6))
    def load_damaged(self, slot: int, place: int) -> None:
        self.counts["load damaged"] += 1
        if slot not in self.saved:
            return
        content = bytearray((self.folder / f"{slot}").read_bytes())
        content[place % len(content)] ^= 0x10
        (self.folder / "damaged").write_bytes(content)
        with pytest.raises(FormatError):
            load_checkpoint(self.folder / "damaged")

    @rule(slot=SLOTS)
    def remember(self, slot: int) -> None:
        self.counts["remember"] += 1
        self.remembered[slot] = self.state, self.trainer.state_dict()

    @rule(slot=SLOTS)
    def go_back(self, slot: int) -> None:
        """The same trainer and the same adapters, so the publisher goes on."""
        self.counts["go back"] += 1
        if slot in self.remembered:
            self.state, state = self.remembered[slot]
            self.trainer.load_state_dict(state)
            self.trainer.hold(self.adapters, lambda _: np.copyto(self.adapters.flat.vector, floats(self.state.p)))

    @rule(seed=SEEDS)
    def fork(self, seed: int) -> None:
        """The child steps, publishes and saves. Of that the parent sees the file, and then does the same step."""
        self.counts["fork"] += 1
        gradient, path = self.gradient(seed), self.folder / "child"
        if self.state.waiting:
            self.discard_accumulated()

        def work() -> None:
            self.trainer.step(0.5, self.adapters, gradient)
            snapshot = self.publisher.publish()
            assert snapshot.version == self.last_version + 1
            assert snapshot.vector.tobytes() == self.adapters.flat.vector.tobytes()
            save_checkpoint(self.trainer, self.adapters, path)

        assert in_child(work) == 0
        self.versions_are_as_the_model_says()
        self.stepped(self.trainer.step(0.5, self.adapters, gradient), 0.5, gradient)
        trainer, adapters, *_ = load_checkpoint(path)
        assert fingerprint(trainer.state_dict(), adapters) == fingerprint(self.trainer.state_dict(), self.adapters)

    # ------------------------------------------------------------------ publishing

    def published(self, snapshot: AdapterSnapshot, version: Version) -> None:
        self.last_version = max(self.last_version, *self.on_disk, 0) + 1 if snapshot is None else snapshot.version
        self.versions = dict([*self.versions.items(), (self.last_version, version)][-KEEP:])

    @rule(hold=st.booleans())
    def publish(self, hold: bool) -> None:
        self.counts["publish"] += 1
        snapshot = self.publisher.publish()
        assert snapshot.version == self.last_version + 1
        self.published(snapshot, Version(self.state.p, len(self.state.records)))
        if hold:
            self.held.append((snapshot, self.state.p))

    @rule(value=st.sampled_from([math.nan, math.inf]), place=SEEDS)
    def publish_what_is_not_finite(self, value: float, place: int) -> None:
        self.counts["publish refused"] += 1
        vector, place = self.adapters.flat.vector, place % self.size
        before, vector[place] = vector[place], value
        with pytest.raises(PublishError, match="must be finite to be published"):
            self.publisher.publish()
        vector[place] = before

    @rule()
    def publish_to(self) -> None:
        self.counts["publish to"] += 1
        folder = self.folder / "published"
        path = self.publisher.publish_to(folder, keep=KEEP_ON_DISK)
        snapshot = self.publisher.latest
        assert snapshot is not None
        assert snapshot.version == max(self.last_version, *self.on_disk, 0) + 1
        self.published(snapshot, Version(self.state.p, len(self.state.records)))
        self.on_disk = (*self.on_disk, snapshot.version)[-KEEP_ON_DISK:]
        assert (folder / "latest").resolve() == path.resolve()
        assert path.name.startswith(f"adapter@v{snapshot.version}-")
        assert len([one for one in folder.iterdir() if "@v" in one.name]) == len(self.on_disk)
        loaded = load_peft(path)
        for name, adapter in self.adapters.items():
            assert loaded[name].a_matrix.tobytes() == adapter.a_matrix.tobytes()
            assert loaded[name].b_matrix.tobytes() == adapter.b_matrix.tobytes()

    @rule(place=st.integers(0, KEEP))
    def rollback(self, place: int) -> None:
        self.counts["rollback"] += 1
        if place >= len(self.versions):
            with pytest.raises(InputError, match="version must be one of those kept"):
                self.publisher.rollback(self.last_version + 1)
            return
        old = list(self.versions)[place]
        snapshot = self.publisher.rollback(old)
        assert (snapshot.version, snapshot.restored_from) == (self.last_version + 1, old)
        self.published(snapshot, self.versions[old])

    @precondition(lambda self: self.versions)
    @rule(place=st.integers(0, KEEP - 1))
    def train_on_from_a_version(self, place: int) -> None:
        self.counts["train on"] += 1
        snapshot = self.publisher.get(list(self.versions)[place % len(self.versions)])
        self.trainer.hold(self.adapters, lambda _: np.copyto(self.adapters.flat.vector, snapshot.vector))
        self.state = self.state._replace(p=self.versions[snapshot.version].p)

    @rule()
    def let_go(self) -> None:
        """The readers have finished: the memory of their versions is free for others."""
        self.counts["let go"] += 1
        self.held.clear()


@pytest.fixture
def shared() -> Iterator[None]:
    former, _ = configure(rule_name="always")
    yield
    configure(rule_name=former)


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("machines", [20, pytest.param(2000, marks=pytest.mark.nightly)])
def test_any_order_of_operations_is_as_the_model_says(machines: int, figures: Callable[..., None]) -> None:
    Training.counts = Counter()
    run_state_machine_as_test(
        Training,
        settings=settings(max_examples=machines, stateful_step_count=50, suppress_health_check=list(HealthCheck)),
    )
    counts = dict(sorted(Training.counts.items()))
    figures(**{name.replace(" ", "_"): count for name, count in counts.items()})
    assert counts.pop("machines") >= machines
    figures(operations=sum(counts.values()))
    assert len(counts) == 17
    assert sum(counts.values()) >= 40 * machines
