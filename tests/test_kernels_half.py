"""Gradients in half precision: every result is, bit for bit, that of the float32 numbers they stand for.

Widening is exact, so NumPy's conversion of float16, and a shift of bfloat16's bits, are the oracle.
"""

import math
from typing import Any

import kernel_calls
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import Rule

from cylora.errors import NonFiniteGradientError
from cylora.optimizer import Adam, grad_norm, joined

Floats = NDArray[np.float32]
PATTERNS = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
HALVES = ("float16", "bfloat16")


def stored(bits: NDArray[np.uint16], kind: str) -> NDArray[Any]:
    return bits.view(np.float16) if kind == "float16" else bits


def widened(bits: NDArray[np.uint16], kind: str) -> Floats:
    """Return what the bits stand for; NaN without NumPy's warning about signalling ones."""
    if kind == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        return bits.view(np.float16).astype(np.float32)


@pytest.mark.parametrize("kind", HALVES)
def test_half_every_pattern_widens_exactly(kind: str) -> None:
    """The norm of each of the 65,536 alone is its magnitude; neither infinities nor NaN become numbers."""
    g, wide = stored(PATTERNS, kind), widened(PATTERNS, kind)
    norms = np.array([grad_norm([g[i : i + 1]]) for i in range(PATTERNS.size)])
    finite = np.isfinite(wide)
    assert finite.sum() == (63_488 if kind == "float16" else 65_280)
    assert (norms[finite] == np.abs(wide[finite].astype(np.float64))).all()
    assert not np.isfinite(norms[~finite]).any()
    # Eight and more at once go another way than one.
    for start in range(0, PATTERNS.size, 256):
        block = slice(start, start + 256)
        assert grad_norm([g[block]]) == grad_norm([widened(PATTERNS[block], kind)]) or not finite[block].all()


@pytest.mark.parametrize("kind", HALVES)
def test_half_every_pattern_steps_like_its_float32(kind: str) -> None:
    """One element at a time and all together: parameters and moments; a non-finite one is refused and named."""
    wide = widened(PATTERNS, kind)
    usable = np.isfinite(wide) & (np.abs(wide) <= 2.0**63)
    vectors = [np.zeros(1, np.float32) for _ in range(6)]
    rule = Rule(1e-3, 0.5, 0.5)
    narrow_adam = kernel_calls.prepare(*vectors[:3], rule)
    float_adam = kernel_calls.prepare(*vectors[3:], rule)
    g = stored(PATTERNS, kind)
    for i in np.flatnonzero(usable):
        assert narrow_adam.apply(g[i : i + 1], 1e-3) == float_adam.apply(wide[i : i + 1], 1e-3)
        if i % 16 == 0:
            assert [x.tobytes() for x in vectors[:3]] == [x.tobytes() for x in vectors[3:]]
    n = int(usable.sum())
    together = [np.zeros(n, np.float32) for _ in range(6)]
    kernel_calls.prepare(*together[:3], rule).apply(stored(PATTERNS[usable], kind), 1e-3)
    kernel_calls.prepare(*together[3:], rule).apply(wide[usable], 1e-3)
    for got, want in zip(together[:3], together[3:], strict=True):
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("kind", HALVES)
def test_half_every_nonfinite_pattern_is_refused_and_named(kind: str) -> None:
    wide = widened(PATTERNS, kind)
    p, g = np.ones(5, np.float32), np.zeros(5, np.uint16)
    adam = Adam(p)
    for i in np.flatnonzero(~np.isfinite(wide)):
        g[3] = PATTERNS[i]
        with pytest.raises(NonFiniteGradientError, match=f"must be finite, got {wide[i]} at \\[3\\]"):
            adam.step(stored(g, kind))
    assert adam.t == 0
    assert p.tobytes() == np.ones(5, np.float32).tobytes()


@st.composite
def mixtures(draw: Any) -> tuple[list[NDArray[Any]], list[Floats], Rule, np.random.Generator]:
    """Draw one or two pieces of any type of gradient, of all magnitudes, with stretches of zeros; and a rule."""
    sizes = draw(st.lists(st.one_of(st.integers(1, 700), st.integers(1, 20_000)), min_size=1, max_size=2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pieces, wide = [], []
    for n in sizes:
        kind = draw(st.sampled_from(["float32", *HALVES]))
        bits = rng.integers(0, 2**16, n).astype(np.uint16)
        bits[rng.random(n) < 0.5] &= 0x83FF if kind == "float16" else 0x807F  # subnormal
        if draw(st.booleans()):
            bits[: n // 2] = 0
        values = widened(bits, "float16" if kind == "float16" else "bfloat16")
        bits[~np.isfinite(values)] = 0x8001
        values = widened(bits, "float16" if kind == "float16" else "bfloat16")
        pieces.append(values if kind == "float32" else stored(bits, kind))
        wide.append(values)
    max_norm = draw(st.sampled_from([1.0, 1e-3, 2.0**60]))
    mode = draw(st.sampled_from(["decoupled", "l2"]))
    return pieces, wide, Rule(1e-3, weight_decay=0.1, mode=mode, max_norm=max_norm), rng


@settings(max_examples=300)
@given(mixtures())
def test_half_step_is_the_float32_step(drawn: Any) -> None:
    """Any mix of types for A and B, flat and as a pair: norm, parameters and moments are those of float32 gradients."""
    pieces, wide, rule, rng = drawn
    n = sum(x.size for x in wide)
    start = [rng.standard_normal(n), rng.standard_normal(n) * 1e-3, rng.random(n) * 1e-5]
    results = []
    for gradient in (pieces, wide, [np.concatenate(wide)]):
        p, m, v = (x.astype(np.float32) for x in start)
        if len(gradient) == 1:
            norm = kernel_calls.step(kernel_calls.prepare(p, m, v, rule, 7), rule.rate, gradient[0])
        else:
            shapes = {"shape_a": (gradient[0].size, 1), "shape_b": (1, gradient[1].size)}
            norm = kernel_calls.step_pair(kernel_calls.prepare(p, m, v, rule, 7, **shapes), rule.rate, *gradient)
        results.append((norm, p.tobytes(), m.tobytes(), v.tobytes()))
    assert results[0] == results[1] == results[2]
    exact = reference.norm(*wide)
    assert math.isclose(results[0][0], exact, rel_tol=1e-13)
    assert grad_norm(pieces) == results[0][0]


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("n", [1, 7, 8, 9, 255, 256, 257, 4099])
def test_half_micro_batches_add_up_like_float32(kind: str, n: int) -> None:
    rng = np.random.default_rng(n)
    batches = [stored((rng.integers(0, 2**16, n) & 0xBFFF).astype(np.uint16), kind) for _ in range(3)]
    totals = []
    for widen in (False, True):
        p, m, v, total = (np.zeros(n, np.float32) for _ in range(4))
        adam = kernel_calls.prepare(p, m, v, Rule(max_norm=1.0))
        kernel_calls.begin_micro_batches(adam)
        for weight, g in zip((1.0, 1 / 3, 7.3), batches, strict=True):
            kernel_calls.accumulate(adam, total, weight, widened(g.view(np.uint16), kind) if widen else g)
        totals.append(total.tobytes())
    assert totals[0] == totals[1]


@pytest.mark.parametrize("kind", HALVES)
def test_half_copy_is_what_it_stands_for(kind: str) -> None:
    """A zero loses its sign, which no step can tell."""
    copied, sizes = joined([stored(PATTERNS, kind)])
    expected = widened(PATTERNS, kind)
    assert sizes == [PATTERNS.size]
    assert np.array_equal(copied, expected, equal_nan=True)
    assert not np.signbit(copied[expected == 0]).any()
