"""Training with moments in bfloat16 and 8 bits: the loss curves of float32, and where 8 bits have their limits.

Figures in comments were measured with these seeds; margins are stated beside them. Storage that rounds to nearest is
emulated here, to show what stochastic rounding is for.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cylora import Adam, Gradients, LoraTrainer, LoraTrainingConfig
from cylora.tasks.digits import DigitsTask

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
COMPACT = ("bfloat16", "8bit")
CHUNK = 256


def largest_step(beta1: float = 0.9, beta2: float = 0.999, **rest: Any) -> float:
    """Return how many learning rates Adam's own step can have, once the bias corrections are 1: 7.3 by default."""
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))


# ---------------------------------------------------------------------- digits

# Standard deviation of float32 runs from seed to seed, over seeds 0 to 7: of the final accuracy 0.005, of the mean loss
# over steps 200 to 400 (0.052 on average) 0.005, over the last 200 (0.0005) 0.00012.
SPREADS = {"accuracy": 0.005, "middle": 0.005, "final": 0.00012}


def digits_figures(state_dtype: str, seed: int) -> dict[str, float]:
    config = LoraTrainingConfig.from_dict(DigitsTask.training_defaults)
    task = DigitsTask(config.lora_config, seed)
    trainer, gradients = LoraTrainer(dataclasses.replace(config, state_dtype=state_dtype)), Gradients(task.adapters)
    for step in range(1000):
        gradients.zero_()
        trainer.step(task.loss_and_gradients(step, gradients), task.adapters, gradients)
    losses = trainer.training_history.column("loss")
    accuracy = task.evaluate()["turned accuracy"]
    return {"accuracy": accuracy, "middle": losses[200:400].mean(), "final": losses[-200:].mean()}


def compare_digits(seeds: range, record_property: Callable[[str, object], None]) -> None:
    """Means over seeds may differ by 3 standard deviations of the difference of two such means, for the worse."""
    figures = {dtype: [digits_figures(dtype, seed) for seed in seeds] for dtype in ("float32", *COMPACT)}
    means = {d: {name: float(np.mean([f[name] for f in fs])) for name in SPREADS} for d, fs in figures.items()}
    record_property("digits", means)
    print(means)
    for name, spread in SPREADS.items():
        margin = 3 * math.sqrt(2 / len(seeds)) * spread
        for dtype in COMPACT:
            worse = means[dtype][name] - means["float32"][name]
            assert (-worse if name == "accuracy" else worse) <= margin, (dtype, name, means)


def test_digits_are_learnt_as_well_with_compact_state(record_property: Callable[[str, object], None]) -> None:
    compare_digits(range(2), record_property)


@pytest.mark.nightly
def test_digits_are_learnt_as_well_with_compact_state_whatever_the_seed(
    record_property: Callable[[str, object], None],
) -> None:
    """Seeds 0 to 4: accuracy 0.9724 with float32 and bfloat16, 0.9737 with 8 bits. 0.0095 less would fail."""
    compare_digits(range(5), record_property)


# ---------------------------------------------------------------------- the same storage, rounded to nearest


def nearest_bfloat16(x: Floats) -> Floats:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def grid(exponent_bits: int) -> Doubles:
    """Return the magnitudes that 8-bit codes stand for, over c: 2^e * (1 + f/8) - 1."""
    code = np.arange(8 << exponent_bits)
    return 2.0 ** (code >> 3) * (1 + (code & 7) / 8) - 1


GRID_M, GRID_V = grid(4), grid(5)


def nearest_code(x: Floats, magnitudes: Doubles, lowest: int) -> Floats:
    """Round each chunk of 256 to the grid that its largest number asks for."""
    chunks = np.abs(x.astype(np.float64)).reshape(-1, CHUNK)
    largest = chunks.max(axis=1, keepdims=True, initial=2.0**-60)
    octave = np.floor(np.log2(largest))
    octave += largest >= 1.875 * 2.0**octave
    c = 2.0 ** (octave - len(magnitudes) // 8 + 1)
    above = np.clip(np.searchsorted(magnitudes, chunks / c), 1, len(magnitudes) - 1)
    below = magnitudes[above] + magnitudes[above - 1] >= 2 * chunks / c
    rounded = magnitudes[np.maximum(above - below, lowest)] * c
    return np.copysign(rounded.ravel(), x).astype(np.float32)


NEAREST: dict[str, tuple[Callable[[Floats], Floats], Callable[[Floats], Floats]]] = {
    "float32": (np.copy, np.copy),
    "bfloat16": (nearest_bfloat16, nearest_bfloat16),
    "8bit": (lambda m: nearest_code(m, GRID_M, 0), lambda v: nearest_code(v, GRID_V, 1)),
}


class AdamOfNearest:
    """Adam in float32 whose moments are rounded to the nearest number that the storage can hold."""

    def __init__(self, p: Floats, state_dtype: str) -> None:
        self.p, self.m, self.v, self.t = p, np.zeros_like(p), np.zeros_like(p), 0
        self.store_m, self.store_v = NEAREST[state_dtype]

    def step(self, g: Floats, rate: float) -> None:
        self.t += 1
        m, v = self.m + np.float32(0.1) * (g - self.m), self.v + np.float32(0.001) * (g * g - self.v)
        root = np.sqrt(v / (1 - 0.999**self.t)) + 1e-8
        self.p -= (rate / (1 - 0.9**self.t) * m / root).astype(np.float32)
        self.m, self.v = self.store_m(m), self.store_v(v)


def test_the_emulated_grids_are_those_of_the_state() -> None:
    rng = np.random.default_rng(0)
    adam = Adam(np.zeros(1024, np.float32), state_dtype="8bit")
    for _ in range(20):
        adam.step((10.0 ** rng.uniform(-5, 5, 1024) * rng.normal(size=1024)).astype(np.float32))
        for name, values, magnitudes in (("m", adam.m, GRID_M), ("v", adam.v, GRID_V)):
            exponents = adam._moments.to_dict()[f"{name}_exponents"].astype(np.float64)
            units = np.abs(values).reshape(4, CHUNK) / 2.0 ** (exponents[:, None] - 127)
            assert np.isin(units.astype(np.float32), magnitudes.astype(np.float32)).all()
            # The chunk's largest has one of the last octave's codes, so the exponent was not too high either.
            assert (units.max(axis=1) >= 0.45 * magnitudes[-1]).all()


# ---------------------------------------------------------------------- ill-conditioned problems


def optimizer(p: Floats, kind: str) -> Adam | AdamOfNearest:
    dtype, _, how = kind.partition(" ")
    return AdamOfNearest(p, dtype) if how == "nearest" else Adam(p, state_dtype=dtype)


def cosine(t: int, steps: int) -> float:
    return 0.01 * (1 + math.cos(math.pi * t / steps))


def quadratic(kind: str, seed: int, condition: float, decaying: bool = True, steps: int = 2000) -> list[float]:
    """Curvatures from 1 down to 1/condition in random order, so that a chunk of 256 has them all; noise in proportion.

    Returns the loss, relative to its largest curvature, at a quarter and a half of the way, and at the end.
    """
    rng = np.random.default_rng(seed)
    curvature = condition ** -rng.random(2 * CHUNK)
    p = rng.normal(size=2 * CHUNK).astype(np.float32)
    adam, losses = optimizer(p, kind), []
    for t in range(steps):
        slope = curvature * (p + 0.5 * rng.normal(size=p.size))
        adam.step(slope.astype(np.float32), cosine(t, steps) if decaying else 0.02)
        losses.append(0.5 * float(curvature @ p.astype(np.float64) ** 2))
    return [float(np.mean(losses[i - 50 : i])) for i in (steps // 4, steps // 2, steps)]


def least_squares(kind: str, seed: int, condition: float, decaying: bool = True, steps: int = 2000) -> list[float]:
    """A dense Hessian of the given condition number; gradients from 16 of 2,048 rows."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(CHUNK, CHUNK)))
    rows = rng.normal(size=(2048, CHUNK)) @ (rotation * condition ** -(np.linspace(0, 0.5, CHUNK))) @ rotation.T
    wanted = rows @ rng.normal(size=CHUNK)
    p = np.zeros(CHUNK, np.float32)
    adam, losses = optimizer(p, kind), []
    for t in range(steps):
        some = rng.integers(2048, size=16)
        batch = rows[some]
        adam.step((batch.T @ (batch @ p - wanted[some]) / 16).astype(np.float32), cosine(t, steps))
        if any(0 <= i - t <= 50 for i in (steps // 4, steps // 2, steps)):
            losses.append(0.5 * float(np.mean((rows @ p - wanted) ** 2)))
    return [float(np.mean(part)) for part in np.array_split(losses, 3)]


def ratios(problem: Callable[..., list[float]], kind: str, other: str, seeds: range, **how: Any) -> Doubles:
    """Geometric means over seeds of the losses of one kind over those of another."""
    logs = [np.log(problem(kind, seed, **how)) - np.log(problem(other, seed, **how)) for seed in seeds]
    result: Doubles = np.exp(np.mean(logs, axis=0))
    print(problem.__name__, how, kind, "/", other, result.round(4))
    return result


def check_curves(seeds: range) -> None:
    for problem in (quadratic, least_squares):
        for condition in (1e4, 1e6):
            for kind, factor in (("bfloat16", 1.03), ("8bit", 1.1)):
                found = ratios(problem, kind, "float32", seeds, condition=condition)
                assert (found <= factor).all(), (problem, condition, kind, found)
                assert (found >= 1 / 1.15).all(), (problem, condition, kind, found)


def test_loss_curves_of_ill_conditioned_problems_follow_float32() -> None:
    """Condition 1e4 and 1e6; measured: bfloat16 within 1 %, 8 bits within 4 %, at a quarter, a half and the end."""
    check_curves(range(2))


@pytest.mark.nightly
def test_loss_curves_of_ill_conditioned_problems_follow_float32_over_twenty_seeds() -> None:
    check_curves(range(20))


def test_the_emulation_without_rounding_is_the_optimizer() -> None:
    assert ratios(quadratic, "float32 nearest", "float32", range(2), condition=1e6) == pytest.approx(1, rel=1e-3)


def test_8_bits_rounded_to_nearest_take_steps_too_large() -> None:
    """v stops growing where a step adds less than half a spacing, at 2 % of g^2: steps are 7 times too large.

    With a constant rate and noisy gradients the loss settles at about twice that of stochastic rounding.
    """
    how = {"condition": 1e4, "decaying": False}
    assert (ratios(quadratic, "8bit", "float32", range(2), **how) < 1.1).all()
    assert (ratios(quadratic, "8bit nearest", "8bit", range(2), **how)[1:] > 1.5).all()


def falling(kind: str, seed: int, steps: int = 3000) -> list[float]:
    """After 300 steps the gradient falls to a twentieth, and v has to follow before the steps are right again."""
    rng = np.random.default_rng(seed)
    p = (0.1 * rng.normal(size=CHUNK) + 3).astype(np.float32)
    adam = optimizer(p, kind)
    for t in range(steps):
        scale = 1.0 if t < 300 else 0.05
        adam.step((scale * (1 + 0.3 * rng.normal(size=CHUNK))).astype(np.float32), 0.005)
    return [3 - float(p.mean())]  # the way that was made


def test_moments_rounded_to_nearest_do_not_fall() -> None:
    """A step changes v by 0.1 %, less than half the spacing: to nearest it stays for good, stochastically it falls."""
    for dtype in COMPACT:
        assert ratios(falling, dtype, "float32", range(2)) == pytest.approx(1, rel=0.06)
    assert (ratios(falling, "bfloat16 nearest", "float32", range(2)) < 0.75).all()


# ---------------------------------------------------------------------- hard gradients

N = 4 * CHUNK
RATE = 1e-3
PLACE = np.arange(N)
Gradient = Callable[[int, np.random.Generator], Any]


def burst(t: int, rng: np.random.Generator) -> Doubles:
    """Grow by 0.999 / 0.9 a step, which makes Adam's steps largest, again and again; every second element only."""
    phase = (t - np.random.default_rng(0).integers(0, 300, N)) % 120
    return np.where(PLACE % 2 == 0, (0.999 / 0.9) ** phase * 1e-3 * (phase > 0), 0.0)


def mixture(seed: int) -> Gradient:
    """Every element starts and stops, grows, and is scaled in a way of its own: 12 decades side by side in a chunk."""
    rng = np.random.default_rng(seed)
    growth, period, start = 1 + rng.exponential(0.15, N), rng.integers(5, 400, N), rng.integers(0, 400, N)
    scale, length, is_steady = 10.0 ** rng.uniform(-8, 4, N), rng.integers(1, 60, N), rng.random(N) < 0.5

    def gradient(t: int, rng: np.random.Generator) -> Doubles:
        phase = (t + start) % period
        g = scale * np.minimum(growth**phase, 1e6) * (phase < length)
        return np.where(is_steady, g, g * rng.normal(size=N))

    return gradient


SCALES = 10.0 ** np.random.default_rng(0).uniform(-5, 0, N)
# Name: gradient, settings, and how far apart the ways may be: the root mean square difference over that of the ways.
CASES: dict[str, tuple[Gradient, dict[str, Any], float]] = {
    "constant": (lambda t, rng: np.ones(N), {}, 0.08),
    "noise": (lambda t, rng: rng.normal(size=N), {}, 0.25),
    "drift": (lambda t, rng: 1 + rng.normal(size=N), {}, 0.1),
    "5 decades": (lambda t, rng: SCALES * (1 + rng.normal(size=N)), {}, 0.12),
    "one in 100": (lambda t, rng: (1 + rng.normal(size=N)) * (rng.random(N) < 0.01), {}, 0.12),
    "one in 1000": (lambda t, rng: (1 + rng.normal(size=N)) * (rng.random(N) < 0.001), {}, 0.12),
    "an outlier": (lambda t, rng: 1 + rng.normal(size=N) + 1e4 * (PLACE == 5) * (t == 300), {}, 0.1),
    "outliers": (lambda t, rng: 1 + rng.normal(size=N) + 1e5 * (PLACE % CHUNK == 5) * (t % 100 == 0), {}, 0.1),
    "1000 steps without": (lambda t, rng: (1 + rng.normal(size=N)) * (not 300 <= t < 1300), {}, 0.1),
    "half of it without": (
        lambda t, rng: (1 + rng.normal(size=N)) * np.where(PLACE % 2, 1, not 300 <= t < 1300), {}, 0.1),
    "beta1 0": (lambda t, rng: 1 + rng.normal(size=N), {"beta1": 0.0}, 0.1),
    "beta1 0.99": (lambda t, rng: 1 + rng.normal(size=N), {"beta1": 0.99}, 0.1),
    "beta2 0.9": (lambda t, rng: 1 + rng.normal(size=N), {"beta2": 0.9}, 0.1),
    "beta2 0.99999": (lambda t, rng: 1 + rng.normal(size=N), {"beta2": 0.99999}, 0.1),
    "1e-12": (lambda t, rng: 1e-12 * (1 + rng.normal(size=N)), {}, 0.02),
    "1e-12 and eps 1e-30": (lambda t, rng: 1e-12 * (1 + rng.normal(size=N)), {"eps": 1e-30}, 0.1),
    "1e10": (lambda t, rng: 1e10 * (1 + rng.normal(size=N)), {}, 0.1),
    "1e10 clipped": (lambda t, rng: 1e10 * (1 + rng.normal(size=N)), {"max_grad_norm": 1.0}, 0.1),
    "l2": (lambda t, rng: 1 + rng.normal(size=N), {"weight_decay": 0.1, "weight_decay_mode": "l2"}, 0.1),
    "falls by 1e6": (lambda t, rng: (1 + rng.normal(size=N)) * (1.0 if t < 500 else 1e-6), {}, 0.1),
    "rises by 1e6": (lambda t, rng: (0.5 + rng.normal(size=N)) * (1e-6 if t < 500 else 1.0), {}, 0.1),
    "bursts": (burst, {}, 0.12),
    **{f"mixture, beta2 {beta2}, beta1 {beta1}": (mixture(i), {"beta1": beta1, "beta2": beta2}, math.inf)
       for i, (beta1, beta2) in enumerate([(0.9, 0.999), (0.99, 0.999), (0.9, 0.9999), (0.0, 0.999), (0.5, 0.9)])},
}  # fmt: skip


def way(state_dtype: str, gradient: Gradient, steps: int, settings: dict[str, Any]) -> tuple[Doubles, float]:
    """Return how far each parameter went, and the largest step of any, both in learning rates."""
    p, largest = np.zeros(N, np.float32), 0.0
    adam = Adam(p, learning_rate=RATE, state_dtype=state_dtype, **settings)
    for t in range(steps):
        before = p.copy()
        adam.step(np.asarray(gradient(t, np.random.default_rng([1, t])), np.float64).astype(np.float32))
        largest = max(largest, float(np.abs(p - before).max()) / RATE)
    return p.astype(np.float64) / RATE, largest


@pytest.mark.parametrize("name", CASES)
def test_steps_stay_bounded_and_ways_near_those_of_float32(name: str) -> None:
    """At most 1.37 times Adam's own bound: 10 learning rates by default. Measured: 6.6 in 12 mixtures, float32 4.1."""
    gradient, settings, apart = CASES[name]
    steps = 1500 if "without" in name else 900
    exact, _ = way("float32", gradient, steps, settings)
    for dtype, share in (("bfloat16", 0.4), ("8bit", 1.0)):
        found, largest = way(dtype, gradient, steps, settings)
        difference = math.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))
        print(name, dtype, "largest step", round(largest, 2), "difference", round(difference, 4))
        assert largest <= 1.37 * max(largest_step(**settings), 1.0)
        assert difference <= share * apart


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(25))
def test_steps_stay_bounded_whatever_the_gradients(seed: int) -> None:
    for settings in ({}, {"beta1": 0.99}, {"beta2": 0.9999}, {"beta1": 0.0}, {"beta1": 0.5, "beta2": 0.9}):
        for dtype in COMPACT:
            _, largest = way(dtype, mixture(seed), 3000, settings)
            assert largest <= 1.37 * largest_step(**settings)


def test_the_first_step_is_that_of_float32_to_the_bit() -> None:
    """Moments are rounded after they were used."""
    rng = np.random.default_rng(0)
    for settings in ({}, {"beta1": 0.0}, {"weight_decay": 0.1, "weight_decay_mode": "l2"}, {"max_grad_norm": 1e-3}):
        first = rng.normal(size=1000).astype(np.float32)
        gradient = (10.0 ** rng.uniform(-12, 10, 1000) * rng.normal(size=1000)).astype(np.float32)
        results = []
        for dtype in ("float32", *COMPACT):
            p = first.copy()
            Adam(p, state_dtype=dtype, **settings).step(gradient)
            results.append(p.tobytes())
        assert results[0] == results[1] == results[2]


# ---------------------------------------------------------------------- limits of 8 bits


def test_gradients_far_below_their_chunks_largest_lose_speed_only() -> None:
    """v is never below a 32-octave part of its chunk's largest: roots 4 to 6e-6 of it. bfloat16 has no such limit.

    Measured speed by the gradient's part of the chunk's largest: above 1e-5: 1.02, 6e-6: 0.8, 2e-6: 0.3, 6e-7: 0.09.
    """
    decade = np.random.default_rng(3).permutation(np.linspace(-8, 0, N))

    def gradient(t: int, rng: np.random.Generator) -> Doubles:
        return 10.0**decade * (1 + rng.normal(size=N))

    exact, _ = way("float32", gradient, 2000, {})
    for dtype in COMPACT:
        found, largest = way(dtype, gradient, 2000, {})
        speed = [float(found[(decade >= d) & (decade < d + 1)].mean() / exact[(decade >= d) & (decade < d + 1)].mean())
                 for d in range(-8, 0)]  # fmt: skip
        print(dtype, "speed by decade from 1e-8", np.round(speed, 3), "largest step", round(largest, 2))
        assert largest <= 5
        assert speed[3:] == pytest.approx([1] * 5, abs=0.05 if dtype == "8bit" else 0.01)
        if dtype == "bfloat16":
            assert speed[:3] == pytest.approx([1] * 3, abs=0.01)
        else:
            assert 0 < speed[0] < speed[1] < speed[2] < 0.8


def test_an_enormous_outlier_slows_its_own_chunk_only() -> None:
    """1e8 times the others, unclipped: the rest of the chunk slows down until the outlier's v has decayed, which takes
    1,000 steps for a factor e. No other chunk notices anything, to the bit."""

    def gradient(t: int, rng: np.random.Generator, height: float) -> Doubles:
        g = 1 + rng.normal(size=N)
        g[5] += height * (t == 300)
        return g

    usual, _ = way("8bit", lambda t, rng: gradient(t, rng, 0.0), 1500, {})
    found, largest = way("8bit", lambda t, rng: gradient(t, rng, 1e8), 1500, {})
    assert largest <= 5
    assert found[CHUNK:].tobytes() == usual[CHUNK:].tobytes()
    speed = np.delete(found[:CHUNK], 5).mean() / np.delete(usual[:CHUNK], 5).mean()
    print("speed of the others in its chunk", round(float(speed), 3))
    assert 0.15 < speed < 0.8
