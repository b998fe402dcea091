"""The kernels' arithmetic against the float64 oracle of reference.py, on the instruction set under test.

One step (a): the bounds that bounds.py derives by counting roundings.

One step (b). The short figures "p 2 ulp, m 1 ulp, v 2 ulp of the larger of old and new" follow from (a) wherever a step
is moderate, as `moderate` defines it; elsewhere the larger of old and new is not the scale of what was rounded.
"""

import math
from typing import Any, NamedTuple

import kernel_calls
import numpy as np
import pytest
import reference
from bounds import FLOAT32_MAX, SECOND_ORDER, Case, Doubles, Floats, Outcome, check_step, gradient_error, run
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import UNIT_ROUNDOFF as U
from reference import Rule, ulp

from cylora.errors import InputError
from cylora.optimizer import Adam, clip_grad_norm_, grad_norm

LENGTHS = (0, 1, 15, 16, 17, 127, 4099)


# ---------------------------------------------------------------------- one step: the examples

SPECIAL = np.array([0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 1.1754944e-38, 1, -1, 1 + 2.0**-23, 2.0**-75], np.float32)
LAWS = ("normal", "wide", "denormal", "huge", "ties", "constant", "sparse", "special", "silent")


def values(rng: np.random.Generator, law: str, n: int, scale: float) -> Floats:
    """Return n gradients of a law."""
    x = rng.standard_normal(n)
    if law == "wide":
        x = x * 10.0 ** rng.uniform(-20, 0, n)
    elif law == "denormal":
        x, scale = rng.integers(-(2**23), 2**23, n) * 2.0**-149, 1.0
    elif law == "huge":
        x, scale = np.sign(x) * 10.0 ** rng.uniform(30, 38.5, n), 1.0
    elif law == "ties":  # few bits: sums and products fall on the midpoints between float32 numbers
        x = rng.integers(-7, 8, n) * 2.0 ** rng.integers(-24, 25, n)
    elif law == "constant":
        x = np.full(n, x[0] if n else 0.0)
    elif law == "sparse":
        x = x * (rng.random(n) < 0.05)
    elif law == "silent":  # whole chunks without a gradient, beside some that have one element's
        x = x * (rng.random(n // 256 + 1) < 0.4).repeat(256)[:n]
        x[::1000] = rng.choice([0.0, -0.0, 1.0])
    elif law == "special":
        x = rng.choice(SPECIAL, n).astype(np.float64)
    return (x * scale).astype(np.float32)


BETAS = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.98, 0.999, 0.9999, 1 - 1e-6]), st.floats(0.0, 1 - 1e-6))


@st.composite
def cases(draw: Any) -> Case:
    """Draw one step over a whole vector: sizes, hyper-parameters, the state's history, the gradient's law, clipping."""
    n = draw(st.one_of(st.integers(0, 4099), st.sampled_from(LENGTHS)))
    law = draw(st.sampled_from(LAWS))
    state = draw(st.sampled_from(["zero", "warm", "stale", "exact", "fading"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.floats(-8, 6))
    g = values(rng, law, n, scale)
    size = reference.norm(g)
    clipped = law == "huge" or draw(st.booleans())
    max_norm = math.inf
    if clipped and size > 0:
        # From no clipping at all, through equality, down to a millionth of the norm.
        share = draw(st.one_of(st.sampled_from([1.0, 2.0, 0.5]), st.floats(1e-6, 1.5)))
        max_norm = min(max(size * share, 1e-30), 2.0**63)
    rule = Rule(
        rate=draw(st.one_of(st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e6]), st.floats(-12, 3).map(lambda x: 10.0**x))),
        beta1=draw(BETAS),
        beta2=draw(BETAS),
        eps=draw(st.one_of(st.just(1e-8), st.floats(-30, 0).map(lambda x: 10.0**x))),
        weight_decay=draw(st.sampled_from([0.0, 0.01, 0.1, 1.0, 1 / 3])),
        mode=draw(st.sampled_from(["decoupled", "l2"])),
        max_norm=max_norm,
    )
    t = 1 if state == "zero" else draw(st.one_of(st.integers(2, 50), st.integers(2, 10**6)))
    seen = np.abs(g.astype(np.float64)) * reference.clip_scale(size, max_norm)
    m, v = np.zeros(n), np.zeros(n)
    if state == "warm":  # moments of gradients like this one
        m, v = rng.standard_normal(n) * seen, seen * seen * rng.uniform(0.2, 2.0, n)
    elif state == "stale":  # moments of much larger or smaller ones
        ratio = 10.0 ** rng.uniform(-4, 4, n)
        m, v = rng.standard_normal(n) * seen * ratio, seen * seen * ratio * ratio
    elif state == "exact":  # already where this gradient pulls: differences cancel
        m, v = g.astype(np.float64) * reference.clip_scale(size, max_norm), seen * seen
    elif state == "fading":  # what is left long after the last gradient, denormals among it
        m = rng.standard_normal(n) * 2.0 ** rng.uniform(-150, -90, n) * (rng.random(n // 256 + 1) < 0.6).repeat(256)[:n]
        v = 2.0 ** rng.uniform(-150, -90, n)
    m, v = np.clip(m, -(2.0**63), 2.0**63), np.clip(v, 0.0, 2.0**126)
    weights = draw(st.sampled_from(["trained", "zero", "large", "denormal", "special"]))
    p = {
        "trained": rng.standard_normal(n) * 0.05,
        "zero": np.zeros(n),
        "large": rng.standard_normal(n) * 10.0 ** rng.uniform(0, 17, n),
        "denormal": rng.integers(-(2**23), 2**23, n) * 2.0**-149,
        "special": rng.choice(SPECIAL, n).astype(np.float64),
    }[weights]
    return Case(p.astype(np.float32), g, m.astype(np.float32), v.astype(np.float32), t, rule)


def judge(case: Case) -> None:
    if case.p.size == 0:
        with pytest.raises(InputError, match="parameters must not be empty, got 0 elements"):
            Adam(case.p)
        with pytest.raises(ValueError, match="parameters must not be empty"):
            kernel_calls.prepare(case.p, case.m, case.v, case.rule, case.t)
        return
    check_step(case)


@settings(max_examples=2_000)
@given(cases())
def test_adam_step_keeps_the_running_error_bound(case: Case) -> None:
    """An estimate for a quotient, eps inside the root, a wrong or coarser coefficient, a lost tail: each shows."""
    judge(case)


@pytest.mark.nightly
@settings(max_examples=20_000)
@given(cases())
def test_adam_step_keeps_the_running_error_bound_long(case: Case) -> None:
    judge(case)


@pytest.mark.parametrize("n", [n for n in LENGTHS if n])
@pytest.mark.parametrize("offset", [0, 4, 16, 60])
@pytest.mark.parametrize("mode", ["decoupled", "l2"])
def test_adam_step_is_right_at_every_length_and_address(floats_at: Any, n: int, offset: int, mode: str) -> None:
    """Head, body and tail of the vector loops; nothing before or after the arrays is touched."""
    rng = np.random.default_rng(n + offset)
    rule = Rule(1e-3, weight_decay=0.1, mode=mode, max_norm=0.5)
    shifts = {"p": 0, "g": 4, "m": 8, "v": 12}
    whole = {name: floats_at(rng.random(n + 32).astype(np.float32), (offset + shifts[name]) % 64) for name in shifts}
    parts = {name: x[16 : 16 + n] for name, x in whole.items()}
    before = {name: x.copy() for name, x in whole.items()}
    case = Case(*(parts[name].copy() for name in "pgmv"), 7, rule)
    check_step(case)
    adam = kernel_calls.prepare(parts["p"], parts["m"], parts["v"], rule, 7)
    norm = kernel_calls.step(adam, rule.rate, parts["g"])
    want = run(case)
    assert norm == want.norm
    for name in "pmv":
        assert parts[name].tobytes() == getattr(want, name).tobytes()
    for name, x in whole.items():
        assert x[:16].tobytes() == before[name][:16].tobytes()
        assert x[16 + n :].tobytes() == before[name][16 + n :].tobytes()
    assert whole["g"].tobytes() == before["g"].tobytes()


# ---------------------------------------------------------------------- one step: the short figures


def training_case(rng: np.random.Generator, mode: str, *, clipped: bool, default_betas: bool) -> Case:
    """Return a step in the middle of a training: 20 to 400 steps of noisy gradients behind it."""
    n, t = 4096, int(rng.integers(20, 400))
    beta1, beta2 = (0.9, 0.999) if default_betas else (float(rng.uniform(0.8, 0.99)), float(rng.uniform(0.9, 0.9999)))
    rule = Rule(10.0 ** rng.uniform(-5, -3), beta1, beta2, 1e-8, float(rng.choice([0.0, 0.01, 0.1])), mode)
    scale = 10.0 ** rng.uniform(-4, 0, n)
    p, m, v = rng.standard_normal(n) * 0.5, np.zeros(n), np.zeros(n)
    for _ in range(t - 1):
        m, v = reference.moments(m, v, (0.3 + rng.standard_normal(n)) * scale, rule)
    g = ((0.3 + rng.standard_normal(n)) * scale).astype(np.float32)
    if clipped:
        rule = rule._replace(max_norm=reference.norm(g) * float(rng.uniform(0.05, 0.95)))
    return Case(p.astype(np.float32), g, m.astype(np.float32), v.astype(np.float32), t, rule)


def moderate(case: Case, got: Outcome) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return where p, m and v move so little that (a) leaves 1.5, 0.5 and 1.5 ulp of the larger of old and new.

    For m and v these are the terms of (a) but the last rounding, against u times the larger of old and new, which is at
    most an ulp of it: c1 (E + 3u |g' - m|) <= u max/2 and c2 (2 |g'| E + u g'^2 + 3u |g'^2 - v|) <= 1.5u max. For p,
    judged by the oracle's own moments here: the update of the terms' sizes and the decay take at most a 16th of it.
    """
    rule = case.rule
    clip = reference.clip_scale(reference.norm(case.g), rule.max_norm)
    p, m, v = (np.abs(x.astype(np.float64)) for x in (case.p, case.m, case.v))
    g = reference.effective_gradient(case.p, case.g, rule, clip)
    error, c1, c2 = gradient_error(case, clip), 1.0 - rule.beta1, 1.0 - rule.beta2
    m_good = c1 * (error + 3 * U * np.abs(g - case.m)) <= 0.5 * U * np.maximum(m, np.abs(got.m))
    v_terms = 2 * np.abs(g) * error + U * g * g + 3 * U * np.abs(g * g - v)
    v_good = c2 * v_terms <= 1.5 * U * np.maximum(v, got.v)
    terms = np.abs(case.g.astype(np.float64)) * clip + (rule.weight_decay * p if rule.mode == "l2" else 0.0)
    step = reference.update(rule.beta1 * m + c1 * terms, got.v, case.t, rule)
    p_good = step + reference.decay(rule) * p <= p / 16
    return p_good, m_good, v_good


@pytest.mark.parametrize("mode", ["decoupled", "l2"])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("default_betas", [True, False])
def test_adam_step_keeps_the_short_figures_where_moderate(mode: str, clipped: bool, default_betas: bool) -> None:
    """p within 2 ulp, m within 1, v within 2 of the larger of old and new, against the oracle's exact coefficients."""
    rng = np.random.default_rng([17, clipped, default_betas, mode == "l2"])
    judged = np.zeros(3)
    for _ in range(12):
        case = training_case(rng, mode, clipped=clipped, default_betas=default_betas)
        got = run(case)
        want = reference.adam_step(case.p, case.g, case.m, case.v, case.t, case.rule)
        masks = moderate(case, got)
        for i, (old, new, exact, limit) in enumerate(
            ((case.p, got.p, want.p, 2.0), (case.m, got.m, want.m, 1.0), (case.v, got.v, want.v, 2.0))
        ):
            error = np.abs(new - exact) / ulp(np.maximum(np.abs(old), np.abs(new)))
            assert error[masks[i]].max(initial=0.0) <= limit
            judged[i] += masks[i].mean() / 12
    assert judged[0] > 0.99  # the figures speak of nearly every weight, most second and some first moments
    assert judged[1] > 0.1
    assert judged[2] > 0.5


# ---------------------------------------------------------------------- many steps


def usual_form(p: Floats, g: Floats, m: Floats, v: Floats, t: int, rule: Rule) -> None:
    """Do one step as float32 libraries do it, in place: the control that the figures below tell the two apart."""
    one = np.float32(1)
    b1, b2 = np.float32(rule.beta1), np.float32(rule.beta2)
    m[...] = b1 * m + (one - b1) * g
    v[...] = b2 * v + (one - b2) * g * g
    step = np.float32(rule.rate / (1 - rule.beta1**t))
    root = np.float32(math.sqrt(1 - rule.beta2**t))
    p *= one - np.float32(rule.rate * rule.weight_decay)
    p -= step * m / (np.sqrt(v) / root + np.float32(rule.eps))


def gradient_of(law: str, rng: np.random.Generator, n: int, t: int) -> Floats:
    x = rng.standard_normal(n)
    if law == "heavy":
        x = x / np.sqrt(rng.chisquare(3, n) / 3)
    elif law == "drifting":
        x = 0.5 * x + math.sin(t / 200) + 0.5
    return (0.01 * x).astype(np.float32)


class Drift(NamedTuple):
    """Median errors over many steps, in ulps: of cylora's p and v, and of the usual float32 form's."""

    p: float
    v: float
    usual_p: float
    usual_v: float


def drift(law: str, seed: int, n: int, steps: int) -> Drift:
    rng = np.random.default_rng(seed)
    rule = Rule(rate=1e-3, weight_decay=0.01)
    start = (rng.standard_normal(n) * 0.05).astype(np.float32)
    p, usual = start.copy(), [start.copy(), np.zeros(n, np.float32), np.zeros(n, np.float32)]
    adam = Adam(p, learning_rate=rule.rate, weight_decay=rule.weight_decay, weight_decay_mode="decoupled")
    exact_p, exact_m, exact_v = start.astype(np.float64), np.zeros(n), np.zeros(n)
    for t in range(1, steps + 1):
        g = gradient_of(law, rng, n, t)
        adam.step(g)
        exact_m, exact_v = reference.moments(exact_m, exact_v, g.astype(np.float64), rule)
        exact_p = exact_p * (1.0 - reference.decay(rule)) - reference.update(exact_m, exact_v, t, rule)
        usual_form(usual[0], g, usual[1], usual[2], t, rule)

    def median(got: Floats, exact: Doubles) -> float:
        return float(np.median(np.abs(got - exact) / ulp(exact)))

    return Drift(median(p, exact_p), median(adam.v, exact_v), median(usual[0], exact_p), median(usual[2], exact_v))


@pytest.mark.parametrize("law", ["normal", "heavy", "drifting"])
@pytest.mark.parametrize("seed", [1, 2])
def test_adam_stays_accurate_over_300_steps(law: str, seed: int) -> None:
    """Errors must not add up: the increment form's do so like a random walk, the usual form's systematically."""
    found = drift(law, seed, 1024, 300)
    assert found.p <= 8
    assert found.v <= 4
    assert found.usual_p > 16
    assert found.usual_v > 16


@pytest.mark.nightly
@pytest.mark.parametrize("law", ["normal", "heavy", "drifting"])
@pytest.mark.parametrize("seed", range(5))
def test_adam_stays_accurate_over_10000_steps(law: str, seed: int, record_property: Any) -> None:
    found = drift(law, seed, 4096, 10_000)
    for name, value in found._asdict().items():
        record_property(f"median_{name}_ulp", value)
    assert found.p <= 32
    assert found.v <= 8
    assert found.usual_p > 32


def stray(form: str, law: str, seed: int, n: int, steps: int) -> float:
    """Return how far parameters of compact moments end from the oracle's, of how far those went: medians' quotient."""
    rng = np.random.default_rng(seed)
    rule = Rule(rate=1e-3, weight_decay=0.01)
    start = (rng.standard_normal(n) * 0.05).astype(np.float32)
    p = start.copy()
    adam = Adam(p, learning_rate=rule.rate, weight_decay=rule.weight_decay, state_dtype=form)
    exact_p, m, v = start.astype(np.float64), np.zeros(n), np.zeros(n)
    for t in range(1, steps + 1):
        g = gradient_of(law, rng, n, t)
        adam.step(g)
        m, v = reference.moments(m, v, g.astype(np.float64), rule)
        exact_p = exact_p * (1.0 - reference.decay(rule)) - reference.update(m, v, t, rule)
    return float(np.median(np.abs(p - exact_p)) / np.median(np.abs(exact_p - start)))


# A rounding that moves v by d of itself happens with probability c2 |g^2 / v - 1| / d in each step, and is forgotten
# after 1 / c2 steps. So v wanders by about sqrt(d / 2) of itself and a step's length by half of that: with gaps d of
# 0.4 to 0.8 % by 2.5 %, with 6 to 12 % by 10 %. Noise of m adds up to 10 d m / sqrt(6) for each step, m being 0.23 of a
# step if gradients are noise: 0.5 and 8 %. Together 2.6 and 13 % of what a parameter moves if all steps count alike;
# half more is allowed for laws with heavy tails, where |g^2 / v - 1| is larger.
STRAY = {"bfloat16": 0.04, "8bit": 0.2}


@pytest.mark.parametrize("form", list(STRAY))
@pytest.mark.parametrize("law", ["normal", "heavy", "drifting"])
def test_adam_with_compact_moments_stays_near_over_500_steps(form: str, law: str) -> None:
    assert 0 < stray(form, law, 1, 1024, 500) <= STRAY[form]


@pytest.mark.nightly
@pytest.mark.parametrize("form", list(STRAY))
@pytest.mark.parametrize("law", ["normal", "heavy", "drifting"])
@pytest.mark.parametrize("seed", range(5))
def test_adam_with_compact_moments_stays_near_over_10000_steps(
    form: str, law: str, seed: int, record_property: Any
) -> None:
    found = stray(form, law, seed, 4096, 10_000)
    record_property("median_error_of_movement", found)
    assert 0 < found <= STRAY[form]


# ---------------------------------------------------------------------- norm, clipping, accumulation

NORM_SIZES = (1, 2, 15, 16, 17, 127, 4099, 8191, 8192, 8193, 65_537, 1_000_003)
LARGEST = 4_200_000


def norm_values(law: str, n: int) -> Floats:
    rng = np.random.default_rng(n)
    if law == "smallest":
        return np.full(n, 1e-45, np.float32)
    if law == "largest":
        return np.where(rng.random(n) < 0.5, np.float32(3e38), np.float32(-3.3e38))
    if law == "denormal":
        return (rng.integers(-(2**23), 2**23, n) * 2.0**-149).astype(np.float32)
    if law == "every magnitude":
        return (np.sign(rng.standard_normal(n)) * 10.0 ** rng.uniform(-44.8, 38.5, n)).astype(np.float32)
    assert law == "normal"
    return rng.standard_normal(n).astype(np.float32)


def check_norm(g: Floats) -> None:
    """Assert the norm is within the a-priori error of its summation, far below half an ulp of float32.

    A lane adds at most min(n, 8192) / 16 squares, the tree folds 4 times, n / 8192 blocks are added: each a rounding of
    at most 2^-53 relative, halved by the root, which is one more.
    """
    exact, n = reference.norm(g), g.size
    got = grad_norm([g])
    roundings = min(n, 8192) / 16 + 4 + n / 8192
    assert abs(got - exact) <= (roundings / 2 + 1) * 2.0**-53 * exact
    assert abs(got - exact) <= 1e-6 * ulp(exact)
    if exact <= FLOAT32_MAX:
        assert abs(float(np.float32(got)) - exact) <= (0.5 + 1e-6) * ulp(exact)
    assert 0.0 < got < math.inf


@pytest.mark.parametrize("law", ["smallest", "largest", "denormal", "every magnitude", "normal"])
def test_norm_is_within_half_an_ulp(law: str) -> None:
    """Squares of 3e38 must not overflow, squares of 1e-45 not vanish, sums of many not lose the small ones."""
    for n in NORM_SIZES:
        check_norm(norm_values(law, n))


@pytest.mark.parametrize("law", ["largest", "every magnitude", "normal"])
def test_norm_is_within_half_an_ulp_of_4_million(law: str) -> None:
    check_norm(norm_values(law, LARGEST))


def test_norm_is_not_lost_among_zeros_nor_beside_giants() -> None:
    """One tiny element is the norm; a million small ones beside a large one still count."""
    lone = np.zeros(100_003, np.float32)
    lone[77_777] = 1e-45
    assert grad_norm([lone]) == float(np.float32(1e-45))
    mixed = np.full(1_000_000, 1.0, np.float32)
    mixed[-1] = 1e4
    check_norm(mixed)
    assert float(np.float32(grad_norm([mixed]))) > 1e4
    assert grad_norm([np.zeros(5, np.float32)]) == 0.0
    assert math.copysign(1.0, grad_norm([])) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [1, 16, 17, 8193])
def test_norm_is_nonfinite_only_with_a_nonfinite_element(bad: float, n: int) -> None:
    for place in {0, n // 2, n - 1}:
        g = np.full(n, 3.4e38, np.float32)
        assert math.isfinite(grad_norm([g]))
        g[place] = bad
        assert not math.isfinite(grad_norm([g]))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("offset", [0, 4, 60])
def test_norm_and_clip_are_right_at_every_length_and_address(floats_at: Any, n: int, offset: int) -> None:
    whole = floats_at(np.random.default_rng(n).standard_normal(n + 32).astype(np.float32), offset)
    before, part = whole.copy(), whole[16 : 16 + n]
    exact = reference.norm(part)
    assert abs(grad_norm([part]) - exact) <= 1e-14 * exact
    limit = 0.3 * exact if n else 1.0
    assert abs(clip_grad_norm_([part], limit) - exact) <= 1e-14 * exact
    want = before[16 : 16 + n].astype(np.float64) * reference.clip_scale(exact, limit)
    assert np.all(np.abs(part - want) <= 0.5 * ulp(part) + U * np.abs(want))
    assert whole[:16].tobytes() + whole[16 + n :].tobytes() == before[:16].tobytes() + before[16 + n :].tobytes()


@pytest.mark.parametrize("n", [n for n in LENGTHS if n])
@pytest.mark.parametrize("offset", [0, 4, 60])
def test_accumulate_is_right_at_every_length_and_address(floats_at: Any, n: int, offset: int) -> None:
    """total + weight * g: weight rounded once, product, sum. The first micro-batch starts from zero."""
    rng = np.random.default_rng(n)
    p, m, v = (floats_at(n) for _ in range(3))
    whole = floats_at(np.full(n + 32, 9.0, np.float32), offset)
    total = whole[16 : 16 + n]
    adam = kernel_calls.prepare(p, m, v, Rule())
    kernel_calls.begin_micro_batches(adam)
    exact, size = np.zeros(n), np.zeros(n)
    bound = np.zeros(n)
    for weight in (1.0, 0.1, 37.0):
        g = floats_at(rng.standard_normal(n).astype(np.float32), (offset + 8) % 64)
        kernel_calls.accumulate(adam, total, weight, g)
        exact += weight * g.astype(np.float64)
        size = np.abs(weight * g.astype(np.float64))
        bound += 2 * U * size + 0.5 * ulp(total)
        assert np.all(np.abs(total - exact) <= SECOND_ORDER * bound)
    assert (whole[:16] == 9.0).all()
    assert (whole[16 + n :] == 9.0).all()


@pytest.mark.parametrize("divisor", [1.0, 3.0, 1e6, 1e-3])
def test_divided_step_is_the_step_of_the_mean(divisor: float) -> None:
    """The sum of micro-batches is divided while it is read: norm, clipping and moments are those of the mean."""
    rng = np.random.default_rng(3)
    g = (rng.standard_normal(1000) * divisor).astype(np.float32)
    rule = Rule(1e-3, max_norm=5.0, weight_decay=0.0)
    p, m, v = (np.zeros(1000, np.float32) for _ in range(3))
    norm = kernel_calls.step_mean(kernel_calls.prepare(p, m, v, rule), rule.rate, g, divisor)
    mean = g.astype(np.float64) / divisor
    want = reference.adam_step(np.zeros(1000), mean, np.zeros(1000), np.zeros(1000), 1, rule)
    assert abs(norm - want.norm) <= 1e-14 * want.norm
    np.testing.assert_allclose(m, want.m, rtol=8 * U)
    np.testing.assert_allclose(v, want.v, rtol=12 * U)
    np.testing.assert_allclose(p, want.p, rtol=30 * U)
