"""Elements without a gradient: their moments decay to exactly 0 and are never left subnormal; nothing else changes.

A chunk of 256 elements whose gradient is all zero drops first moments below 2^-120 and second ones below 2^-112.
"""

import math
from typing import Any

import bounds
import kernel_calls
import numpy as np
import pytest
import reference
from bounds import CHUNK, Case, Floats
from numpy.typing import NDArray
from reference import Rule, ulp

from cylora.adapter import AdapterSet, Gradients
from cylora.config import LoraConfig, LoraTrainingConfig
from cylora.optimizer import Adam
from cylora.trainer import LoraTrainer

SMALLEST_NORMAL = 2.0**-126


def subnormal(x: Floats) -> NDArray[np.bool_]:
    return (np.abs(x) < np.float32(SMALLEST_NORMAL)) & (x != 0)


def moments_left(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
    """Return moments of gradients from 1e-8 to 1, and in half a chunk second ones, down to subnormal, without first."""
    m = rng.standard_normal(n) * 10.0 ** rng.uniform(-8, 0, n)
    v = np.maximum(10.0 ** rng.uniform(-16, 0, n), m * m)
    m[: CHUNK // 2], v[: CHUNK // 2] = 0, 10.0 ** rng.uniform(-44, 0, CHUNK // 2)
    return m.astype(np.float32), v.astype(np.float32)


def steps_to_zero(beta: float, start: float, bound: float) -> int:
    """Return how many steps decay ``start`` below ``bound``, with one to spare for the rounding of many products."""
    return math.ceil(math.log(bound / start) / math.log(beta) * (1 + 1e-5)) + 1


@pytest.mark.parametrize("beta2", [0.999, 0.95])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_quiet_moments_decay_to_zero_without_subnormal_numbers(beta2: float, weight_decay: float) -> None:
    """20,000 steps without a gradient, every 37th or 499th against the oracle's.

    Where the moments must be 0 by then they are: first ones after some 800 steps, second ones by their size. The
    parameters end where the oracle's own 20,000 steps in float64 end.
    """
    rng = np.random.default_rng(3)
    n, steps, rule = 2 * CHUNK + 77, 20_000, Rule(1e-4, 0.9, beta2, 1e-8, weight_decay)
    m, v = moments_left(rng, n)
    p, g = (rng.standard_normal(n) * 0.5).astype(np.float32), np.zeros(n, np.float32)
    exact_p, exact_m, exact_v = p.astype(np.float64), m.astype(np.float64), v.astype(np.float64)
    largest, start_v = np.abs(exact_p), v.copy()
    adam = kernel_calls.prepare(p, m, v, rule, 1000)
    for i in range(steps):
        t = 1000 + i
        if i % 499 == 0 or (i < 1000 and i % 37 == 0):
            before = Case(p.copy(), g, m.copy(), v.copy(), t, rule)
            bounds.check_outcome(before, bounds.run(before))
        kernel_calls.step(adam, rule.rate, g)
        exact_m, exact_v = reference.moments(exact_m, exact_v, g.astype(np.float64), rule)
        exact_p = exact_p * (1.0 - reference.decay(rule)) - reference.update(exact_m, exact_v, t, rule)
        largest = np.maximum(largest, np.abs(exact_p))
        assert not subnormal(m).any(), t
        assert not subnormal(v).any(), t
        if i == steps_to_zero(0.9, 10.0, 2.0**-120):
            assert (m == 0).all()
    gone = exact_v < 2.0**-112 * (1 - 1e-3)
    assert gone.sum() > 40
    assert (v[gone] == 0).all()
    assert (v[exact_v > 2.0**-112 * (1 + 1e-3)] > 0).all()
    if beta2 == 0.95:
        assert steps_to_zero(beta2, float(start_v.max()), 2.0**-112) < steps
        assert not v.any()
    # The decay of a weight that nothing else moves is rounded alike at every step: half an ulp each, all the same way.
    allowed = 32 + (steps / 2 if weight_decay else 0)
    assert (np.abs(p - exact_p) <= allowed * ulp(largest)).all()
    assert not np.signbit(v).any()


@pytest.mark.parametrize("mode", ["decoupled", "l2"])
@pytest.mark.parametrize("pause", [1, 100, 900, 5000])
def test_quiet_elements_take_a_gradient_that_returns(mode: str, pause: int) -> None:
    """After any pause a step is the oracle's, to the usual bounds and without allowance."""
    rng = np.random.default_rng(pause)
    n, rule = 3 * CHUNK + 5, Rule(1e-3, weight_decay=0.0 if mode == "decoupled" else 0.1, mode=mode)
    p = rng.standard_normal(n).astype(np.float32)
    adam = Adam(p, learning_rate=rule.rate, weight_decay=rule.weight_decay, weight_decay_mode=mode)
    for _ in range(20):
        adam.step(rng.standard_normal(n).astype(np.float32) * np.float32(1e-3))
    for _ in range(pause):
        adam.step(np.zeros(n, np.float32))
    g = (rng.standard_normal(n) * 1e-3).astype(np.float32)
    g[:CHUNK] = 0
    g[7] = 1e-4  # a chunk with one element's
    before = Case(p.copy(), g, adam.m.copy(), adam.v.copy(), adam.t + 1, rule)
    assert not bounds.is_quiet(before).any()
    norm = adam.step(g)
    bounds.check_outcome(before, bounds.Outcome(p.copy(), adam.m.copy(), adam.v.copy(), norm))
    assert (adam.v[g != 0] > 0).all()


def test_quiet_drop_is_below_what_eps_lets_a_parameter_feel() -> None:
    """What dropping a first moment withholds from a parameter, at default settings: 2^-88 of the learning rate."""
    n, rule = CHUNK, Rule(1.0, 0.9, 0.999, 1e-8, 0.0)
    m = np.full(n, np.float32(2.0**-120), np.float32)
    case = Case(np.zeros(n, np.float32), np.zeros(n, np.float32), m, np.zeros(n, np.float32), 1, rule)
    got = bounds.run(case)
    want = reference.adam_step(case.p, case.g, case.m, case.v, 1, rule)
    assert (got.m == 0).all()
    assert (np.abs(got.p - want.p) <= 2.0**-88).all()


@pytest.mark.parametrize("neighbour", [0.0, 1.0])
def test_quiet_chunks_are_those_of_the_whole_vector(neighbour: float) -> None:
    """One gradient in a chunk, wherever the chunk's end falls, keeps all its elements' small moments alive."""
    n = 3 * CHUNK + 40
    for place in (0, 255, 256, 511, 512, 3 * CHUNK, n - 1):
        g = np.zeros(n, np.float32)
        g[place] = neighbour
        m, v = np.full(n, 2.0**-121, np.float32), np.full(n, 2.0**-113, np.float32)
        kernel_calls.step(kernel_calls.prepare(np.zeros(n, np.float32), m, v, Rule()), 1e-3, g)
        alive = np.arange(n) // CHUNK == place // CHUNK if neighbour else np.zeros(n, bool)
        assert np.array_equal(m != 0, alive)
        assert np.array_equal(v != 0, alive)


@pytest.mark.parametrize("form", ["bfloat16", "8bit"])
def test_quiet_compact_moments_fall_silent(form: str) -> None:
    """First moments end at 0, and then a step moves no parameter but by its decay; second ones stay finite."""
    rng = np.random.default_rng(8)
    n = 4 * CHUNK + 9
    p = rng.standard_normal(n).astype(np.float32)
    adam = Adam(p, learning_rate=1e-3, weight_decay=0.0, state_dtype=form)
    for _ in range(10):
        adam.step(rng.standard_normal(n).astype(np.float32))
    for _ in range(1500):
        adam.step(np.zeros(n, np.float32))
        v = adam.v
        assert np.isfinite(v).all()
        assert not subnormal(v).any()
        assert not subnormal(adam.m).any()
    assert not adam.m.any()
    before = p.copy()
    adam.step(np.zeros(n, np.float32))
    assert p.tobytes() == before.tobytes()
    adam.step(np.full(n, 0.5, np.float32))
    assert (np.abs(p - before) < 10e-3).all()
    assert (p < before).all()


def test_quiet_module_of_a_set_leaves_the_others_alone() -> None:
    """One module's gradient is zero for 3,000 steps: it comes to rest, the others go as if it had one.

    Its chunks at both ends hold neighbours' elements, so they are live; all is within the bounds of the oracle's way.
    """
    config = LoraTrainingConfig(
        lora_config=LoraConfig(rank=4), warmup_steps=0, learning_rate=1e-4, weight_decay=0.0, max_grad_norm=2.0**63
    )
    shapes: dict[str, Any] = {"first": (150, 31), "resting": (200, 67), "last": (90, 41)}
    rng = np.random.default_rng(4)
    starts = {name: rng.standard_normal(4 * sum(shape)).astype(np.float32) * 0.1 for name, shape in shapes.items()}

    def train(resting: bool) -> tuple[AdapterSet, LoraTrainer, dict[str, slice]]:
        adapters = AdapterSet(shapes, config.lora_config, seed=0)
        trainer, grads, rng = LoraTrainer(config), Gradients(adapters), np.random.default_rng(5)
        places, offset = {}, 0
        for name, shape in shapes.items():
            places[name] = slice(offset, offset + 4 * sum(shape))
            offset += 4 * sum(shape)
            adapters.flat.vector[places[name]] = starts[name]
        for step in range(3000):
            grads.vector[...] = rng.standard_normal(offset) * 1e-2
            if resting and step >= 30:
                grads.vector[places["resting"]] = 0
            trainer.step(1.0, adapters, grads)
        return adapters, trainer, places

    adapters, trainer, places = train(True)
    others, busy, _ = train(False)
    adam, twin = trainer.state_dict()["adam"], busy.state_dict()["adam"]
    for name in ("first", "last"):
        place = places[name]
        assert adapters.flat.vector[place].tobytes() == others.flat.vector[place].tobytes()
        assert adam["m"][place].tobytes() == twin["m"][place].tobytes()
        assert adam["v"][place].tobytes() == twin["v"][place].tobytes()
    rest = places["resting"]
    inside = slice(-(-rest.start // CHUNK) * CHUNK, rest.stop // CHUNK * CHUNK)
    assert inside.stop - inside.start >= 2 * CHUNK
    assert not adam["m"][inside].any()
    assert not subnormal(adam["v"][inside]).any()
    exact = starts["resting"].astype(np.float64)
    m, v, rng, rule = np.zeros(exact.size), np.zeros(exact.size), np.random.default_rng(5), Rule(1e-4, weight_decay=0.0)
    for step in range(3000):
        g = (rng.standard_normal(adapters.flat.vector.size) * 1e-2).astype(np.float32)[rest].astype(np.float64)
        m, v = reference.moments(m, v, g if step < 30 else 0 * g, rule)
        exact -= reference.update(m, v, step + 1, rule)
    assert (np.abs(adapters.flat.vector[rest] - exact) <= 32 * ulp(np.maximum(np.abs(exact), 1e-3))).all()
