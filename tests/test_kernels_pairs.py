"""Two parameters share a division: where that would leave float32 each has its own, and nobody else notices.

Element i of a part is paired with i + 8 or i - 8 within 16; spans of 32 decide together.
"""

import itertools

import bounds
import numpy as np
import pytest
from bounds import Case, Floats
from reference import Rule

SPAN, PAIR = 32, 8


def case(v: Floats, rule: Rule, t: int = 1000, seed: int = 0) -> Case:
    """A step with these second moments, and first ones and gradients about their roots."""
    rng = np.random.default_rng(seed)
    root = np.sqrt(v.astype(np.float64))
    m = (root * rng.uniform(-1, 1, v.size)).astype(np.float32)
    g = (root * rng.uniform(-1, 1, v.size)).astype(np.float32)
    return Case(rng.standard_normal(v.size).astype(np.float32), g, m, v, t, rule)


@pytest.mark.parametrize("rate", [1e-19, 1e-18, 1e-12, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("eps", [1e-30, 1e-18, 8.6e-19, 1e-17, 1e-8, 1.0, 1e17, 1e30])
def test_shared_divisions_keep_the_bounds_from_the_smallest_to_the_largest(rate: float, eps: float) -> None:
    """Spans of one magnitude, and spans where the largest meets the smallest, on both sides of every limit."""
    exponents = np.arange(-149, 127, 3.0)
    alone = np.exp2(np.repeat(exponents, SPAN))
    mixed = np.exp2(np.array(list(itertools.product(exponents[::7], exponents[::7]))).ravel())
    v = np.concatenate([alone, mixed, [0.0] * SPAN, [0.0, 2.0**126] * (SPAN // 2)]).astype(np.float32)
    for t in (1, 7, 100_000):
        bounds.check_step(case(v, Rule(rate, 0.9, 0.999, eps, 0.0), t))


def test_shared_divisions_meet_their_limit_within_the_bounds() -> None:
    """Products of two denominators a few units below, at and above what they may be."""
    rule = Rule(2.0**-20, 0.0, 0.5, 2.0**-30, 0.0)
    limit = 2.0**100  # rate * 2^120
    for offset in range(-6, 7):
        root = np.sqrt(limit) * (1.0 + offset * 2.0**-24)
        bounds.check_step(case(np.full(SPAN, root * root, np.float32), rule, 60))


def test_a_parameter_depends_on_nobody_but_its_partner() -> None:
    rng = np.random.default_rng(1)
    n = 5 * SPAN + 21
    plain = case(rng.uniform(1e-4, 1.0, n).astype(np.float32), Rule(1e-3))
    before = bounds.run(plain)
    for changed in (0, 7, 8, 15, 16, 40, n - 22, n - 21, n - 9, n - 1):
        v = plain.v.copy()
        v[changed] *= 1.7
        after = bounds.run(plain._replace(v=v))
        differ = set(np.flatnonzero(after.p != before.p).tolist())
        place = changed % (2 * PAIR)
        partner = changed + PAIR if place < PAIR else changed - PAIR
        assert changed in differ
        assert differ <= {changed, partner}, changed


def test_one_extreme_element_moves_its_span_to_single_divisions_only() -> None:
    """What lies in other spans keeps its bits, and all of them keep the bounds."""
    rng = np.random.default_rng(2)
    plain = case(rng.uniform(1e-4, 1.0, 4 * SPAN).astype(np.float32), Rule(1e-12, 0.9, 0.999, 1e-8, 0.0))
    before = bounds.run(plain)
    v = plain.v.copy()
    v[SPAN + 3] = 2.0**126
    extreme = plain._replace(v=v)
    bounds.check_step(extreme)
    after = bounds.run(extreme)
    others = np.ones(4 * SPAN, bool)
    others[SPAN : 2 * SPAN] = False
    assert np.array_equal(after.p[others], before.p[others])
