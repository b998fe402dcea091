"""Settings and values at the edge of float32: nothing turns into NaN, nothing vanishes in silence."""

import math

import numpy as np
import pytest

from cylora import Adam, InputError, LoraAdapter, LoraTrainer, NonFiniteGradientError, StateError, clip_grad_norm_
from cylora.config import LoraTrainingConfig
from cylora.errors import ConfigError


def one(value):
    return np.array([value], np.float32)


def test_smallest_offset_does_not_divide_zero_by_zero():
    """eps * (1 - beta1) / rate below the smallest float32: a zero gradient must leave the weight alone."""
    p = one(1.0)
    adam = Adam(p, learning_rate=1e6, beta1=1 - 2.0**-53, eps=1e-30)
    for _ in range(3):
        adam.step(one(0.0))
    assert p[0] == 1.0


@pytest.mark.parametrize("weight", [1e21, -1e21, 3e38])
def test_l2_with_huge_weights_stays_finite(weight):
    """wd * p squares to more than float32 holds; an infinite v would make NaN of the weight one step later."""
    p = one(weight)
    adam = Adam(p, learning_rate=1.0, weight_decay=0.1, weight_decay_mode="l2")
    for _ in range(50):
        adam.step(one(0.0))
        assert np.isfinite(p).all()
        assert np.isfinite(adam.m).all()
        assert np.isfinite(adam.v).all()


def test_l2_bound_changes_nothing_below_it():
    """A weight whose decay is just inside the bound gives exactly what the formula gives."""
    p, g = one(2.0**62), one(1.0)
    adam = Adam(p, learning_rate=0.0, weight_decay=1.0, weight_decay_mode="l2")
    adam.step(g)
    assert adam.m[0] == np.float32(np.float32(0.1) * np.float32(2.0**62))


def test_beta2_below_half_is_refused():
    """There v would keep the rounding error of a large predecessor and no longer be the gradient's square."""
    with pytest.raises(ConfigError, match=r"beta2 must be in \[0.5, 1\), got 0"):
        LoraTrainingConfig(beta2=0.0)


def test_beta2_of_half_forgets_a_large_gradient():
    """After 1e4 and then many 1e-2, v is the small gradient's square again, to float32's precision."""
    p = one(0.0)
    adam = Adam(p, learning_rate=0.0, beta2=0.5)
    adam.step(one(1e4))
    for _ in range(120):
        adam.step(one(1e-2))
    assert adam.v[0] == pytest.approx(1e-4, rel=1e-6)


def test_clip_factor_below_float32_is_refused():
    """3e38 clipped to 1e-8 needs a factor that float32 rounds to 0: the gradient would vanish in silence."""
    p, g = one(1.0), one(3e38)
    adam = Adam(p, max_grad_norm=1e-8)
    with pytest.raises(NonFiniteGradientError, match=r"at most 2\^130 times max_grad_norm, got 3.*e\+38"):
        adam.step(g)
    assert (p[0], adam.t, adam.m[0]) == (1.0, 0, 0.0)
    with pytest.raises(InputError, match=r"the norm of grads must be at most 2\^130 times max_norm, 1e-08, got"):
        clip_grad_norm_([g], 1e-8)
    assert g[0] == np.float32(3e38)


def test_largest_reduction_works():
    """2^130 times the limit, the factor a denormal float32 but exact."""
    g = one(2.0**127)
    assert clip_grad_norm_([g], 0.125) == 2.0**127
    assert g[0] == 0.125
    p = one(0.0)
    adam = Adam(p, learning_rate=0.0, max_grad_norm=0.125)
    adam.step(one(2.0**127))
    assert adam.m[0] == np.float32(0.1) * np.float32(0.125)


def test_gradient_beyond_two_to_the_63_is_refused_without_clipping():
    p = one(1.0)
    adam = Adam(p, max_grad_norm=math.inf)
    adam.step(one(2.0**63))
    assert np.isfinite(adam.v).all()
    with pytest.raises(NonFiniteGradientError, match=r"at most 2\^63 so that its square fits float32, got 9.2233"):
        adam.step(one(np.nextafter(np.float32(2.0**63), np.float32(np.inf))))


@pytest.mark.parametrize("size", [1e-18, 1e-8, 1.0, 1e15])
def test_gradient_that_returns_to_dropped_moments_moves_a_weight_like_a_first_one(size):
    """Both are 0 by then. v begins anew with (1 - beta2) g^2, so a step is (1 - beta1) / sqrt(1 - beta2) rates."""
    p = one(0.0)
    adam = Adam(p, learning_rate=1e-3, beta2=0.95, eps=1e-30)
    for g in [1e-3] * 20 + [0.0] * 2000:
        adam.step(one(g))
    assert (adam.m[0], adam.v[0]) == (0.0, 0.0)
    before = float(p[0])
    adam.step(one(size))
    assert abs(p[0] - before) == pytest.approx(1e-3 * 0.1 / math.sqrt(0.05), rel=1e-3)


def test_decay_that_would_grow_the_weights_is_refused():
    """Decoupled decay multiplies by 1 - rate * decay: beyond 2 that is below -1, and the weights leave float32."""
    with pytest.raises(ConfigError, match=r"learning_rate times weight_decay must be at most 2 .*, got 3 times 1"):
        LoraTrainingConfig(learning_rate=3.0, weight_decay=1.0)
    with pytest.raises(ConfigError, match=r"learning_rate times weight_decay must be at most 2 .*, got 3 times 1"):
        LoraTrainingConfig(learning_rate=1.0, min_learning_rate=3.0, weight_decay=1.0)
    assert LoraTrainingConfig(learning_rate=3.0, weight_decay=1.0, weight_decay_mode="l2").learning_rate == 3.0
    p = one(1.0)
    adam = Adam(p, learning_rate=0.1, weight_decay=4.0)
    adam.step(one(0.0), 0.5)
    for refused in (lambda: adam.step(one(0.0), 0.51), lambda: adam.apply(one(0.0), math.nan)):
        with pytest.raises(InputError, match=r"learning rate must be a number in \[0, 0.5\] \(2 / weight_decay\), got"):
            refused()
    assert (p[0], adam.t) == (-1.0, 1)


def scheduled(schedule, **settings):
    adapter = LoraAdapter(4, 2, seed=0)
    trainer = LoraTrainer(LoraTrainingConfig(schedule=schedule, **settings))
    grads = np.ones((8, 4), np.float32), np.ones((2, 8), np.float32)
    return adapter, trainer, grads


def test_schedule_that_poisons_the_gradient_is_caught():
    """The schedule is asked before the gradients are measured, so whatever it does to them is seen."""
    adapter, trainer, grads = scheduled(lambda step: (grads[0].fill(np.nan), 0.1)[1])
    before = adapter.flat.vector.copy()
    with pytest.raises(NonFiniteGradientError, match="gradient of A must be finite, got nan"):
        trainer.step(1.0, adapter, *grads)
    assert np.array_equal(adapter.flat.vector, before)
    assert trainer.total_steps() == 0


def test_schedule_that_writes_the_history_is_refused():
    adapter, trainer, grads = scheduled(
        lambda step: (trainer.training_history.append(loss=1.0, learning_rate=0.0, grad_norm=0.0), 0.1)[1]
    )
    before = adapter.flat.vector.copy()
    with pytest.raises(StateError, match="the history changed during the step"):
        trainer.step(1.0, adapter, *grads)
    assert np.array_equal(adapter.flat.vector, before)


def test_counts_stay_where_a_step_cannot_overflow_them():
    """total_steps of 2^63 - 1 in a hostile state would make the next step's slot negative."""
    adapter, trainer, grads = scheduled(lambda step: 0.1, history_limit=3)
    trainer.step(1.0, adapter, *grads)
    state = trainer.state_dict()
    three = {name: np.zeros(3) for name in ("loss", "learning_rate", "grad_norm")} | {"skipped": np.zeros(3, bool)}
    state["history"] |= {"total_steps": 2**63 - 1, **three}
    with pytest.raises(StateError, match="history total_steps must be an integer >= 0, got 9223372036854775807"):
        trainer.load_state_dict(state)
    state["history"]["total_steps"] = 2**62
    trainer.load_state_dict(state)
    for _ in range(5):
        trainer.step(1.0, adapter, *grads)
    assert trainer.total_steps() == 2**62 + 5
