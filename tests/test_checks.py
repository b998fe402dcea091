"""The checks of single values: what passes, in which type it comes back, and the message of each refusal."""

import decimal
import math

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from cylora import checks
from cylora.errors import ConfigError, InputError, StateError


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3)])
def test_integer_returns_a_plain_int(value: object) -> None:
    got = checks.integer("n", value, 0)
    assert got == 3
    assert type(got) is int


@pytest.mark.parametrize("value", [3.0, "3", None, True, False, np.True_, np.float64(3), np.array([3, 4]), 3j])
def test_integer_refuses_what_is_not_one(value: object) -> None:
    with pytest.raises(StateError, match="n must be an integer, got"):
        checks.integer("n", value, 0, error=StateError)


def test_integer_names_its_bounds() -> None:
    assert checks.integer("n", 2**62, 0) == 2**62
    with pytest.raises(ConfigError, match="n must be an integer >= 0, got -1"):
        checks.integer("n", -1, 0)
    with pytest.raises(ConfigError, match=f"n must be an integer >= 0, got {2**62 + 1}"):
        checks.integer("n", 2**62 + 1, 0)
    with pytest.raises(ConfigError, match=r"n must be an integer in \[1, 4\], got 5"):
        checks.integer("n", 5, 1, 4)


@pytest.mark.parametrize(
    "value", [1.5, np.float16(1.5), np.float32(1.5), np.longdouble(1.5), np.array(1.5), decimal.Decimal("1.5")]
)
def test_real_returns_a_plain_float(value: object) -> None:
    got = checks.real("x", value)
    assert got == 1.5
    assert type(got) is float


@pytest.mark.parametrize(
    "value",
    [
        None, "1", b"1", bytearray(b"1"), True, np.True_, 1j, np.complex64(1), [1.0], (1.0,), {}, 10**400,
        np.ones(1), np.ones((1, 1)), np.array(1j), np.array("1"), np.str_("1"), np.datetime64("2020"), np.array(None),
    ],
    ids=repr,
)  # fmt: skip
def test_real_refuses_what_is_no_real_number(value: object) -> None:
    """A complex number would lose its imaginary part, a one-element array is deprecated as a number, and so on."""
    with pytest.raises(InputError, match="x must be a real number, got"):
        checks.real("x", value, error=InputError)


def test_real_applies_its_rule() -> None:
    assert checks.real("x", 0, "finite", math.isfinite) == 0
    with pytest.raises(ConfigError, match="x must be finite, got inf"):
        checks.real("x", math.inf, "finite", math.isfinite)
    at_least = checks.finite_at_least(2)
    assert [at_least(x) for x in (1.9, 2.0, math.inf, math.nan)] == [False, True, False, False]


def test_norm_limit_allows_infinity_only() -> None:
    assert checks.norm_limit("limit", math.inf, InputError) == math.inf
    for bad in (0, -1, math.nan):
        with pytest.raises(InputError, match=r"limit must be > 0 \(inf turns clipping off\), got"):
            checks.norm_limit("limit", bad, InputError)


@pytest.mark.parametrize("value", ["c", None, 1, ["a"], np.array(["a"])])
def test_choice_lists_the_choices(value: object) -> None:
    assert checks.choice("way", "a", ("a", "b")) == "a"
    with pytest.raises(ConfigError, match="way must be one of 'a', 'b', got"):
        checks.choice("way", value, ("a", "b"))


BASE = np.arange(24, dtype=np.float32)


@pytest.mark.parametrize(
    "value",
    [
        BASE[:6].reshape(2, 3), BASE[:6].reshape(3, 2).T, BASE.reshape(4, 6)[::2, ::2],
        BASE[:6].reshape(2, 3)[::-1, ::-1],
        np.zeros((2, 3, 1), np.float32)[..., 0], BASE[:12].reshape(2, 6)[:, 1::2],
    ],
)  # fmt: skip
def test_matrix_takes_any_strides_that_do_not_repeat(value: np.ndarray) -> None:
    got = checks.matrix("w", value, (2, 3), InputError)
    assert np.shares_memory(got, value)
    assert got.shape == (2, 3)


READ_ONLY = np.zeros((2, 3), np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ([[1.0] * 3] * 2, "got list"), (None, "got NoneType"), (memoryview(BASE), "got memoryview"),
        (np.zeros((2, 3)), r"got float64 of shape \(2, 3\)"),
        (np.zeros((3, 2), np.float32), r"got float32 of shape \(3, 2\)"),
        (np.zeros((2, 3), ">f4"), "got >f4 of shape"), (READ_ONLY, r"got read-only float32 of shape \(2, 3\)"),
        (np.zeros(6, np.float32), r"got float32 of shape \(6,\)"),
    ],
)  # fmt: skip
def test_matrix_says_what_it_got(value: object, got: str) -> None:
    with pytest.raises(InputError, match=rf"w must be a writable float32 array of shape \(2, 3\), {got}"):
        checks.matrix("w", value, (2, 3), InputError)


@pytest.mark.parametrize(
    "value",
    [
        as_strided(np.zeros(6, np.float32), (2, 3), (0, 4)), as_strided(np.zeros(6, np.float32), (2, 3), (12, 0)),
        sliding_window_view(np.zeros(4, np.float32), 3, writeable=True), as_strided(np.zeros(9, "f4"), (2, 3), (8, 4)),
        as_strided(np.zeros(9, np.float32)[8:], (2, 3), (-4, -4)),
    ],
)  # fmt: skip
def test_matrix_refuses_memory_that_repeats(value: np.ndarray) -> None:
    """Writing into it would write some elements several times, and `+=` would add only once."""
    with pytest.raises(InputError, match="w must have a place in memory for each element, got strides"):
        checks.matrix("w", value, (2, 3), InputError)


def test_matrix_strips_the_subclass() -> None:
    """A masked array's += would leave masked elements out."""
    masked = np.ma.masked_array(np.zeros((2, 3), np.float32), mask=True)
    assert type(checks.matrix("w", masked, (2, 3), InputError)) is np.ndarray


def test_vector_wants_plain_memory(floats_at) -> None:
    good = floats_at(5, 4)
    assert np.shares_memory(checks.vector("p", good, 5, InputError), good)
    with pytest.raises(InputError, match="p must be C-contiguous and aligned, got aligned memory with strides"):
        checks.vector("p", np.zeros(10, np.float32)[::2], 5, InputError)
    with pytest.raises(InputError, match="p must be C-contiguous and aligned, got aligned memory with strides"):
        checks.vector("p", np.zeros(5, np.float32)[::-1], 5, InputError)
    with pytest.raises(InputError, match="p must be C-contiguous and aligned, got misaligned memory"):
        checks.vector("p", np.zeros(21, np.uint8)[1:].view(np.float32), 5, InputError)


def test_array_wants_exact_dtype_and_shape() -> None:
    assert checks.array("m", [1.0, 2.0], np.float64, (2,), StateError).tolist() == [1, 2]
    for bad in ([1, 2], [1.0], np.zeros(2, np.float32), np.zeros(2, ">f8"), None, "ab", {}):
        with pytest.raises(StateError, match=r"m must be float64 of shape \(2,\), got"):
            checks.array("m", bad, np.float64, (2,), StateError)
    with pytest.raises(StateError, match=r"m must be float64 of shape \(2,\), got list"):
        checks.array("m", [[1.0], [1.0, 2.0]], np.float64, (2,), StateError)
    with pytest.raises(StateError, match="m must be finite, got nan"):
        checks.array("m", [1.0, math.nan], np.float64, (2,), StateError, finite=True)


def test_items_wants_exactly_the_keys() -> None:
    assert checks.items("state", {"b": 2, "a": 1}, ("a", "b"), StateError) == [1, 2]
    with pytest.raises(StateError, match="state must be a mapping with the keys a, b, got the keys a, c"):
        checks.items("state", {"a": 1, "c": 2}, ("a", "b"), StateError)
    with pytest.raises(StateError, match="state must be a mapping with the keys a, b, got list"):
        checks.items("state", ["a", "b"], ("a", "b"), StateError)
