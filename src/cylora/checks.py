"""Check one value from outside: return it in its proper type, or raise with its name, the rule and what was got."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cylora.errors import ConfigError, CyloraError

__all__ = [
    "array",
    "choice",
    "finite_at_least",
    "first_nonfinite",
    "integer",
    "items",
    "matrix",
    "norm_limit",
    "readable_vector",
    "real",
    "vector",
]

PART = 2**20
MAX_COUNT = 2**62  # half of what int64 holds: a count that begins here cannot overflow


def integer(
    name: str, value: Any, minimum: int, maximum: int = MAX_COUNT, error: type[CyloraError] = ConfigError
) -> int:
    """Return an int in [minimum, maximum]. A bool is not an integer here."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise error(f"{name} must be an integer, got {value!r}") from None
    if not minimum <= number <= maximum:
        above = f">= {minimum}" if maximum == MAX_COUNT else f"in [{minimum}, {maximum}]"
        raise error(f"{name} must be an integer {above}, got {value!r}")
    return number


def real(
    name: str,
    value: Any,
    rule: str = "a real number",
    holds: Callable[[float], bool] = lambda _: True,
    error: type[CyloraError] = ConfigError,
) -> float:
    """Return a float for which ``holds``; ``rule`` says in words what that is. NaN holds for no comparison."""
    try:
        if isinstance(value, (bool, str, bytes, bytearray)):
            raise TypeError
        if isinstance(value, (np.ndarray, np.generic)) and (value.ndim or value.dtype.kind not in "fiu"):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise error(f"{name} must be {rule}, got {value!r}") from None
    if not holds(number):
        raise error(f"{name} must be {rule}, got {value!r}")
    return number


def finite_at_least(minimum: float) -> Callable[[float], bool]:
    """Return the test minimum <= x < infinity."""
    return lambda x: minimum <= x < math.inf


def norm_limit(name: str, value: Any, error: type[CyloraError]) -> float:
    """Return a limit for a norm: a float > 0, infinity allowed."""
    return real(name, value, "> 0 (inf turns clipping off)", lambda x: x > 0, error)


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return a string that is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def _repeats_itself(value: NDArray[Any]) -> bool:
    """Return whether two elements may lie in the same place (np.broadcast_to, sliding windows)."""
    used = 0
    for stride, size in sorted((abs(stride), size) for stride, size in zip(value.strides, value.shape, strict=True)):
        if size > 1 and stride < used + value.itemsize:
            return True
        used += stride * (size - 1)
    return False


def matrix(name: str, value: Any, shape: tuple[int, ...], error: type[CyloraError]) -> NDArray[np.float32]:
    """Return ``value`` as a plain array if it is a writable native float32 ndarray of ``shape``: one to write into."""
    if not isinstance(value, np.ndarray):
        raise error(f"{name} must be a writable float32 array of shape {shape}, got {type(value).__name__}")
    if value.dtype != np.float32 or value.shape != shape or not value.flags.writeable:
        got = f"{'' if value.flags.writeable else 'read-only '}{value.dtype} of shape {value.shape}"
        raise error(f"{name} must be a writable float32 array of shape {shape}, got {got}")
    if _repeats_itself(value):
        raise error(f"{name} must have a place in memory for each element, got strides {value.strides}")
    return value.view(np.ndarray)


def vector(name: str, value: Any, size: int, error: type[CyloraError]) -> NDArray[np.float32]:
    """Return ``value`` if it is a writable, C-contiguous, aligned float32 ndarray (size,): memory for a kernel."""
    return _in_a_row(name, matrix(name, value, (size,), error), error)


def readable_vector(name: str, value: Any, size: int, error: type[CyloraError]) -> NDArray[np.float32]:
    """Return ``value`` if it is a C-contiguous, aligned float32 ndarray (size,), which may be read-only."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.shape != (size,):
        is_array = isinstance(value, np.ndarray)
        got = f"{value.dtype} of shape {value.shape}" if is_array else type(value).__name__
        raise error(f"{name} must be a float32 array of shape {(size,)}, got {got}")
    return _in_a_row(name, value.view(np.ndarray), error)


def _in_a_row(name: str, checked: NDArray[np.float32], error: type[CyloraError]) -> NDArray[np.float32]:
    if not checked.flags.c_contiguous or not checked.flags.aligned:
        aligned = "aligned" if checked.flags.aligned else "misaligned"
        raise error(f"{name} must be C-contiguous and aligned, got {aligned} memory with strides {checked.strides}")
    return checked


def array(
    name: str, value: Any, dtype: DTypeLike, shape: tuple[int, ...], error: type[CyloraError], *, finite: bool = False
) -> NDArray[Any]:
    """Return ``value`` as an array of exactly this dtype and shape: an array to read from."""
    try:
        got = np.asarray(value)
    except (TypeError, ValueError):  # a ragged list, say
        raise error(f"{name} must be {np.dtype(dtype)} of shape {shape}, got {type(value).__name__}") from None
    if got.dtype != np.dtype(dtype) or got.shape != shape:
        raise error(f"{name} must be {np.dtype(dtype)} of shape {shape}, got {got.dtype} of shape {got.shape}")
    index = first_nonfinite(got.reshape(-1)) if finite else None
    if index is not None:
        raise error(f"{name} must be finite, got {got.reshape(-1)[index]}")
    return got


def first_nonfinite(vector: NDArray[Any]) -> int | None:
    """Return the index of the first NaN or infinity, or None. It looks at parts: a mask of all would take memory."""
    for start in range(0, vector.size, PART):
        finite = np.isfinite(vector[start : start + PART])
        if not finite.all():
            return start + int(np.argmin(finite))
    return None


def items(name: str, value: Any, keys: Sequence[str], error: type[CyloraError]) -> list[Any]:
    """Return the values of a mapping that has exactly these keys, in their order."""
    if not isinstance(value, Mapping) or set(value) != set(keys):
        got = f"the keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
        raise error(f"{name} must be a mapping with the keys {', '.join(keys)}, got {got}")
    return [value[key] for key in keys]
