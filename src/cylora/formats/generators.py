"""The state of a numpy.random.Generator as JSON: numbers as hexadecimal text, since they have up to 128 bits."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cylora.errors import FormatError, InputError

__all__ = ["from_dict", "to_dict"]

# What is in a state beside numbers of any value: how far a buffer is used up. NumPy would read past its end.
LIMITS = {"pos": 624, "buffer_pos": 4, "has_uint32": 1}
NUMBER = re.compile(r"0|[1-9a-f][0-9a-f]{0,31}")
KINDS = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64, np.random.MT19937)
}


def to_dict(rng: np.random.Generator) -> dict[str, Any]:
    """Return the state of ``rng``; InputError if it is no generator over one of NumPy's own bit generators."""
    if not isinstance(rng, np.random.Generator) or type(rng.bit_generator) not in KINDS.values():
        kinds = ", ".join(KINDS)
        raise InputError(f"rng must be a numpy.random.Generator over one of {kinds}, got {rng!r}")
    encoded: dict[str, Any] = _encoded(rng.bit_generator.state)
    return encoded


def from_dict(state: Mapping[str, Any]) -> np.random.Generator:
    """Return a generator in the state that made ``state``. One that does not hold together is a FormatError."""
    kind = state.get("bit_generator")
    if not isinstance(kind, str) or kind not in KINDS:
        raise FormatError(f"rng bit_generator must be one of {', '.join(KINDS)}, got {kind!r}")
    generator = KINDS[kind](0)
    try:
        generator.state = _decoded("rng", state, generator.state)
    except OverflowError as error:
        raise FormatError(f"rng must be a state of {kind}, got one it refuses ({error})") from None
    return np.random.Generator(generator)


def _encoded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _encoded(member) for key, member in value.items()}
    if isinstance(value, np.ndarray):
        return [f"{int(member):x}" for member in value]
    return value if isinstance(value, str) else f"{int(value):x}"


def _decoded(place: str, value: Any, like: Any) -> Any:
    """Return ``value`` with the types and sizes of ``like``, a state of the same kind of generator."""
    if isinstance(like, str):
        return value
    if isinstance(like, Mapping):
        if not isinstance(value, Mapping) or set(value) != set(like):
            raise FormatError(f"{place} must have the keys {', '.join(like)}, got {value!r:.80}")
        return {key: _decoded(f"{place}.{key}", value[key], like[key]) for key in like}
    if isinstance(like, np.ndarray):
        if not isinstance(value, list) or len(value) != len(like):
            raise FormatError(f"{place} must be a list of {len(like)} numbers, got {value!r:.80}")
        return np.array([_number(place, member) for member in value], like.dtype)
    number, limit = _number(place, value), LIMITS.get(place.rpartition(".")[2])
    if limit is not None and number > limit:
        raise FormatError(f"{place} must be at most {limit}, got {number}")
    return number


def _number(place: str, text: Any) -> int:
    if not isinstance(text, str) or not NUMBER.fullmatch(text):
        raise FormatError(f"{place} must be hexadecimal text of at most 32 digits, got {text!r:.80}")
    return int(text, 16)
