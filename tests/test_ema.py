"""The average of the weights: what it is, who gets it, and that nobody is disturbed by it."""

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import averaged, ulp
from training import fill, fingerprint, make_adapter, make_pair, make_set, make_trainer, same_bits

from cylora import AdapterSet, Gradients, LoraAdapter, NonFiniteGradientError, StateError, TrainerBusyError
from cylora.formats import load_checkpoint, load_peft, save_checkpoint, save_peft


def test_the_average_begins_where_the_weights_are_and_follows_them() -> None:
    adapter, trainer = make_adapter(), make_trainer(ema_decay=0.9, learning_rate=0.1)
    expected = adapter.flat.vector.astype(np.float64)
    for seed in range(200):
        trainer.step(1.0, adapter, *make_pair(seed))
        expected = averaged(expected, adapter.flat.vector, 0.9)
    average = trainer.ema_adapters().flat.vector
    assert (np.abs(average - expected) <= 10 * ulp(expected)).all()
    assert np.abs(average - adapter.flat.vector).max() > 0.01


def test_the_average_begins_where_the_first_applied_step_does() -> None:
    """Weights that are written between binding and that step, or while all steps are refused, are where it begins."""
    adapter, trainer = make_adapter(), make_trainer(ema_decay=0.5, learning_rate=0.1)
    with pytest.raises(NonFiniteGradientError):
        trainer.step(1.0, adapter, np.full(adapter.param_count(), np.nan, np.float32))
    adapter.flat.vector[:] += 1.0
    begin = adapter.flat.vector.astype(np.float64)
    trainer.step(1.0, adapter, *make_pair())
    expected = averaged(begin, adapter.flat.vector, 0.5)
    assert (np.abs(trainer.ema_adapters().flat.vector - expected) <= ulp(expected)).all()


def test_a_decay_of_zero_is_the_last_step() -> None:
    adapter, trainer = make_adapter(), make_trainer(ema_decay=0.0)
    for seed in range(3):
        trainer.step(1.0, adapter, *make_pair(seed))
        assert np.allclose(trainer.ema_adapters().flat.vector, adapter.flat.vector, rtol=1e-6, atol=0)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_average_changes_nothing_else(state_dtype: str, threads: int) -> None:
    runs = []
    for decay in (None, 0.99):
        adapter, trainer = make_adapter(), make_trainer(ema_decay=decay, state_dtype=state_dtype, threads=threads)
        for seed in range(5):
            trainer.step(1.0, adapter, *make_pair(seed))
        state = trainer.state_dict() | {"ema": None}
        runs.append(fingerprint(adapter, state))
    assert runs[0] == runs[1]


def test_a_refused_or_skipped_step_does_not_move_the_average() -> None:
    adapter, trainer = make_adapter(), make_trainer(ema_decay=0.5, nonfinite="skip")
    trainer.step(1.0, adapter, *make_pair())
    before = trainer.state_dict()["ema"]
    assert trainer.step(1.0, adapter, np.full(adapter.param_count(), np.nan, np.float32)).skipped
    assert same_bits(trainer.state_dict()["ema"], before)


@pytest.mark.parametrize("make", [make_adapter, make_set])
def test_averaged_adapters_are_new_ones_of_the_same_kind(make: Any) -> None:
    adapters, trainer = make(), make_trainer(ema_decay=0.5)
    gradients = Gradients(adapters)
    trainer.step(1.0, adapters, fill(gradients))
    before = fingerprint(trainer, adapters)
    if isinstance(adapters, AdapterSet):
        adapters.origin = {"base": "x"}
    average = trainer.ema_adapters()
    assert type(average) is type(adapters)
    assert average.flat.layout == adapters.flat.layout
    assert same_bits(average.flat.vector, trainer.state_dict()["ema"])
    if isinstance(average, AdapterSet):
        assert average.origin == {"base": "x"}
        assert [one.config for one in average.values()] == [one.config for one in adapters.values()]
    else:
        assert isinstance(average, LoraAdapter)
        assert average.config == adapters.config
    average.flat.vector.fill(0)
    assert fingerprint(trainer, adapters) == before


def test_the_average_is_saved_for_servers_and_comes_back_with_a_checkpoint(tmp_path: Path) -> None:
    adapters, trainer = make_set(), make_trainer(ema_decay=0.75)
    for seed in range(4):
        trainer.step(1.0, adapters, fill(Gradients(adapters), seed))
    average = trainer.ema_adapters()
    assert isinstance(average, AdapterSet)
    save_peft(average, tmp_path / "adapter")
    assert same_bits(load_peft(tmp_path / "adapter").flat.vector, average.flat.vector)
    save_checkpoint(trainer, adapters, tmp_path / "file")
    loaded = load_checkpoint(tmp_path / "file")
    assert same_bits(loaded.trainer.ema_adapters(loaded.adapters).flat.vector, average.flat.vector)


def test_inside_ema_weights_the_adapters_hold_the_average() -> None:
    adapter, trainer = make_adapter(), make_trainer(ema_decay=0.5)
    trainer.step(1.0, adapter, *make_pair())
    before, average = fingerprint(trainer, adapter), trainer.ema_adapters().flat.vector
    with trainer.ema_weights():
        assert same_bits(adapter.flat.vector, average)
        adapter.b_matrix.fill(7)
    assert fingerprint(trainer, adapter) == before
    with pytest.raises(ZeroDivisionError), trainer.ema_weights():
        raise ZeroDivisionError
    assert fingerprint(trainer, adapter) == before
    assert trainer.step(1.0, adapter, *make_pair()).step == 1


def test_interrupts_around_ema_weights_leave_the_adapters_their_own() -> None:
    """Wherever one comes: at each line of Python that runs on the way in and out."""
    adapter, trainer = make_adapter(), make_trainer(ema_decay=0.5)
    trainer.step(1.0, adapter, *make_pair())
    own, count = adapter.flat.vector.copy(), 0

    def interrupted_at(event: int) -> bool:
        left = [event]

        def trace(frame: Any, what: str, argument: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        try:
            sys.settrace(trace)
            with trainer.ema_weights():
                pass
        except KeyboardInterrupt:
            assert same_bits(adapter.flat.vector, own)  # already here, where a caller saves what it has
            return True
        finally:
            sys.settrace(before)
        return False

    while interrupted_at(count + 1):
        count += 1
        trainer.state_dict()  # not busy
    assert count > 5


def test_nothing_steps_saves_or_averages_inside_ema_weights(tmp_path: Path) -> None:
    adapter, trainer = make_adapter(), make_trainer(ema_decay=0.5)
    trainer.step(1.0, adapter, *make_pair())
    before = fingerprint(trainer, adapter)
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            trainer.step(1.0, adapter, *make_pair())
        except TrainerBusyError as error:
            errors.append(error)

    with trainer.ema_weights():
        for call in (
            lambda: trainer.step(1.0, adapter, *make_pair()),
            lambda: save_checkpoint(trainer, adapter, tmp_path / "file"),
            trainer.state_dict,
            trainer.ema_adapters,
            lambda: trainer.ema_weights().__enter__(),
        ):
            with pytest.raises(TrainerBusyError, match="this trainer is busy"):
                call()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert fingerprint(trainer, adapter) == before


@pytest.mark.parametrize("name", ["ema_adapters", "ema_weights"])
def test_without_an_average_or_adapters_the_error_says_what_is_missing(name: str) -> None:
    def call(trainer: Any, *arguments: Any) -> None:
        result = getattr(trainer, name)(*arguments)
        if name == "ema_weights":
            result.__enter__()

    with pytest.raises(StateError, match=f"{name} needs the adapter, since nothing has bound this trainer to one yet"):
        call(make_trainer(ema_decay=0.5))
    trainer = make_trainer()
    with pytest.raises(StateError, match=f"{name} needs ema_decay in the config, got None"):
        call(trainer, make_adapter())
    bound = make_trainer(ema_decay=0.5)
    bound.step(1.0, make_adapter(), *make_pair())
    with pytest.raises(StateError, match="adapter must be the one of the first step"):
        call(bound, make_adapter())


def test_a_state_with_an_average_of_nothing_is_refused() -> None:
    adapter, trainer = make_adapter(), make_trainer(ema_decay=0.5)
    trainer.step(1.0, adapter, *make_pair())
    state = trainer.state_dict() | {"adam": None}
    before = fingerprint(trainer, adapter)
    with pytest.raises(StateError, match="ema must be None while adam is, got an average"):
        trainer.load_state_dict(state)
    assert fingerprint(trainer, adapter) == before


def test_before_the_first_step_the_average_is_the_weights() -> None:
    adapter, trainer = make_adapter(), make_trainer(ema_decay=0.5)
    assert same_bits(trainer.ema_adapters(adapter).flat.vector, adapter.flat.vector)
    assert trainer.state_dict()["ema"] is None
