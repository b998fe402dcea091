"""Weights for files: rounding against ml_dtypes, and what is refused because it is not finite."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training import make_adapter, make_set, same_bits

from cylora.errors import ConfigError, InputError
from cylora.formats.weights import WEIGHT_DTYPES, check_finite, narrowed, require_finite, widen

LARGEST_BFLOAT16 = np.float32(3.3895314e38)
# Halfway between the largest and what would be the next number of the type: ties go to even, which is infinity.
FIRST_TOO_LARGE = {"float16": np.float32(65520), "bfloat16": np.float32(3.3961775e38)}


def widened(values: np.ndarray) -> np.ndarray:
    matrix = np.empty(values.shape, np.float32)
    widen(values, matrix)
    return matrix


def floats(bits: np.ndarray) -> np.ndarray:
    """Return the finite float32 numbers with these bits, as one row."""
    values = np.asarray(bits).astype(np.uint32).view(np.float32)
    return np.ascontiguousarray(values[np.isfinite(values)].reshape(1, -1))


# Every upper half of a float32 with lower halves around a tie, both for bfloat16; and random ones.
NEAR_TIES = (
    np.arange(2**16, dtype=np.uint32)[:, None] << 16 | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
).ravel()
RANDOM = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
# Every float16, and the numbers just below, at and above the middle to the next, as float32.
HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
HALF_TIES = (HALVES[:, None] + np.array([0, 1, 0xFFF, 0x1000, 0x1001], np.uint32)).ravel()


@pytest.mark.parametrize("bits", [NEAR_TIES, RANDOM, HALF_TIES], ids=["bfloat16 ties", "random", "float16 ties"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrowed_rounds_as_ml_dtypes_and_numpy_do(dtype: str, bits: np.ndarray) -> None:
    values = floats(bits)
    values = values[:, np.abs(values[0]) < FIRST_TOO_LARGE[dtype]]
    expected = values.astype(np.float16) if dtype == "float16" else values.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert same_bits(narrowed("x", values, dtype), expected)


def test_float32_is_the_same_memory() -> None:
    matrix = make_adapter().a_matrix
    assert narrowed("x", matrix, "float32") is matrix


def test_narrowed_leaves_its_argument_alone_and_takes_any_strides() -> None:
    matrix = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    before = matrix.copy()
    for dtype in ("float16", "bfloat16"):
        assert same_bits(narrowed("x", matrix.T, dtype), narrowed("x", np.ascontiguousarray(matrix.T), dtype))
    assert same_bits(matrix, before)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_rounds_to_infinity_is_refused_by_name_and_place(dtype: str, sign: int) -> None:
    matrix = np.zeros((3, 4), np.float32)
    matrix[2, 1] = sign * np.nextafter(FIRST_TOO_LARGE[dtype], np.float32(0))
    assert np.abs(narrowed("x", matrix, dtype)).any()
    matrix[2, 1] = sign * FIRST_TOO_LARGE[dtype]
    with pytest.raises(
        InputError, match=rf"some\.name must fit {dtype}, got {matrix[2, 1]} at \[2, 1\]".replace("+", r"\+")
    ):
        narrowed("some.name", matrix, dtype)


def test_an_unknown_dtype_is_refused() -> None:
    message = "dtype must be one of 'float32', 'float16', 'bfloat16', got 'float64'"
    with pytest.raises(ConfigError, match=message):
        narrowed("x", np.zeros((1, 1), np.float32), "float64")
    assert WEIGHT_DTYPES == ("float32", "float16", "bfloat16")


def test_every_bfloat16_is_read_as_ml_dtypes_reads_it() -> None:
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    assert same_bits(widened(bits), bits.view(ml_dtypes.bfloat16).astype(np.float32))


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1))
def test_bfloat16_there_and_back_is_stable(values: list[float]) -> None:
    once = widened(narrowed("x", np.array([values], np.float32), "bfloat16"))
    assert same_bits(widened(narrowed("x", once, "bfloat16")), once)
    assert np.all(np.abs(once - np.array([values], np.float32)) <= np.abs(once) * 2.0**-8 + 1e-40)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name_and_place(value: float) -> None:
    adapters = make_set()
    check_finite(adapters)
    adapters["out.proj"].b_matrix[6, 1] = value
    with pytest.raises(InputError, match=rf"out\.proj\.B must be finite, got {value} at \[6, 1\]"):
        check_finite(adapters)
    adapter = make_adapter()
    check_finite(adapter)
    adapter.a_matrix[0, 3] = value
    with pytest.raises(InputError, match=rf"A must be finite, got {value} at \[0, 3\]"):
        check_finite(adapter)


def test_the_number_that_gave_no_finite_one_is_named() -> None:
    source = np.array([[1, 2], [3, 4]], np.float32)
    require_finite(source, source, "it must fit")
    with pytest.raises(InputError, match=r"it must fit, got 3\.0 at \[1, 0\]"):
        require_finite(np.array([[1, 2], [np.nan, np.inf]]), source, "it must fit")
