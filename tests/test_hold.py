"""LoraTrainer.hold and adopt: the live state for those who write and read files, while no step can begin."""

import threading
from typing import Any

import numpy as np
import pytest
from training import fingerprint, make_adapter, make_pair, make_set, make_trainer

from cylora import Gradients, InputError, LoraAdapter, LoraTrainer, StateError, TrainerBusyError
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
