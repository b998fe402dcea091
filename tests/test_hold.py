"""LoraTrainer.hold and adopt: the live state for those who write and read files, while no step can begin."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from interrupts import interrupted
from test_fork import in_child
from training import fill, fingerprint, make_adapter, make_pair, make_set, make_trainer

from cylora import Gradients, InputError, LoraAdapter, LoraConfig, LoraTrainer, StateError, TrainerBusyError
from cylora.trainer import TrainerState


def trained(steps: int = 3, **config: Any) -> tuple[LoraTrainer, LoraAdapter]:
    trainer, adapter = make_trainer(**config), make_adapter()
    for step in range(steps):
        trainer.step(1.0, adapter, *make_pair(step))
    return trainer, adapter


def parts(state: TrainerState) -> TrainerState:
    return state


def in_thread(function: Any) -> Any:
    """Call ``function`` in another thread; return its result or its exception."""
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.append(function())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return outcome[0]


def test_hold_gives_the_live_parts_and_returns_what_the_function_returns() -> None:
    trainer, adapter = trained()
    assert trainer.hold(adapter, lambda _: 42) == 42
    state = trainer.hold(adapter, parts)
    assert state.adam.t == 3
    assert state.adam.layout == adapter.flat.layout
    assert np.shares_memory(state.adam.moments.m, trainer._adam.m)
    assert state.history is trainer.training_history
    assert state.accumulation is trainer._accumulation


def test_a_step_tried_meanwhile_is_refused_and_changes_nothing() -> None:
    trainer, adapter = trained()
    before = fingerprint(trainer, adapter)
    outcome = trainer.hold(adapter, lambda _: in_thread(lambda: trainer.step(1.0, adapter, *make_pair(9))))
    assert isinstance(outcome, TrainerBusyError)
    assert fingerprint(trainer, adapter) == before
    assert trainer.step(1.0, adapter, *make_pair(3)).step == 3


def test_the_function_itself_cannot_step() -> None:
    trainer, adapter = trained()
    before = fingerprint(trainer, adapter)
    for call in (
        lambda _: trainer.step(1.0, adapter, *make_pair()),
        lambda _: trainer.accumulate(1.0, adapter, *make_pair()),
        lambda _: trainer.hold(adapter, parts),
        lambda _: trainer.state_dict(),
    ):
        with pytest.raises(TrainerBusyError):
            trainer.hold(adapter, call)
    assert fingerprint(trainer, adapter) == before


def test_an_error_of_the_function_ends_the_hold() -> None:
    trainer, adapter = trained()
    with pytest.raises(ZeroDivisionError):
        trainer.hold(adapter, lambda _: 1 // 0)
    trainer.step(1.0, adapter, *make_pair(3))


def test_hold_while_a_step_is_under_way_is_refused() -> None:
    asked: list[Any] = []

    def schedule(step: int) -> float:
        if step == 3:
            asked.append(in_thread(lambda: trainer.hold(adapter, parts)))
        return 1e-3

    trainer, adapter = make_trainer(schedule=schedule), make_adapter()
    for step in range(5):
        trainer.step(1.0, adapter, *make_pair(step))
    assert [type(one) for one in asked] == [TrainerBusyError]


def test_on_step_may_hold() -> None:
    seen: list[int] = []
    adapter = make_adapter()
    trainer = LoraTrainer(
        make_trainer(log_every=1).config, on_step=lambda record: seen.append(trainer.hold(adapter, parts).adam.t)
    )
    for step in range(3):
        trainer.step(1.0, adapter, *make_pair(step))
    assert seen == [1, 2, 3]


def test_an_unbound_trainer_is_held_with_any_adapters_and_stays_unbound() -> None:
    trainer = make_trainer()
    for adapters in (make_adapter(), make_set()):
        assert trainer.hold(adapters, parts).adam is None
    trainer.step(1.0, make_adapter(), *make_pair())


def test_other_adapters_than_the_bound_ones_are_refused() -> None:
    trainer, _ = trained()
    with pytest.raises(StateError, match=r"adapters must be the trainer's, LoraAdapter\(6 -> 5.*got another, Lora"):
        trainer.hold(make_adapter(), parts)


def test_a_trainer_whose_every_step_was_refused_is_held_with_others() -> None:
    trainer = make_trainer()
    with pytest.raises(InputError):
        trainer.step("loss", make_adapter(), *make_pair())
    assert trainer.hold(make_set(), parts).adam is None


def test_a_loaded_state_must_fit_the_adapters_that_are_held() -> None:
    trainer, adapter = trained()
    resumed = make_trainer()
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.hold(make_adapter(), parts).adam.t == 3
    with pytest.raises(StateError, match="adapter must have the layout of the loaded state"):
        resumed.hold(make_set(), parts)
    pending = make_trainer()
    pending.accumulate(1.0, adapter, *make_pair())
    resumed = make_trainer()
    resumed.load_state_dict(pending.state_dict())
    with pytest.raises(StateError, match="adapter must have the 33 parameters of the loaded state"):
        resumed.hold(make_set(), parts)


# ------------------------------------------------------------------ hold with a timeout


def large() -> tuple[LoraTrainer, LoraAdapter, Gradients]:
    """A trainer whose steps release the GIL, and so are under way whenever another thread looks."""
    adapter = LoraAdapter(1024, 1024, LoraConfig(rank=16), seed=0)
    gradients = fill(Gradients(adapter))
    trainer = make_trainer(history_limit=10)
    trainer.step(1.0, adapter, gradients)
    return trainer, adapter, gradients


def step_patiently(trainer: LoraTrainer, adapter: LoraAdapter, gradients: Gradients) -> None:
    """Step once; one that was about to begin when a hold did is refused and tried again."""
    while True:
        try:
            trainer.step(1.0, adapter, gradients)
            return
        except TrainerBusyError:
            continue


def test_a_waiting_hold_gets_its_turn_between_steps_without_a_pause() -> None:
    trainer, adapter, gradients = large()
    is_over = threading.Event()

    def train() -> None:
        while not is_over.is_set():
            step_patiently(trainer, adapter, gradients)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(30):
            state = trainer.hold(adapter, parts, timeout=120)
            assert state.history is trainer.training_history
    finally:
        is_over.set()
        thread.join(60)


def test_a_step_gets_its_turn_between_waiting_holds_without_a_pause() -> None:
    trainer, adapter, gradients = large()
    is_over = threading.Event()
    failed: list[Exception] = []

    def hold() -> None:
        while not is_over.is_set():
            try:
                trainer.hold(adapter, lambda _: adapter.flat.vector.copy(), timeout=120)
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        for _ in range(30):
            step_patiently(trainer, adapter, gradients)
    finally:
        is_over.set()
        thread.join(60)
    assert failed == []
    assert trainer.total_steps() == 31


def test_a_hold_that_may_wait_lets_a_step_that_waits_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, adapter = trained()
    events: list[str] = []

    def sleep(seconds: float) -> None:
        events.append("waits")
        if len(events) == 3:
            trainer._kept_waiting.clear()

    trainer._kept_waiting.append(None)
    with monkeypatch.context() as patched:
        patched.setattr("cylora.trainer.time.sleep", sleep)
        trainer.hold(adapter, lambda _: events.append("holds"), timeout=60)
    assert events == ["waits", "waits", "waits", "holds"]


def until(is_so: Any) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def test_a_step_tried_during_a_hold_that_may_wait_waits_itself() -> None:
    trainer, adapter = trained()
    inside, go_on = threading.Event(), threading.Event()
    records: list[Any] = []

    def function(_: Any) -> None:
        inside.set()
        assert go_on.wait(60)

    holding = threading.Thread(target=lambda: trainer.hold(adapter, function, timeout=60))
    holding.start()
    assert inside.wait(60)
    stepping = threading.Thread(target=lambda: records.append(trainer.step(1.0, adapter, *make_pair(3))))
    stepping.start()
    until(lambda: trainer._kept_waiting)
    assert records == []
    assert trainer.total_steps() == 3
    go_on.set()
    holding.join(60)
    stepping.join(60)
    assert [record.step for record in records] == [3]
    assert trainer._kept_waiting == []
    assert trainer._open is adapter


def test_a_hold_whose_time_is_up_is_refused_and_steps_go_on_as_before() -> None:
    trainer, adapter = trained()
    with trainer_busy(trainer), pytest.raises(TrainerBusyError, match="this trainer is busy"):
        trainer.hold(adapter, parts, timeout=0.01)
    assert trainer._open is adapter
    trainer.step(1.0, adapter, *make_pair(3))


@contextlib.contextmanager
def elsewhere(call: Callable[[Callable[[], None]], object]) -> Iterator[None]:
    """Let another thread be inside ``call(function)``, which calls the function."""
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert go_on.wait(60)

    thread = threading.Thread(target=call, args=(wait,))
    thread.start()
    assert inside.wait(60)
    try:
        yield
    finally:
        go_on.set()
        thread.join(60)


def trainer_busy(trainer: LoraTrainer) -> AbstractContextManager[None]:
    """Let another thread be in a step of it."""
    return elsewhere(trainer._adam.exclusively)


def held_elsewhere(trainer: LoraTrainer, adapters: Any) -> AbstractContextManager[None]:
    """Let another thread be inside a hold of it."""
    return elsewhere(lambda wait: trainer.hold(adapters, lambda _: wait()))


def test_a_step_that_is_refused_leaves_no_mark_for_holds_to_wait_for() -> None:
    trainer, adapter = trained()
    with pytest.raises(StateError, match="adapter must be the one of the first step"):
        trainer.step(1.0, make_adapter(), *make_pair())
    assert trainer._kept_waiting == []
    assert trainer.hold(adapter, lambda _: 7, timeout=60) == 7


def test_a_forked_child_does_not_wait_for_steps_of_its_parent() -> None:
    trainer, adapter = trained()
    trainer._kept_waiting.append(None)  # as while another thread waits

    def child() -> None:
        assert trainer.hold(adapter, lambda _: 7, timeout=30) == 7
        assert trainer._kept_waiting == []

    assert in_child(child) == 0


@pytest.mark.parametrize("timeout", [-1, "1", True, np.nan])
def test_a_wrong_timeout_is_refused(timeout: Any) -> None:
    trainer, adapter = trained()
    with pytest.raises(InputError, match=r"timeout \(if not None\) must be >= 0, got"):
        trainer.hold(adapter, parts, timeout=timeout)


def test_a_busy_error_of_the_function_itself_is_not_waited_for() -> None:
    trainer, adapter = trained()
    calls: list[int] = []

    def function(_: Any) -> None:
        calls.append(1)
        trainer.step(1.0, adapter, *make_pair())

    with pytest.raises(TrainerBusyError, match="further up this call stack"):
        trainer.hold(adapter, function, timeout=60)
    assert calls == [1]
    assert trainer.step(1.0, adapter, *make_pair(3)).step == 3


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_during_a_step_is_told_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, adapter = trained()

    def child() -> None:
        monkeypatch.setattr("cylora.trainer.time.sleep", lambda seconds: pytest.fail("waits for a thread that is gone"))
        with pytest.raises(StateError, match="this process was forked while another thread was in a step"):
            trainer.hold(adapter, parts, timeout=60)

    with trainer_busy(trainer):
        assert in_child(child) == 0


def test_an_unbound_trainer_is_held_at_once() -> None:
    assert make_trainer().hold(make_adapter(), lambda state: state.adam, timeout=60) is None


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("timeout", [0, 0.01])
def test_a_hold_waits_no_longer_than_its_timeout_for_another_one(timeout: float, steps: int) -> None:
    trainer, adapter = trained(steps)
    before = fingerprint(trainer, adapter)
    calls: list[Any] = []
    with held_elsewhere(trainer, adapter):
        outcome = in_thread(lambda: trainer.hold(adapter, calls.append, timeout=timeout))
    assert isinstance(outcome, TrainerBusyError)
    assert str(outcome) == "this trainer is busy: another thread held it all the time"
    assert calls == []
    assert fingerprint(trainer, adapter) == before
    assert in_thread(lambda: trainer.hold(adapter, lambda _: 7, timeout=timeout)) == 7


@pytest.mark.parametrize("timeout", [60, np.inf])
def test_a_hold_comes_after_another_one_within_its_timeout(timeout: float) -> None:
    trainer, adapter = trained()
    results: list[int] = []
    with held_elsewhere(trainer, adapter):
        waiting = threading.Thread(target=lambda: results.append(trainer.hold(adapter, lambda _: 7, timeout=timeout)))
        waiting.start()
    waiting.join(60)
    assert results == [7]


@pytest.mark.parametrize("call", ["hold", "state_dict"])
def test_what_has_no_timeout_waits_for_a_hold_as_long_as_it_takes(call: str) -> None:
    trainer, adapter = trained()
    arguments = (adapter, parts) if call == "hold" else ()
    results: list[Any] = []
    waiting = threading.Thread(target=lambda: results.append(getattr(trainer, call)(*arguments)))
    with held_elsewhere(trainer, adapter):
        waiting.start()
        waiting.join(0.05)
        assert results == []
    waiting.join(60)
    assert len(results) == 1


def test_a_hold_within_a_hold_does_not_wait_for_itself_and_both_end() -> None:
    trainer, adapter = make_trainer(), make_adapter()
    assert trainer.hold(adapter, lambda _: trainer.hold(adapter, lambda _: 7, timeout=60), timeout=60) == 7
    assert not trainer.is_held_here()
    assert in_thread(lambda: trainer.hold(adapter, lambda _: 8, timeout=60)) == 8


@pytest.mark.parametrize("steps", [0, 3])
def test_an_interrupt_at_any_moment_of_a_hold_leaves_the_lock_free(steps: int) -> None:
    trainer, adapter = trained(steps)
    kept, when = [], 0  # an error that is kept keeps its frames
    while (error := interrupted(lambda: trainer.hold(adapter, parts, timeout=60), when := when + 1)) is not None:
        kept.append(error)
        assert not trainer.is_held_here(), when
        assert in_thread(lambda: trainer.hold(adapter, lambda _: 7, timeout=60)) == 7
    assert len(kept) > 10


def test_an_interrupt_of_a_hold_within_a_hold_leaves_the_outer_one_its_lock() -> None:
    trainer, adapter = make_trainer(), make_adapter()

    def outer(_: TrainerState) -> int:
        when = 0
        while interrupted(lambda: trainer.hold(adapter, parts, timeout=60), when := when + 1) is not None:
            assert trainer.is_held_here(), when
        return when

    assert trainer.hold(adapter, outer, timeout=60) > 10
    assert not trainer.is_held_here()


# ------------------------------------------------------------------ adopt


def state_of(trainer: LoraTrainer, adapter: LoraAdapter) -> TrainerState:
    """Return a state that nobody else keeps, by way of a second trainer."""
    twin = LoraTrainer(trainer.config)
    twin.load_state_dict(trainer.state_dict())
    return twin.hold(adapter, parts)


def test_adopted_parts_are_used_themselves_and_go_on_to_the_same_bits() -> None:
    trainer, adapter = trained()
    state, twin = state_of(trainer, adapter), make_adapter()
    twin.flat.vector[...] = adapter.flat.vector
    resumed = make_trainer()
    resumed.adopt(state)
    assert resumed.training_history is state.history
    for step in range(3, 6):
        trainer.step(1.0, adapter, *make_pair(step))
        resumed.step(1.0, twin, *make_pair(step))
    assert np.shares_memory(resumed._adam.m, state.adam.moments.m)
    assert fingerprint(trainer, adapter) == fingerprint(resumed, twin)


def test_a_bound_trainer_adopts_for_its_adapters_and_retires_what_it_had() -> None:
    trainer, adapter = trained()
    state, (other, target) = state_of(trainer, adapter), trained(1)
    old = other._adam
    other.adopt(state)
    assert other._adam is not old
    assert other.total_steps() == 3
    target.flat.vector[...] = adapter.flat.vector
    trainer.step(1.0, adapter, *make_pair(3))
    other.step(1.0, target, *make_pair(3))
    assert fingerprint(trainer, adapter) == fingerprint(other, target)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"history_limit": 4}, "history limit must be 4, as configured, got None"),
        ({"state_dtype": "8bit"}, "adam dtype must be '8bit', as configured, got 'float32'"),
    ],
)
def test_a_state_that_does_not_fit_the_config_is_refused(config: dict[str, Any], message: str) -> None:
    state = state_of(*trained())
    resumed = make_trainer(**config)
    before = fingerprint(resumed)
    with pytest.raises(StateError, match=message):
        resumed.adopt(state)
    assert fingerprint(resumed) == before


def test_a_state_of_another_layout_is_refused_by_a_bound_trainer() -> None:
    adapters, other = make_set(), make_trainer()
    other.step(1.0, adapters, Gradients(adapters))
    before = fingerprint(other, adapters)
    with pytest.raises(StateError, match=r"adapter must have the layout of the loaded state, .*, got AdapterSet"):
        other.adopt(state_of(*trained()))
    assert fingerprint(other, adapters) == before


def test_on_step_may_not_adopt() -> None:
    refused: list[Exception] = []
    state, adapter = state_of(*trained()), make_adapter()

    def report(record: Any) -> None:
        try:
            trainer.adopt(state)
        except TrainerBusyError as error:
            refused.append(error)

    trainer = LoraTrainer(make_trainer(log_every=1).config, on_step=report)
    trainer.step(1.0, adapter, *make_pair())
    assert len(refused) == 1
    assert "may read it, but not change it" in str(refused[0])
