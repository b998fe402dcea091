"""The state of a generator as JSON: every kind goes on to the same numbers, and no forged state gets into NumPy."""

import copy
import json
from typing import Any

import numpy as np
import pytest

from cylora import FormatError, InputError
from cylora.formats import strict_json
from cylora.formats.generators import KINDS, from_dict, to_dict


def used(kind: str) -> np.random.Generator:
    """Return a generator in the middle of its buffers."""
    rng = np.random.Generator(KINDS[kind](3))
    rng.random(5)
    rng.integers(9, size=3, dtype=np.uint32)
    return rng


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_read_back_goes_on_to_the_same_numbers(kind: str) -> None:
    rng = used(kind)
    state = strict_json.parse(strict_json.to_text(to_dict(rng)).encode(), "state")
    twin = from_dict(state)
    assert type(twin.bit_generator) is type(rng.bit_generator)
    assert to_dict(twin) == to_dict(rng) == state
    assert np.array_equal(twin.integers(9, size=99, dtype=np.uint32), rng.integers(9, size=99, dtype=np.uint32))
    assert np.array_equal(twin.normal(size=2000), rng.normal(size=2000))


def test_large_numbers_are_text_since_json_readers_lose_digits() -> None:
    state = to_dict(np.random.default_rng(0))
    assert state["state"]["state"] == f"{np.random.default_rng(0).bit_generator.state['state']['state']:x}"
    assert not [leaf for leaf in json.dumps(state).replace(":", ",").split(",") if leaf.strip("{} ").isdigit()]


class PCG64(np.random.PCG64):
    """A bit generator that has the name of NumPy's."""


@pytest.mark.parametrize(
    "rng", [3, np.random, np.random.PCG64(0), np.random.RandomState(0), np.random.Generator(PCG64(0))], ids=repr
)
def test_only_generators_over_a_bit_generator_of_numpy_are_taken(rng: Any) -> None:
    with pytest.raises(InputError, match=r"rng must be a numpy\.random.Generator over one of PCG64, PCG64DXSM, Philox"):
        to_dict(rng)


@pytest.mark.parametrize("kind", [None, "LCG", 5, ["PCG64"], "Generator"])
def test_an_unknown_kind_is_refused(kind: Any) -> None:
    with pytest.raises(FormatError, match=r"rng bit_generator must be one of PCG64, .*, got"):
        from_dict({"bit_generator": kind})


def changed(kind: str, place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    state = copy.deepcopy(to_dict(used(kind)))
    inner: Any = state
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    return state


# What stands in a state and must not: kind, place, value, message. The first four would make NumPy read past a buffer.
FORGED = [
    ("MT19937", ("state", "pos"), "271", "rng.state.pos must be at most 624, got 625"),
    ("MT19937", ("state", "pos"), "-1", "rng.state.pos must be hexadecimal text"),
    ("Philox", ("buffer_pos",), "5", "rng.buffer_pos must be at most 4, got 5"),
    ("Philox", ("buffer_pos",), "-1", "rng.buffer_pos must be hexadecimal text"),
    ("PCG64", ("has_uint32",), "2", "rng.has_uint32 must be at most 1, got 2"),
    ("PCG64", ("uinteger",), "100000000", "rng must be a state of PCG64, got one it refuses"),
    ("SFC64", ("state", "state", 0), "1" + "0" * 16, "rng must be a state of SFC64, got one it refuses"),
    ("PCG64", ("state", "state"), "1" + "0" * 32, "rng.state.state must be hexadecimal text of at most 32 digits"),
    ("PCG64", ("state", "state"), "0x1", "rng.state.state must be hexadecimal text"),
    ("PCG64", ("state", "state"), "1_0", "rng.state.state must be hexadecimal text"),
    ("PCG64", ("state", "state"), "01", "rng.state.state must be hexadecimal text"),
    ("PCG64", ("state", "state"), "1\n", "rng.state.state must be hexadecimal text"),
    ("PCG64", ("state", "state"), 1, "rng.state.state must be hexadecimal text of at most 32 digits, got 1"),
    ("PCG64", ("state",), {}, "rng.state must have the keys state, inc, got {}"),
    ("PCG64", ("state",), "1", "rng.state must have the keys state, inc, got '1'"),
    ("PCG64", ("more",), "1", "rng must have the keys bit_generator, state, has_uint32, uinteger, got"),
    ("MT19937", ("state", "key"), ["1"] * 623, "rng.state.key must be a list of 624 numbers, got"),
    ("MT19937", ("state", "key"), "1", "rng.state.key must be a list of 624 numbers, got '1'"),
    ("MT19937", ("state", "key", 5), "100000000", "rng must be a state of MT19937, got one it refuses"),
    ("SFC64", ("state", "state", 3), None, "rng.state.state must be hexadecimal text"),
]


@pytest.mark.parametrize(("kind", "place", "value", "message"), FORGED)
def test_a_state_that_breaks_a_rule_is_refused(kind: str, place: Any, value: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        from_dict(changed(kind, place, value))


def test_the_end_of_each_buffer_is_taken() -> None:
    from_dict(changed("MT19937", ("state", "pos"), "270")).random(2000)
    from_dict(changed("Philox", ("buffer_pos",), "4")).random(2000)
