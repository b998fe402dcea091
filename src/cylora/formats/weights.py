"""Weights on their way into a file or out of one: finite or refused, in float32, float16 or bfloat16."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cylora import checks
from cylora.adapter import AdapterSet, LoraAdapter
from cylora.errors import FormatError, InputError
from cylora.flat import FloatArray

__all__ = ["WEIGHT_DTYPES", "check_count", "check_finite", "most_adapters", "narrowed", "require_finite", "widen"]

WEIGHT_DTYPES = ("float32", "float16", "bfloat16")
ADAPTER_OBJECTS = 2400  # bytes of Python objects for each adapter of a set, its arrays' memory aside
MAX_OBJECTS = 40 * 2**20
MAX_BFLOAT16_BITS = 0x7F7F  # the largest finite one; the next is infinity


def check_finite(adapters: LoraAdapter | AdapterSet) -> None:
    """Raise InputError, naming matrix and element, unless every weight is finite."""
    index = checks.first_nonfinite(adapters.flat.vector)
    if index is not None:
        name, place = adapters.flat.locate(index)
        got = f"{adapters.flat.vector[index]} at [{', '.join(map(str, place))}]"
        raise InputError(f"{name} must be finite, got {got}")


def require_finite(result: NDArray[Any], source: FloatArray, rule: str) -> None:
    """Raise InputError with the number of ``source`` whose ``result`` is not finite; ``rule`` begins the message."""
    finite = np.isfinite(result)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise InputError(f"{rule}, got {source[row, column]} at [{row}, {column}]")


def narrowed(name: str, matrix: FloatArray, dtype: str) -> NDArray[Any]:
    """Return finite float32 numbers rounded to the nearest of ``dtype``, ties to even; bfloat16 as uint16.

    float32 is returned as it is. InputError if a number is beyond what the type holds.
    """
    checks.choice("dtype", dtype, WEIGHT_DTYPES)
    if dtype == "float32":
        return matrix
    rule = f"{name} must fit {dtype}"
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half = matrix.astype(np.float16)
        require_finite(half, matrix, rule)
        return half
    bits = matrix.view(np.uint32)
    # Half of what is cut off, and ties to even. Finite numbers leave room for it in 32 bits.
    rounded: NDArray[np.uint16] = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    require_finite(np.where((rounded & 0x7FFF) > MAX_BFLOAT16_BITS, np.inf, 0), matrix, rule)
    return rounded


def widen(values: NDArray[Any], matrix: FloatArray) -> None:
    """Write what `narrowed` returned into a contiguous ``matrix`` of the same shape, without another copy."""
    if values.dtype == np.uint16:
        bits = matrix.view(np.uint32)
        bits[...] = values
        bits <<= np.uint32(16)
    else:
        matrix[...] = values


def check_count(place: str, count: int, size: int) -> None:
    """Raise FormatError if a file of ``size`` bytes lists more adapters than it may: their objects take memory too."""
    if count > (most := most_adapters(size)):
        raise FormatError(f"{place}: adapters must be at most {most} in a file of this size, got {count}")


def most_adapters(size: int) -> int:
    """Return how many adapters a file of ``size`` bytes may hold."""
    return (MAX_OBJECTS + 2 * size) // ADAPTER_OBJECTS
