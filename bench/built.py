"""A peer made ready for a case, and the arrays that its gradients and parameters come in."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from cases import Case, initial_parameters, split
from oracle import NORM_TOLERANCE


class Built(NamedTuple):
    """A peer made ready for one case: ``call(*args)`` does the work once."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    load: Callable[[np.ndarray], None]  # put this flat gradient where ``args`` has its gradients
    read: Callable[[], np.ndarray]  # the flat result: parameters, or gradients if those are what is changed
    state: str = "float32"  # precision of the moments, which decides the tolerance
    dtype: str = "float32"  # of the gradients
    norm_tolerance: float = NORM_TOLERANCE


def gradient_array(shape: int | tuple[int, ...]) -> np.ndarray:
    """Allocate 16 bytes past a 64-byte boundary: where ``np.empty`` puts large arrays, and the same for every peer.

    Left to chance, the start of an array changes a norm's time by a half.
    """
    size = math.prod(shape) if isinstance(shape, tuple) else shape
    raw = np.empty(size * 4 + 64, np.uint8)
    start = (16 - raw.ctypes.data) % 64
    return raw[start : start + size * 4].view(np.float32).reshape(shape)


def gradient_copy(values: np.ndarray) -> np.ndarray:
    array = gradient_array(values.shape)
    array[...] = values
    return array


def flat_gradient(case: Case) -> tuple[np.ndarray, Callable[[np.ndarray], None]]:
    flat = gradient_array(case.parameters)

    def load(values: np.ndarray) -> None:
        flat[:] = values

    return flat, load


def gradient_matrices(case: Case) -> tuple[list[np.ndarray], Callable[[np.ndarray], None]]:
    """One array of its own per matrix. Loading puts fresh copies into the list, so a peer may replace its items."""
    arrays: list[np.ndarray] = []

    def load(values: np.ndarray) -> None:
        arrays[:] = [gradient_copy(view) for view in split(values, case)]

    return arrays, load


def gradient_vectors(case: Case) -> tuple[list[np.ndarray], Callable[[np.ndarray], None]]:
    """1-D arrays: one for a lone adapter, one per matrix for a model."""
    arrays: list[np.ndarray] = []

    def load(values: np.ndarray) -> None:
        arrays[:] = [gradient_copy(part.ravel()) for part in (split(values, case) if case.is_model else [values])]

    return arrays, load


def parameter_vectors(case: Case) -> list[np.ndarray]:
    """Start values, 1-D: one vector for a lone adapter, one per matrix for a model."""
    flat = initial_parameters(case)
    return [view.ravel() for view in split(flat, case)] if case.is_model else [flat]


def joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([a.ravel() for a in arrays])
