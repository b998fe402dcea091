"""What one step's arithmetic may be off by, from the float64 oracle of reference.py: rounding errors, counted.

With u = 2^-24, the relative error of one float32 rounding, and h = 2^-150, what a denormal product may lose, the loops'
operations give these bounds; h-terms matter for denormals only. Each float32 coefficient is its float64 value rounded
once, which counts as one u. E is the error of the gradient that enters the moments:

    clipped:       clip, product                            E <= 2u |g clip| + h (1 + |g|);  0 if nothing is clipped
    l2 adds:       weight_decay, product, sum               E += 2u |wd p| + h (1 + |p|) + u |g clip + wd p|
    m' :           c1, difference, product; last sum        |error| <= ulp(m')/2 + c1 (E + 3u |g' - m|) + h
    v' :           square; c2, difference, product; sum     |error| <= ulp(v')/2 + c2 (2 |g'| E + E^2 + u g'^2
                                                                       + 3u |g'^2 - v|) + 2h
    p', from the stored m' and v', by one of two forms, of which the larger bound holds:
        two elements with one division: root or eps, their sum, product of two sums, rate, quotient, product with the
        other sum, product with m': 7u of the update
        each on its own: root, root_scale, product, sum with offset, quotient: 5u of the update, plus the offset's 2h
    decay coefficient, product: 2u of the decay; their sum; last difference
                   |error| <= ulp(p')/2 + 7u |update| + 2u |decay p| + u |decay p + update| + h terms

Products of these terms are below 1e-5 of them (SECOND_ORDER). p' is judged from the stored moments because a moment
that cancelled to nearly nothing is inaccurate relative to itself, never relative to what went into it.

Moments that are dropped: in a chunk of 256 elements, counted from the start of the vector, with a zero gradient,
m' below 2^-120 may be stored as 0, and so may v' below 2^-112 where m' is. That adds to these elements' bounds

    m' : 2^-120        v' : 2^-112        p' : rate 2^-120 / (1 - beta1^t) / eps, the most such an m' moves it

and nothing to any other's: an element with a gradient, or beside one in its chunk, is held to the bounds above alone.
"""

from typing import NamedTuple

import kernel_calls
import numpy as np
import reference
from numpy.typing import NDArray
from reference import DENORMAL_HALF as H
from reference import UNIT_ROUNDOFF as U
from reference import Rule, ulp

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

SECOND_ORDER = 1.0 + 1e-5
FLOAT32_MAX = float(np.finfo(np.float32).max)
CHUNK = 256
DROPPED_M, DROPPED_V = 2.0**-120, 2.0**-112


class Case(NamedTuple):
    """A step to judge: parameters, gradient, moments, the 1-based index of the step, the hyper-parameters."""

    p: Floats
    g: Floats
    m: Floats
    v: Floats
    t: int
    rule: Rule


class Outcome(NamedTuple):
    """What the kernel made of a case."""

    p: Floats
    m: Floats
    v: Floats
    norm: float


def run(case: Case) -> Outcome:
    p, m, v = case.p.copy(), case.m.copy(), case.v.copy()
    kept = case.g.tobytes()
    adam = kernel_calls.prepare(p, m, v, case.rule, case.t)
    norm = kernel_calls.step(adam, case.rule.rate, case.g)
    assert case.g.tobytes() == kept
    return Outcome(p, m, v, norm)


def gradient_error(case: Case, clip: float) -> Doubles:
    """Return E of the module's docstring."""
    g, p = np.abs(case.g.astype(np.float64)), np.abs(case.p.astype(np.float64))
    error = np.zeros_like(g) if clip == 1.0 else 2 * U * g * clip + H * (1 + g)
    if case.rule.mode == "l2" and case.rule.weight_decay > 0:
        error += 2 * U * case.rule.weight_decay * p + H * (1 + p)
        error += U * np.abs(reference.effective_gradient(case.p, case.g, case.rule, clip))
    return error


def is_quiet(case: Case) -> NDArray[np.bool_]:
    """Return which elements lie in a chunk without any gradient, and have none from the decay either."""
    chunks = -(-case.g.size // CHUNK)
    padded = np.zeros(chunks * CHUNK, np.float32)
    padded[: case.g.size] = case.g
    quiet = (padded.reshape(chunks, CHUNK) == 0).all(axis=1).repeat(CHUNK)[: case.g.size]
    decay = case.rule.weight_decay if case.rule.mode == "l2" else 0.0
    return quiet & (np.abs(case.p.astype(np.float64)) * decay < 2.0**-149)


def check_step(case: Case) -> None:
    """Run a case and assert every bound."""
    check_outcome(case, run(case))


def check_outcome(case: Case, got: Outcome) -> None:
    """Assert every bound of the module's docstring, and the norm."""
    rule, quiet = case.rule, is_quiet(case)
    norm = reference.norm(case.g)
    assert abs(got.norm - norm) <= 1e-12 * norm
    clip = reference.clip_scale(norm, rule.max_norm)
    g = reference.effective_gradient(case.p, case.g, rule, clip)
    error = gradient_error(case, clip)
    m, v = case.m.astype(np.float64), case.v.astype(np.float64)
    c1, c2 = 1.0 - rule.beta1, 1.0 - rule.beta2
    want_m, want_v = reference.moments(m, v, g, rule)

    bound = 0.5 * ulp(got.m) + SECOND_ORDER * (c1 * (error + 3 * U * np.abs(g - m)) + H) + DROPPED_M * quiet
    assert_within("m", got.m, want_m, bound)
    square = 2 * np.abs(g) * error + error * error + U * g * g
    bound = 0.5 * ulp(got.v) + SECOND_ORDER * (c2 * (square + 3 * U * np.abs(g * g - v)) + 2 * H)
    bound += DROPPED_V * (quiet & (got.m == 0))
    assert_within("v", got.v, want_v, bound)

    # Where m' was dropped, p may miss what the oracle's would have done, at most what the largest one dropped would.
    p, lost = case.p.astype(np.float64), np.zeros(case.p.size)
    dropped = quiet & (got.m == 0)
    lost[dropped] = np.minimum(
        rule.rate * DROPPED_M / reference.bias_correction(rule.beta1, case.t) / rule.eps,
        np.abs(reference.update(want_m, want_v, case.t, rule))[dropped],
    )
    taken = reference.decay(rule) * p
    update = reference.update(got.m, got.v, case.t, rule)
    want_p = p - taken - update
    bound = 7 * U * np.abs(update) + 2 * U * np.abs(taken) + U * np.abs(taken + update) + H * (3 + np.abs(p))
    bound += lost
    if rule.rate > 0:  # the offset may be denormal: 2h of absolute error in a denominator of this size
        denominator = np.abs(got.m) / np.maximum(np.abs(update), 1e-300)
        bound += np.abs(update) * np.minimum(2 * H / np.maximum(denominator, 1e-300), 1e3)
    if rule.rate < 1e-18:  # counts as 0
        bound += np.abs(update)
    # A stored v of 0 beside a large m, as beta2 = 0 can leave, asks for a weight beyond float32: it is infinite.
    fits = np.abs(want_p) < FLOAT32_MAX
    assert np.isinf(got.p[~fits]).all()
    assert_within("p", got.p[fits], want_p[fits], (0.5 * ulp(got.p) + SECOND_ORDER * bound)[fits])
    assert not (got.v < 0).any()


def assert_within(name: str, got: Floats, want: Doubles, bound: Doubles) -> None:
    assert np.isfinite(got).all(), f"{name} must stay finite"
    if got.size == 0:
        return
    excess = np.abs(got.astype(np.float64) - want) - bound
    worst = int(np.argmax(excess))
    assert excess[worst] <= 0, (
        f"{name}[{worst}] is {got[worst]!r}, the oracle says {want[worst]!r}: "
        f"off by {abs(float(got[worst]) - want[worst]) / bound[worst]:.3f} of its bound"
    )
