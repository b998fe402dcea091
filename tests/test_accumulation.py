"""Micro-batches: the weighted mean, what a step does with it, and what is refused."""

import math

import numpy as np
import pytest
from training import fill, fingerprint, make_adapter, make_pair, make_set, make_trainer, same_bits

from cylora import Gradients, InputError, NonFiniteGradientError, StateError, accumulation


@pytest.mark.parametrize("weights", [[1.0] * 4, [1, 2, 3, 4], [0.25], [1e-30, 1e-30], [1e17, 1e16], [7, 0.001]])
@pytest.mark.parametrize("max_grad_norm", [1.0, math.inf])
def test_accumulated_step_is_a_step_with_the_weighted_mean(weights: list[float], max_grad_norm: float) -> None:
    adapter, twin = make_adapter(), make_adapter()
    trainer, other = make_trainer(max_grad_norm=max_grad_norm), make_trainer(max_grad_norm=max_grad_norm)
    for step in range(5):
        pairs = [make_pair(100 * step + i) for i in range(len(weights))]
        losses = [1.0 + i for i in range(len(weights))]
        for loss, pair, weight in zip(losses, pairs, weights, strict=True):
            trainer.accumulate(loss, adapter, *pair, weight=weight)
        record = trainer.step_accumulated()
        parts = (np.array(part, np.float64) for part in zip(*pairs, strict=True))
        mean = [np.average(part, axis=0, weights=weights).astype(np.float32) for part in parts]
        expected = other.step(float(np.average(losses, weights=weights)), twin, *mean)
        assert record.loss == pytest.approx(expected.loss, rel=1e-12)
        assert record.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
        np.testing.assert_allclose(adapter.flat.vector, twin.flat.vector, rtol=1e-5, atol=1e-6)
    assert trainer.total_steps() == 5


def test_one_micro_batch_of_weight_one_is_a_plain_step_to_the_bit() -> None:
    adapter, twin, trainer, other = make_adapter(), make_adapter(), make_trainer(), make_trainer()
    for step in range(5):
        trainer.accumulate(float(step), adapter, *make_pair(step))
        assert trainer.step_accumulated() == other.step(float(step), twin, *make_pair(step))
        assert same_bits(adapter.flat.vector, twin.flat.vector)


def test_a_set_accumulates_its_gradients_buffer() -> None:
    adapters, trainer = make_set(), make_trainer()
    gradients = Gradients(adapters)
    for seed in range(3):
        trainer.accumulate(1.0, adapters, fill(gradients, seed))
    before = adapters.flat.vector.copy()
    trainer.step_accumulated()
    assert (adapters.flat.vector != before).all()


def test_count_follows_and_each_step_starts_anew() -> None:
    adapter, trainer = make_adapter(), make_trainer()
    seen = []
    for _ in range(2):
        for seed in range(3):
            trainer.accumulate(float(seed), adapter, *make_pair(seed))
            seen.append(trainer.accumulated)
        record = trainer.step_accumulated()
        assert record.loss == 1.0
        assert trainer.accumulated == 0
    assert seen == [1, 2, 3] * 2
    assert record.step == 1


def test_micro_batches_change_nothing_before_the_step() -> None:
    adapter, trainer = make_adapter(), make_trainer()
    trainer.step(1.0, adapter, *make_pair())
    before = fingerprint(adapter), list(trainer.training_history), trainer._adam.m.tobytes()
    trainer.accumulate(1.0, adapter, *make_pair(1))
    assert (fingerprint(adapter), list(trainer.training_history), trainer._adam.m.tobytes()) == before


def test_gradients_of_the_caller_are_only_read() -> None:
    adapter, trainer = make_adapter(), make_trainer()
    pair = make_pair()
    for part in pair:
        part.flags.writeable = False
    trainer.accumulate(1.0, adapter, *pair)
    trainer.step_accumulated()
    assert all(same_bits(a, b) for a, b in zip(pair, make_pair(), strict=True))


def test_discarding_forgets() -> None:
    adapter, twin, trainer, other = make_adapter(), make_adapter(), make_trainer(), make_trainer()
    trainer.accumulate(math.nan, adapter, *make_pair(5))
    trainer.discard_accumulated()
    assert trainer.accumulated == 0
    assert trainer.step(1.0, adapter, *make_pair()) == other.step(1.0, twin, *make_pair())
    assert same_bits(adapter.flat.vector, twin.flat.vector)
    trainer.discard_accumulated()
    make_trainer().discard_accumulated()


def test_a_plain_step_is_refused_while_micro_batches_wait() -> None:
    adapter, trainer = make_adapter(), make_trainer()
    trainer.accumulate(1.0, adapter, *make_pair())
    trainer.accumulate(1.0, adapter, *make_pair())
    with pytest.raises(StateError, match=r"2 micro-batches wait: call step_accumulated\(\) or discard_accumulated\(\)"):
        trainer.step(1.0, adapter, *make_pair())
    assert trainer.accumulated == 2


def test_stepping_without_micro_batches_is_refused() -> None:
    trainer, adapter = make_trainer(), make_adapter()
    message = "step_accumulated needs at least one accumulated micro-batch, got none"
    with pytest.raises(StateError, match=message):
        trainer.step_accumulated()
    with pytest.raises(StateError, match=message):
        trainer.step_accumulated(adapter)
    trainer.step(1.0, adapter, *make_pair())
    with pytest.raises(StateError, match=message):
        trainer.step_accumulated()


@pytest.mark.parametrize(
    "weight", [0, -1, 1e-31, 1e-40, 5e-324, 1.1e30, 1e39, 1e308, math.nan, math.inf, None, "1", True, np.ones(1), 1j]
)
def test_a_weight_must_be_one_whose_inverse_is_a_number(weight: object) -> None:
    """1e-40 is a fine float64, but its inverse is infinite in float32 and would make every parameter NaN."""
    adapter, trainer = make_adapter(), make_trainer()
    trainer.accumulate(1.0, adapter, *make_pair())
    before = fingerprint(trainer, adapter)
    with pytest.raises(InputError, match=r"weight must be in \[1e-30, 1e30\], got"):
        trainer.accumulate(1.0, adapter, *make_pair(), weight=weight)
    assert fingerprint(trainer, adapter) == before


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_micro_batch_that_is_not_finite_adds_nothing(nonfinite: str) -> None:
    adapter, trainer = make_adapter(), make_trainer(nonfinite=nonfinite)
    trainer.accumulate(1.0, adapter, *make_pair())
    before = fingerprint(trainer, adapter)
    bad = make_pair(1)
    bad[1][4, 2] = np.nan
    with pytest.raises(NonFiniteGradientError, match=r"gradient of B must be finite, got nan at \[4, 2\]"):
        trainer.accumulate(1.0, adapter, *bad)
    assert fingerprint(trainer, adapter) == before


@pytest.mark.parametrize(("size", "weight"), [(1e19, 1.0), (1.0, 1e19), (1e12, 1e12)])
def test_a_weighted_micro_batch_must_fit_float32(size: float, weight: float) -> None:
    adapter, trainer = make_adapter(), make_trainer()
    trainer.accumulate(1.0, adapter, *make_pair())
    before = fingerprint(trainer, adapter)
    a, b = make_pair()
    a[0, 0] = size
    with pytest.raises(NonFiniteGradientError, match=r"the gradient's norm must be at most 2\^63"):
        trainer.accumulate(1.0, adapter, a, b, weight=weight)
    assert fingerprint(trainer, adapter) == before


@pytest.mark.parametrize("loss", [None, "1", True, 1j, np.ones(1)])
def test_a_loss_is_checked(loss: object) -> None:
    adapter, trainer = make_adapter(), make_trainer()
    with pytest.raises(InputError, match="loss must be a real number, got"):
        trainer.accumulate(loss, adapter, *make_pair())
    assert trainer.accumulated == 0


def test_the_buffer_itself_is_no_gradient() -> None:
    adapter, trainer = make_adapter(), make_trainer()
    trainer.accumulate(1.0, adapter, *make_pair())
    with pytest.raises(InputError, match="gradients must not overlap the trainer's accumulation buffer in memory"):
        trainer.accumulate(1.0, adapter, trainer._accumulation.gradient)
    assert trainer.accumulated == 1


def test_wrong_adapters_and_shapes_are_refused_like_in_step() -> None:
    adapter, trainer = make_adapter(), make_trainer()
    trainer.accumulate(1.0, adapter, *make_pair())
    with pytest.raises(StateError, match="adapter must be the one of the first step"):
        trainer.accumulate(1.0, make_adapter(), *make_pair())
    with pytest.raises(InputError, match=r"grad_a must be a C-contiguous, aligned array of .* of shape \(3, 6\)"):
        trainer.accumulate(1.0, adapter, *make_pair()[::-1])
    with pytest.raises(InputError, match="grad_a must be a Gradients made for LoraAdapter"):
        trainer.accumulate(1.0, adapter, Gradients(make_set()))
    assert trainer.accumulated == 1


def test_the_kernel_wants_its_buffers_attached() -> None:
    trainer, adapter = make_trainer(), make_adapter()
    trainer.step(1.0, adapter, *make_pair())
    with pytest.raises(ValueError, match="total must have 33 elements"):
        trainer._adam.accumulate(np.zeros(5, np.float32), 1.0, *make_pair(), 1.0)
    with pytest.raises(ValueError, match=r"sums must be \(2,\), pending \(1,\)"):
        trainer._adam.attach_pending(np.zeros(3), np.zeros(1, np.int64))


# ---------------------------------------------------------------- state


def pending_state(**changes: object) -> dict:
    adapter, trainer = make_adapter(), make_trainer()
    trainer.accumulate(1.0, adapter, *make_pair(), weight=2.0)
    return trainer.state_dict()["accumulated"] | changes


def test_state_is_what_waits_or_none() -> None:
    state = pending_state()
    assert (state["count"], state["loss"], state["weight"]) == (1, 2.0, 2.0)
    np.testing.assert_array_equal(state["gradient"], 2 * np.concatenate([part.ravel() for part in make_pair()]))
    assert make_trainer().state_dict()["accumulated"] is None
    restored = accumulation.Accumulation.from_state_dict(state, 33)
    assert restored.count == 1
    assert same_bits(restored.state_dict()["gradient"], state["gradient"])
    assert accumulation.Accumulation.from_state_dict(None, 33).state_dict() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "accumulated count must be an integer >= 1, got 0"),
        ({"count": 1.0}, "accumulated count must be an integer, got 1.0"),
        ({"loss": None}, "accumulated loss must be a real number, got None"),
        ({"weight": 0.0}, "accumulated weight must be finite and >= 1e-30, got 0.0"),
        ({"weight": 1e-40}, "accumulated weight must be finite and >= 1e-30, got 1e-40"),
        ({"weight": math.inf}, "accumulated weight must be finite and >= 1e-30, got inf"),
        (
            {"gradient": np.zeros(32, "f4")},
            r"accumulated gradient must be float32 of shape \(33,\), got float32 of shape",
        ),
        ({"gradient": np.zeros(33)}, "accumulated gradient must be float32 of shape .*, got float64"),
        ({"gradient": np.full(33, np.inf, "f4")}, "accumulated gradient must be finite, got inf"),
        ({"more": 1}, "accumulated must be a mapping with the keys count, loss, weight, gradient"),
    ],
)
def test_state_is_checked(change: dict, message: str) -> None:
    with pytest.raises(StateError, match=message):
        accumulation.Accumulation.from_state_dict(pending_state(**change), 33)


def test_state_of_unknown_size_must_be_a_vector() -> None:
    for gradient in (np.zeros((3, 11), np.float32), [0.0], None):
        with pytest.raises(StateError, match="accumulated gradient must be float32 of shape"):
            accumulation.Accumulation.from_state_dict(pending_state(gradient=gradient), None)
