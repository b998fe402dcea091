"""One optimizer step in pure NumPy, from the way people write it to the fastest that NumPy allows.

Every version does the same work on float32: clip by the global norm over all tensors, decoupled weight decay, Adam.

- ``naive``: a list of tensors, one expression per formula, a temporary for every operator.
- ``in_place``: the same list, scratch arrays made once, ``out=`` everywhere, scalars folded on paper. What a careful
  person writes; give it one flat vector or a list of tensors. These two are the peers of `cylora bench` as well, so
  their norms and steps live in the package.
- ``tuned``: one flat vector and nothing left to remove. Measured, largest gain first:
  coefficients are 0-d float32 arrays, written through a memoryview (a Python float costs 0.2 us per call to convert);
  the second moment is kept times (1 - beta1)**2 / (1 - beta2), so that the scaled gradient is squared as it stands;
  up to 4,096 parameters p, m and v are rows of one buffer that a single call decays (15 % at 192, a loss from 8,192);
  above 65,536 the passes run block by block, which keeps the scratch in cache (a third less time at 10 million).

Blocks of other sizes, operators instead of ``out=``, and arrays aligned to 16 instead of 64 bytes were slower.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from cylora._cli_numpy import (
    BETA1,
    BETA2,
    EPS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    NumpyAdam,
    in_place_grad_norm,
    naive_grad_norm,
)

STACKED_UP_TO = 4_096
BLOCK = 65_536


def aligned_empty(size: int) -> np.ndarray:
    """Allocate a float32 vector that starts on a 64-byte boundary."""
    raw = np.empty(size * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * 4].view(np.float32)


def tuned_grad_norm(grad: np.ndarray) -> float:
    """One flat vector, one BLAS call."""
    return math.sqrt(grad.dot(grad))


def make_float64_grad_norm(size: int) -> Callable[[np.ndarray], float]:
    """As accurate as cylora's: squares and sums in float64, through a buffer that stays in cache."""
    sqrt, copyto = math.sqrt, np.copyto
    wide = np.empty(min(size, 8_192))
    parts = [(slice(i, min(i + 8_192, size)), wide[: min(8_192, size - i)]) for i in range(0, size, 8_192)]

    def grad_norm(grad: np.ndarray) -> float:
        total = 0.0
        for part, values in parts:
            copyto(values, grad[part])
            total += values.dot(values)
        return sqrt(total)

    return grad_norm


def naive_clip_grad_norm_(grads: list[np.ndarray], max_norm: float) -> float:
    norm = naive_grad_norm(grads)
    if norm > max_norm:
        for i, g in enumerate(grads):
            grads[i] = g * (max_norm / norm)
    return norm


def in_place_clip_grad_norm_(grads: Sequence[np.ndarray], max_norm: float) -> float:
    norm = in_place_grad_norm(grads)
    if norm > max_norm:
        scale = max_norm / norm
        for g in grads:
            np.multiply(g, scale, out=g)
    return norm


def make_tuned_clip_grad_norm_() -> Callable[[np.ndarray, float], float]:
    multiply, sqrt = np.multiply, math.sqrt
    scale = np.empty((), np.float32)
    scale_cell = memoryview(scale.reshape(1))

    def clip_grad_norm_(grad: np.ndarray, max_norm: float) -> float:
        norm = sqrt(grad.dot(grad))
        if norm > max_norm:
            scale_cell[0] = max_norm / norm
            multiply(grad, scale, grad)
        return norm

    return clip_grad_norm_


def make_tuned(flat: np.ndarray, *, max_grad_norm: float | None = MAX_GRAD_NORM) -> NumpyAdam:
    """AdamW on one flat vector with the fewest and cheapest NumPy calls; see the module's text for what was done.

    ``step`` takes one flat gradient, read only. ``max_grad_norm=None`` leaves the norm out altogether.
    """
    size = flat.size
    row = -(-size // 16) * 16  # every row starts on a 64-byte boundary
    state = aligned_empty(3 * row)
    state.fill(0.0)
    p, m, v = (state[i * row : i * row + size] for i in range(3))
    p[:] = flat
    keep = 1 - LEARNING_RATE * WEIGHT_DECAY
    step_cells = memoryview(cells := np.empty(3, np.float32))
    scale_a, eps_a, rate_a = (cells[i : i + 1].reshape(()) for i in range(3))

    multiply, add, subtract, divide, root = np.multiply, np.add, np.subtract, np.divide, np.sqrt
    sqrt = math.sqrt
    to_published = (1 - BETA1) / sqrt(1 - BETA2)  # root of the factor by which v is larger than the published moment
    beta1_t = beta2_t = 1.0

    def prepare(g: np.ndarray) -> float:
        """Norm, clip scale and this step's three coefficients."""
        nonlocal beta1_t, beta2_t
        beta1_t *= BETA1
        beta2_t *= BETA2
        norm, scale = 0.0, 1 - BETA1
        if max_grad_norm is not None:
            norm = sqrt(g.dot(g))
            if norm > max_grad_norm:
                scale *= max_grad_norm / norm
        corrected = sqrt(1 - beta2_t) * to_published
        step_cells[0] = scale
        step_cells[1] = EPS * corrected
        step_cells[2] = LEARNING_RATE * corrected / (1 - beta1_t)
        return norm

    if size <= STACKED_UP_TO:
        decay = np.repeat(np.array([keep, BETA1, BETA2], np.float32), row)
        moments = state[row:]
        increments = aligned_empty(2 * row)
        increments.fill(0.0)
        x, square = increments[:size], increments[row : row + size]

        def step(g: np.ndarray) -> float:
            norm = prepare(g)
            multiply(state, decay, state)
            multiply(g, scale_a, x)
            multiply(x, x, square)
            add(moments, increments, moments)
            root(v, x)
            add(x, eps_a, x)
            divide(m, x, x)
            multiply(x, rate_a, x)
            subtract(p, x, p)
            return norm

        return NumpyAdam(step, [p])

    beta1_a, beta2_a, keep_a = (np.array(c, np.float32) for c in (BETA1, BETA2, keep))
    scratch = aligned_empty(min(size, BLOCK))
    blocks = []
    for start in range(0, size, BLOCK):
        part = slice(start, min(start + BLOCK, size))
        blocks.append((part, p[part], m[part], v[part], scratch[: part.stop - start]))

    def step_by_blocks(g: np.ndarray) -> float:
        norm = prepare(g)
        for part, p, m, v, x in blocks:
            multiply(g[part], scale_a, x)
            multiply(m, beta1_a, m)
            add(m, x, m)
            multiply(x, x, x)
            multiply(v, beta2_a, v)
            add(v, x, v)
            root(v, x)
            add(x, eps_a, x)
            divide(m, x, x)
            multiply(x, rate_a, x)
            multiply(p, keep_a, p)
            subtract(p, x, p)
        return norm

    return NumpyAdam(step_by_blocks, [p])
