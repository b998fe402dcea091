"""Moments in bfloat16 and 8 bits: what is stored, how it is rounded, and that a step is one of float32 all the same.

Judge of what is stored: codec.py, a transcription of the formats' description. Judge of the step: bounds.py, and the
step of float32 moments that start from the decoded numbers, which must give the same parameters to the bit.
"""

import math
from typing import Any, NamedTuple

import bounds
import codec
import kernel_calls
import numpy as np
import pytest
import reference
from bounds import Case, Doubles, Floats, Outcome
from codec import CHUNK, State
from numpy.typing import NDArray
from reference import Rule

from cylora import moments
from cylora.moments import Moments
from cylora.optimizer import Adam

COMPACT = ("bfloat16", "8bit")
UNIT = reference.UNIT_ROUNDOFF  # the 8-bit forms add c to a magnitude in float32, once, before they cut it


class Done(NamedTuple):
    """One step of compact moments, and what float32 moments make of the same numbers."""

    p: Floats
    state: State
    twin: Outcome
    case: Case


def step(p: Floats, g: Floats, state: State, t: int, rule: Rule) -> Done:
    m, v = (x.astype(np.float32) for x in state.decoded())
    case = Case(p, g, m, v, t, rule)
    new, after = p.copy(), state.copy()
    kernel_calls.step(kernel_calls.prepare_stored(new, after.stored(), rule, t), rule.rate, g)
    return Done(new, after, bounds.run(case), case)


def random_state(form: str, n: int, rng: np.random.Generator, law: str) -> State:
    """Return any state ("wide": from subnormal to 2^62 and 2^125), or one of a training ("warm")."""
    chunks = -(-n // CHUNK)
    if form == "8bit":
        sign = 1 - 2 * rng.integers(0, 2, n)
        if law == "wide":
            codes = rng.integers(0, 128, n), rng.integers(1, 256, n)
            exponents = rng.integers(27, 174, chunks), rng.integers(27, 221, chunks)
        else:
            codes = rng.integers(60, 128, n), rng.integers(150, 256, n)
            exponents = rng.integers(98, 102, chunks), rng.integers(70, 76, chunks)
        m = (codes[0] * sign).astype(np.int8)
        return State(form, m, *(x.astype(np.uint8) for x in (codes[1], *exponents)))
    if law == "wide":
        m, v = rng.standard_normal(n) * 2.0 ** rng.uniform(-149, 60, n), 2.0 ** rng.uniform(-149, 125, n)
    else:
        m, v = rng.standard_normal(n) * 1e-3, rng.random(n) * 1e-5
    bits = [(x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for x in (m, v)]
    return State(form, *bits, *codec.zero(form, n)[3:])


def random_gradient(n: int, rng: np.random.Generator, law: str) -> Floats:
    g = rng.standard_normal(n) * (2.0 ** rng.uniform(-149, 60, n) if law == "wide" else 1e-3)
    g *= (rng.random(n // CHUNK + 1) < 0.8).repeat(CHUNK)[:n]  # some chunks have none
    return g.astype(np.float32)


def neighbours(form: str, which: str, x: Doubles, exponents: NDArray[np.uint8]) -> codec.Neighbours:
    if form == "bfloat16":
        return codec.neighbours_of_bfloat16(x)
    last = codec.LAST_M if which == "m" else codec.LAST_V
    return codec.neighbours_of_codes(x, codec.unit(exponents, x.size), last)


def check_stored(done: Done) -> None:
    """Assert that each stored number is a neighbour of the exact one, and each exponent the chunk's."""
    form = done.state.form
    got_m, got_v = done.state.decoded()
    for which, got, twin, exponents in (
        ("m", got_m, done.twin.m, done.state.m_exponents), ("v", got_v, done.twin.v, done.state.v_exponents)
    ):  # fmt: skip
        assert np.isfinite(got).all()
        exact = np.abs(twin.astype(np.float64))
        slack = np.zeros(exact.size)
        if form == "8bit":
            check_exponents(exact, exponents, 16 if which == "m" else 32)
            slack = UNIT * (exact + codec.unit(exponents, exact.size))
        low = neighbours(form, which, np.maximum(exact - slack, 0.0), exponents).below
        high = neighbours(form, which, exact + slack, exponents).above
        if form == "8bit" and which == "v":
            floor = codec.LEVELS[1] * codec.unit(exponents, exact.size)
            low, high = np.maximum(low, floor), np.maximum(high, floor)
            assert (got > 0).all()
        wrong = (np.abs(got) < low) | (np.abs(got) > high) | ((got != 0) & (np.signbit(got) != np.signbit(twin)))
        place = int(np.argmax(wrong))
        between = f"between {low[place]} and {high[place]}"
        assert not wrong.any(), f"{which}[{place}]: {twin[place]!r} became {got[place]!r}, not {between}"


def check_exponents(exact: Doubles, exponents: NDArray[np.uint8], octaves: int) -> None:
    """The smallest c of at least 2^-100 whose last code the chunk's largest magnitude does not pass, within 2^-12."""
    padded = np.zeros(exponents.size * CHUNK)
    padded[: exact.size] = exact
    largest = padded.reshape(-1, CHUNK).max(axis=1)
    c = np.ldexp(1.0, exponents.astype(np.int64) - 127)
    last = codec.LEVELS[8 * octaves - 1]
    assert (c >= 2.0**-100).all()
    assert (largest <= last * c).all()
    assert ((c == 2.0**-100) | (largest * (1 + 2.0**-12) >= last * c / 2)).all()


@pytest.mark.parametrize("form", COMPACT)
@pytest.mark.parametrize("law", ["warm", "wide"])
@pytest.mark.parametrize("mode", ["decoupled", "l2"])
def test_moments_compact_step_is_the_float32_step_of_the_decoded_ones(form: str, law: str, mode: str) -> None:
    """The parameter moves by the moments as computed, before they are rounded: its bits are those of float32 state.

    And that is held to the float64 oracle's bounds. What is stored is one of the two numbers next to what was computed.
    """
    rng = np.random.default_rng([len(form), len(law), len(mode)])
    for n in (1, 15, 31, 32, 33, 255, 256, 257, 1000, 4099, 9000):
        for t in (2, 3, 1000):
            rule = Rule(10.0 ** rng.uniform(-5, -2), 0.9, rng.choice([0.95, 0.999]), 1e-8, 0.1, mode)
            p = (rng.standard_normal(n) * 0.05).astype(np.float32)
            state, g = random_state(form, n, rng, law), random_gradient(n, rng, law)
            done = step(p, g, state, t, rule)
            bounds.check_outcome(done.case, done.twin)
            assert done.p.tobytes() == done.twin.p.tobytes()
            check_stored(done)


@pytest.mark.parametrize("form", COMPACT)
def test_moments_stay_finite_and_ordered_at_every_magnitude(form: str) -> None:
    """First moments from 2^-149 to 2^63, second ones to 2^126, a chunk for each; v is not 0 where m has something."""
    exponents = np.arange(-149, 64)
    g = np.zeros(exponents.size * CHUNK)
    g[::CHUNK] = np.ldexp(1.0, exponents)
    g[1::CHUNK] = -np.ldexp(1.9999999, np.minimum(exponents, 62))
    g[2::CHUNK] = np.ldexp(1.0, exponents) * 1e-4
    g = g.astype(np.float32)
    p, rule = np.zeros(g.size, np.float32), Rule(1e-3, 0.0, 0.5, 1e-8, 0.0)
    state = codec.zero(form, g.size)
    for t in range(1, 30):
        done = step(p, g if t % 3 else -g, state, t, rule)
        assert done.p.tobytes() == done.twin.p.tobytes()
        assert np.isfinite(done.p).all()
        check_stored(done)
        m, v = done.state.decoded()
        assert (v[m != 0] > 0).all() or form == "bfloat16"
        assert (v >= 0).all()
        assert (v[done.twin.v >= 2.0**-133] > 0).all()  # bfloat16's smallest number; 8-bit numbers are never 0
        state, p = done.state, done.p


@pytest.mark.parametrize(("octaves", "which"), [(16, "m"), (32, "v")])
def test_moments_no_noise_lifts_a_chunks_largest_above_the_last_code(octaves: int, which: str) -> None:
    """At the edge, where the next exponent takes over, a code too high would wrap: into the sign of m, to 0 in v."""
    edge = int(np.float32(1.875 if which == "m" else math.sqrt(1.875)).view(np.uint32))
    tops = np.concatenate([np.arange(-1200, 1200, 8), np.arange(-40, 40)]) + edge
    g = np.zeros(tops.size * CHUNK, np.float32)
    g[::CHUNK] = tops.astype(np.uint32).view(np.float32)
    for t in range(1, 60):
        done = step(np.zeros(g.size, np.float32), g, codec.zero("8bit", g.size), t, Rule(1e-3, 0.0, 0.0))
        check_stored(done)
        got = done.state.decoded()[which == "v"][::CHUNK]
        exact = (done.twin.m if which == "m" else done.twin.v)[::CHUNK].astype(np.float64)
        assert (np.abs(got / exact - 1) < 1 / 8).all()


# ---------------------------------------------------------------------- the noise


class Rounding(NamedTuple):
    """Of one step: which numbers were rounded up, and with what probability they should have been; NaN: not judged."""

    up: Doubles
    share: Doubles

    def residual(self) -> Doubles:
        """Return the noise as it shows: mean 0, variance 1 where it is judged, 0 elsewhere."""
        judged = (self.share > 0.02) & (self.share < 0.98)
        scale = np.sqrt(np.where(judged, self.share * (1 - self.share), 1.0))
        return np.where(judged, (self.up - self.share) / scale, 0.0)


STEPS, N = 64, 64 * CHUNK


def roundings(form: str) -> dict[str, list[Rounding]]:
    """Return all roundings of some steps, of independent states, gradients and fractions cut off."""
    rng = np.random.default_rng(5)
    found: dict[str, list[Rounding]] = {"m": [], "v": []}
    p = np.zeros(N, np.float32)
    for t in range(1, STEPS + 1):
        g = (rng.standard_normal(N) * 1e-3).astype(np.float32)
        done = step(p, g, random_state(form, N, rng, "warm"), t, Rule(1e-3))
        for which, got, twin, exponents in zip(
            "mv", done.state.decoded(), (done.twin.m, done.twin.v), done.state[3:], strict=True
        ):
            exact = np.abs(twin.astype(np.float64))
            below, above, share = neighbours(form, which, exact, exponents)
            near = (share < 1e-4) | (share > 1 - 1e-4)  # there one rounding of the sum with c decides
            if form == "8bit" and which == "v":
                near |= below == 0
            up = (np.abs(got) > below).astype(np.float64)
            assert ((np.abs(got) == np.where(up, above, below)) | near).all()
            found[which].append(Rounding(up, np.where(near, np.nan, share)))
    return found


def standard_errors(products: Doubles) -> float:
    """Return how far the mean of independent numbers is from 0, in its standard errors."""
    return abs(float(products.mean())) / (float(products.std()) / math.sqrt(products.size))


@pytest.fixture(scope="module", params=COMPACT)
def rounded(request: Any) -> dict[str, list[Rounding]]:
    return roundings(request.param)


@pytest.mark.parametrize("which", ["m", "v"])
def test_moments_round_up_as_often_as_the_part_cut_off_says(rounded: dict[str, list[Rounding]], which: str) -> None:
    """In each twentieth of the gap, and in all: the mean rounding error is 0 within 4 of its standard errors."""
    up = np.concatenate([x.up for x in rounded[which]])
    share = np.concatenate([x.share for x in rounded[which]])
    up, share = up[~np.isnan(share)], share[~np.isnan(share)]
    assert share.size > 0.9 * STEPS * N
    for k in range(20):
        inside = (share >= k / 20) & (share < (k + 1) / 20)
        expected = share[inside]
        assert abs((up[inside] - expected).sum()) <= 4 * math.sqrt((expected * (1 - expected)).sum()), k
    assert abs((up - share).sum()) <= 4 * math.sqrt((share * (1 - share)).sum())


def test_moments_noises_are_uncorrelated(rounded: dict[str, list[Rounding]]) -> None:
    """Of different elements, of m and v, of neighbouring steps: the mean product is 0 within 4 of its standard errors.

    Elements of one chunk have noises whose differences are the same in all chunks of a step, and those of two chunks
    differ by the same at every place: such products count as one observation each.
    """
    noise = {which: np.stack([x.residual() for x in rounded[which]]).reshape(STEPS, -1, CHUNK) for which in "mv"}
    m, v = noise["m"], noise["v"]
    assert standard_errors(m * v) <= 4
    for x in (m, v):
        for lag in (1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 128):
            assert standard_errors((x[:, :, lag:] * x[:, :, :-lag]).mean(axis=1)) <= 4, f"elements {lag} apart"
        for lag in (1, 2, 3, 4, 8, 16, 32):
            assert standard_errors((x[:, lag:] * x[:, :-lag]).mean(axis=2)) <= 4, f"chunks {lag} apart"
        for lag in (1, 2, 3, 4, 8, 16, 32):
            assert standard_errors(x[lag:] * x[:-lag]) <= 4, f"steps {lag} apart"
        assert standard_errors((x[:, :, 1:] * noise["m"][:, :, :-1]).mean(axis=1)) <= 4
    assert standard_errors(m[1:] * v[:-1]) <= 4
    assert standard_errors(v[1:] * m[:-1]) <= 4


@pytest.mark.parametrize("form", COMPACT)
def test_moments_small_increments_count_in_the_mean(form: str) -> None:
    """A second moment that grows by less than half the spacing each step: rounded to nearest, it would stand still."""
    n, steps = 64 * CHUNK, 400
    g = (10.0 ** np.random.default_rng(1).uniform(-3, -2, n)).astype(np.float32)
    adam = Adam(np.zeros(n, np.float32), state_dtype=form)
    for _ in range(steps):
        adam.step(g)
    exact = g.astype(np.float64)
    want_m, want_v = (x * reference.bias_correction(b, steps) for x, b in ((exact, 0.9), (exact * exact, 0.999)))
    for got, want in ((adam.m, want_m), (adam.v, want_v)):
        error = got / want - 1
        assert abs(error.mean()) <= 4 * error.std() / math.sqrt(n) + 1e-5
        assert error.std() < {"bfloat16": 0.05, "8bit": 0.5}[form]


# ---------------------------------------------------------------------- chunks, and what Python sees


def test_moments_chunk_is_the_kernels() -> None:
    """A lone large gradient raises the exponent of its own chunk, which Moments must count like the kernels."""
    assert CHUNK == bounds.CHUNK == moments.CHUNK == 256
    n = 5 * moments.CHUNK + 3
    for place in (0, 255, 256, 511, 512, 1023, 1024, 1279, 1280, n - 1):
        g = np.zeros(n, np.float32)
        g[place] = 1.0
        adam = Adam(np.zeros(n, np.float32), state_dtype="8bit")
        adam.step(g)
        raised = np.flatnonzero(adam.state().moments.m_exponents > 27)
        assert raised.tolist() == [place // moments.CHUNK]
        assert abs(adam.m[place] - 0.1) < 0.01
    for size in (1, moments.CHUNK - 1, moments.CHUNK, moments.CHUNK + 1, 7 * moments.CHUNK):
        stored = Moments(size, "8bit")
        kernel_calls.prepare_stored(np.zeros(size, np.float32), kernel_calls.Stored(*stored.buffers()), Rule())
        wrong = np.zeros(stored.m_exponents.size + 1, np.uint8)
        with pytest.raises(ValueError, match="an exponent for each chunk of 256"):
            kernel_calls.prepare_stored(
                np.zeros(size, np.float32), kernel_calls.Stored(*stored.buffers())._replace(m_exponents=wrong), Rule()
            )


@pytest.mark.parametrize("form", COMPACT)
def test_moments_decode_as_described(form: str) -> None:
    rng = np.random.default_rng(2)
    state = random_state(form, 3000, rng, "wide")
    shown = Moments(3000, form)
    for name, x in zip(("stored_m", "stored_v", "m_exponents", "v_exponents"), state[1:], strict=True):
        getattr(shown, name)[...] = x
    for got, want in zip((shown.m, shown.v), state.decoded(), strict=True):
        assert got.tobytes() == want.astype(np.float32).tobytes()
