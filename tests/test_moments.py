"""Moments: the three forms of m and v as they lie in memory, by a transcription of the format; copies; refusals."""

import math
import tracemalloc

import numpy as np
import pytest
from training import same_bits

from cylora import StateError
from cylora.moments import Moments

DTYPES = ("float32", "bfloat16", "8bit")
SIZES = (1, 15, 16, 17, 255, 256, 257, 4096, 10_007)
CHUNK = 256


def value_of_bfloat16(bits: int) -> float:
    """Return the number of one sign bit, eight exponent bits with bias 127, and seven fraction bits."""
    sign, exponent, fraction = -1.0 if bits >> 15 else 1.0, bits >> 7 & 0xFF, bits & 0x7F
    if exponent == 0xFF:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(fraction, -126 - 7)
    return sign * math.ldexp(128 + fraction, exponent - 127 - 7)


def value_of_code(code: int, exponent: int) -> float:
    """Return c * (2^e * (1 + f/8) - 1) with c = 2^(exponent - 127), yet to be rounded, and the sign of the code."""
    e, f = abs(code) >> 3, abs(code) & 7
    value = math.ldexp(2.0**e * (1 + f / 8) - 1, exponent - 127)
    return -value if code < 0 else value


def filled(dtype: str, size: int, seed: int = 0) -> Moments:
    """Return moments with every stored number somewhere, all of them legal."""
    rng, moments = np.random.default_rng([seed, size]), Moments(size, dtype)
    if dtype == "float32":
        moments.stored_m[...] = rng.normal(size=size)
        moments.stored_v[...] = rng.random(size)
    elif dtype == "bfloat16":
        moments.stored_m[...] = rng.integers(0, 0x7F80, size) | rng.integers(0, 2, size) << 15
        moments.stored_v[...] = rng.integers(0, 0x7F80, size)
    else:
        moments.stored_m[...] = rng.integers(-127, 128, size)
        moments.stored_v[...] = rng.integers(0, 256, size)
        moments.m_exponents[...] = rng.integers(27, 238, moments.m_exponents.size)
        moments.v_exponents[...] = rng.integers(27, 222, moments.v_exponents.size)
    return moments


def arrays(moments: Moments) -> list[np.ndarray]:
    return [moments.stored_m, moments.stored_v, moments.m_exponents, moments.v_exponents]


def assert_same(one: Moments, other: Moments) -> None:
    for mine, theirs in zip(arrays(one), arrays(other), strict=True):
        assert same_bits(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_moments_are_zero_at_first_and_aligned(dtype: str, size: int) -> None:
    moments = Moments(size, dtype)
    assert (moments.size, moments.dtype) == (size, dtype)
    for values in (moments.m, moments.v):
        assert same_bits(values, np.zeros(size, np.float32))
    of_m, of_v = {"float32": ("f4", "f4"), "bfloat16": ("u2", "u2"), "8bit": ("i1", "u1")}[dtype]
    for array, stored in ((moments.stored_m, of_m), (moments.stored_v, of_v)):
        assert (array.dtype, array.shape, array.any()) == (stored, (size,), False)
        assert array.ctypes.data % 64 == 0
    chunks = -(-size // CHUNK) if dtype == "8bit" else 0
    assert [array.shape for array in arrays(moments)[2:]] == [(chunks,)] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_moments_start_in_their_own_quarters_of_a_page(dtype: str) -> None:
    moments = Moments(1 << 16, dtype)
    assert [array.ctypes.data % 4096 for array in (moments.stored_m, moments.stored_v)] == [2048, 3072]


@pytest.mark.parametrize("size", [4096, 4100, 5000, 8192, 10_000, 32_767])
@pytest.mark.parametrize("dtype", DTYPES)
def test_smaller_moments_lie_in_one_block_and_apart_in_their_pages(dtype: str, size: int) -> None:
    """Thousands of trainers have such: no page is left out for one, and none of them looks like another to the CPU."""
    moments = Moments(size, dtype)
    m, v = moments.stored_m, moments.stored_v
    assert m.base is v.base
    assert m.nbytes + v.nbytes <= m.base.nbytes <= m.nbytes + v.nbytes + 4096 + 256
    assert 512 <= (v.ctypes.data - m.ctypes.data) % 4096 <= 3584
    assert (m.ctypes.data % 64, v.ctypes.data % 64) == (0, 0)
    assert m.ctypes.data + m.nbytes <= v.ctypes.data


@pytest.mark.parametrize(("dtype", "each"), [("float32", 8.0), ("bfloat16", 4.0), ("8bit", 2 + 2 / 256)])
def test_nbytes_is_what_was_promised_for_each_parameter(dtype: str, each: float) -> None:
    assert Moments(1 << 16, dtype).nbytes == each * (1 << 16)
    assert Moments(257, dtype).nbytes == (257 * int(each) + (4 if dtype == "8bit" else 0))
    moments = Moments(1000, dtype)
    assert moments.nbytes == sum(array.nbytes for array in arrays(moments))


def test_the_form_is_float32_where_nothing_else_is_said() -> None:
    assert Moments(3).dtype == "float32"


# ---------------------------------------------------------------- what the stored numbers stand for


def test_bfloat16_numbers_are_the_upper_halves_of_float32() -> None:
    """All 65,536 of them, in m and in v."""
    moments = Moments(1 << 16, "bfloat16")
    moments.stored_m[...] = np.arange(1 << 16)
    moments.stored_v[...] = np.arange(1 << 16)[::-1]
    wanted = np.array([value_of_bfloat16(bits) for bits in range(1 << 16)])
    is_number = ~np.isnan(wanted)
    for values, expected in ((moments.m, wanted), (moments.v[::-1], wanted)):
        np.testing.assert_array_equal(np.isnan(values), ~is_number)
        assert same_bits(values[is_number], expected[is_number].astype(np.float32))


@pytest.mark.parametrize("exponent", [27, 28, 100, 127, 128, 200, 221, 237])
def test_codes_stand_for_what_the_format_says(exponent: int) -> None:
    """All 256 codes; between chunks of other exponents, so that one taken from a neighbour would show."""
    moments = Moments(3 * CHUNK + 7, "8bit")
    moments.stored_m[...] = np.resize(np.arange(-127, 128), moments.size)
    moments.stored_v[...] = np.resize(np.arange(CHUNK), moments.size)
    moments.m_exponents[...] = exponents_m = (60, exponent, 61, 62)
    moments.v_exponents[...] = exponents_v = (90, min(exponent, 221), 91, 92)
    for values, codes, exponents in (
        (moments.m, moments.stored_m, exponents_m),
        (moments.v, moments.stored_v, exponents_v),
    ):
        wanted = [value_of_code(code, exponents[i // CHUNK]) for i, code in enumerate(codes.tolist())]
        assert same_bits(values, np.array(wanted, np.float32))


def test_codes_are_in_order_from_nothing_to_their_last_octave() -> None:
    """v: 32 octaves of eight steps, m: 16 of either sign; below c the steps are c/8."""
    moments = Moments(CHUNK, "8bit")
    moments.stored_m[...] = np.arange(CHUNK) - 127.5
    moments.stored_v[...] = np.arange(CHUNK)
    moments.m_exponents[...] = moments.v_exponents[...] = 127
    assert (np.diff(moments.v) > 0).all()
    assert moments.stored_m.tolist() == [*range(-127, 1), *range(128)]
    assert (np.diff(moments.m[128:]) > 0).all()
    assert same_bits(moments.m[127::-1][1:], -moments.m[129:])
    assert moments.v[:9].tolist() == moments.m[128:137].tolist() == [i / 8 for i in range(9)]
    assert (moments.m[255], moments.v[255]) == (2.0**15 * 1.875 - 1, float(np.float32(2.0**31 * 1.875 - 1)))


# ---------------------------------------------------------------- views and copies


@pytest.mark.parametrize("dtype", DTYPES)
def test_m_and_v_are_read_only_and_live_only_as_float32(dtype: str) -> None:
    moments = filled(dtype, 300)
    for values, stored in ((moments.m, moments.stored_m), (moments.v, moments.stored_v)):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1
        before = values.tobytes()
        stored[...] = 1
        assert np.shares_memory(values, stored) == (dtype == "float32")
        assert (values.tobytes() == before) == (dtype != "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_buffers_are_the_live_bytes(dtype: str) -> None:
    moments = filled(dtype, 300)
    kind, *given = moments.buffers()
    assert kind == {"float32": 0, "bfloat16": 2, "8bit": 3}[dtype]
    assert [part.dtype for part in given] == [np.uint8] * 4
    for part, array in zip(given, arrays(moments), strict=True):
        assert part.tobytes() == array.tobytes()
        assert part.size == 0 or part.ctypes.data == array.ctypes.data


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_dict_and_back_keeps_every_bit_and_shares_nothing(dtype: str, size: int) -> None:
    moments = filled(dtype, size)
    state = moments.to_dict()
    exponents = ["m_exponents", "v_exponents"] if dtype == "8bit" else []
    assert list(state) == ["dtype", "m", "v", *exponents]
    restored = Moments.from_dict(state, size)
    for name, array in list(state.items())[1:]:
        array[...] = 77
        state[name] = None
    for holder in (restored, moments):
        assert_same(holder, filled(dtype, size))
    assert [array.ctypes.data % 64 for array in arrays(restored)[:2]] == [0, 0]


# ---------------------------------------------------------------- refusals


def state_of(form: str, **changes: object) -> dict:
    return filled(form, 300).to_dict() | changes


def with_one(dtype: str, name: str, index: int, value: object) -> dict:
    state = state_of(dtype)
    state[name][index] = value
    return state


U2, U1, F4 = np.uint16, np.uint8, np.float32
ONE_OF = "adam dtype must be one of 'float32', 'bfloat16', '8bit', got "
BAD = [
    (lambda: state_of("float32", dtype="float16"), f"{ONE_OF}'float16'"),
    (lambda: state_of("float32", dtype=None), f"{ONE_OF}None"),
    (lambda: state_of("8bit", dtype=8), f"{ONE_OF}8"),
    (lambda: state_of("8bit", dtype=["8bit"]), rf"{ONE_OF}\['8bit'\]"),
    (lambda: {"m": 1, "v": 1}, f"{ONE_OF}None"),
    (lambda: state_of("float32", dtype="bfloat16"), r"adam m must be uint16 of shape \(300,\), got float32 of shape"),
    (lambda: state_of("bfloat16", dtype="float32"), r"adam m must be float32 of shape \(300,\), got uint16 of shape"),
    (lambda: state_of("bfloat16", dtype="8bit"), "with the keys dtype, m, v, m_exponents, v_exponents, got"),
    (lambda: state_of("8bit", dtype="bfloat16"), "adam moments must be a mapping with the keys dtype, m, v, got"),
    (lambda: state_of("float32", extra=1), "adam moments must be a mapping with the keys .*, got .*extra"),
    (lambda: {"dtype": "float32", "m": np.zeros(300, F4)}, "with the keys dtype, m, v, got the keys dtype, m$"),
    (lambda: {k: x for k, x in state_of("8bit").items() if k != "v_exponents"}, "with the keys .*, v_exponents, got"),
    (lambda: state_of("float32", m=np.zeros(299, F4)), r"adam m must be float32 of shape \(300,\), got .* \(299,\)"),
    (lambda: state_of("float32", v=np.zeros(300)), "adam v must be float32 of shape .*, got float64"),
    (lambda: state_of("float32", v=np.zeros(300, ">f4")), "adam v must be float32 of shape .*, got >f4"),
    (lambda: state_of("bfloat16", m=np.zeros(301, U2)), r"adam m must be uint16 of shape \(300,\), got .* \(301,\)"),
    (lambda: state_of("bfloat16", v=np.zeros(300, "i2")), "adam v must be uint16 of shape .*, got int16"),
    (lambda: state_of("bfloat16", v=np.zeros(300, ">u2")), "adam v must be uint16 of shape .*, got >u2"),
    (lambda: state_of("bfloat16", v=np.zeros((1, 300), U2)), r"adam v must be uint16 .*got uint16 of shape \(1, 300\)"),
    (lambda: state_of("8bit", m=np.zeros(300, "u1")), "adam m must be int8 of shape .*, got uint8"),
    (lambda: state_of("8bit", v=np.zeros(300, "i1")), "adam v must be uint8 of shape .*, got int8"),
    (lambda: state_of("8bit", v=np.zeros(0, U1)), r"adam v must be uint8 of shape \(300,\), got uint8 of shape \(0,\)"),
    (lambda: state_of("8bit", v=None), r"adam v must be uint8 of shape \(300,\), got object of shape \(\)"),
    (lambda: state_of("8bit", m=[[1], [1, 2]]), r"adam m must be int8 of shape \(300,\), got list"),
    (lambda: state_of("8bit", m_exponents=np.zeros(1, U1)), r"m_exponents must be uint8 of shape \(2,\), got .*\(1,\)"),
    (lambda: state_of("8bit", v_exponents=np.zeros(3, U1)), r"v_exponents must be uint8 of shape \(2,\), got .*\(3,\)"),
    (lambda: state_of("8bit", m_exponents=np.zeros(2, "i8")), "adam m_exponents must be uint8 of shape .*, got int64"),
    (lambda: with_one("8bit", "m_exponents", 1, 238), "adam m_exponents must be at most 237, got 238"),
    (lambda: with_one("8bit", "m_exponents", 0, 255), "adam m_exponents must be at most 237, got 255"),
    (lambda: with_one("8bit", "v_exponents", 1, 222), "adam v_exponents must be at most 221, got 222"),
    (lambda: with_one("8bit", "v_exponents", 0, 255), "adam v_exponents must be at most 221, got 255"),
    (lambda: with_one("float32", "m", 299, np.nan), "adam m must be finite, got nan"),
    (lambda: with_one("float32", "v", 0, np.inf), "adam v must be finite, got inf"),
    (lambda: with_one("float32", "v", 7, -1e-45), "adam v must be >= 0, got -1.4"),
    (lambda: with_one("bfloat16", "m", 299, 0x7F81), "adam m must be finite, got nan"),
    (lambda: with_one("bfloat16", "m", 0, 0xFFFF), "adam m must be finite, got nan"),
    (lambda: with_one("bfloat16", "m", 0, 0xFF80), "adam m must be finite, got -inf"),
    (lambda: with_one("bfloat16", "v", 7, 0x7FC0), "adam v must be finite, got nan"),
    (lambda: with_one("bfloat16", "v", 299, 0x7F80), "adam v must be finite, got inf"),
    (lambda: with_one("bfloat16", "v", 299, 0xBF80), "adam v must be >= 0, got -1.0"),
    (lambda: with_one("bfloat16", "v", 0, 0x8001), "adam v must be >= 0, got -9.18"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=range(len(BAD)))
def test_malformed_moments_are_refused(make, message: str) -> None:
    with pytest.raises(StateError, match=message):
        Moments.from_dict(make(), 300)


@pytest.mark.parametrize(("dtype", "zero"), [("float32", -0.0), ("bfloat16", 0x8000)])
def test_a_negative_zero_is_a_second_moment(dtype: str, zero: object) -> None:
    assert not Moments.from_dict(with_one(dtype, "v", 3, zero), 300).v[3]


def test_the_largest_exponents_leave_every_code_finite() -> None:
    """And a square of room: the limits are no tighter than they must be."""
    state = state_of("8bit", m_exponents=np.full(2, 237, U1), v_exponents=np.full(2, 221, U1))
    state["m"][...] = np.resize(np.arange(-127, 128), 300)
    state["v"][...] = 255
    moments = Moments.from_dict(state, 300)
    assert 2.0**125 < moments.m.max() < 2.0**127
    assert 2.0**125 < moments.v.max() < 2.0**127


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [10**9, 2**80, -33])
def test_a_size_that_is_only_claimed_takes_no_memory(dtype: str, size: int) -> None:
    """A state from outside may say in its layout what its arrays do not hold."""
    state = state_of(dtype)
    tracemalloc.start()
    try:
        with pytest.raises(StateError, match="adam m must be"):
            Moments.from_dict(state, size)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
