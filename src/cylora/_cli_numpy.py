"""The same step in NumPy, for `cylora bench` and bench/ to measure against, and the float64 oracle that judges all.

Each peer does on float32 what `LoraTrainer.step` does: clip by the global norm over all tensors, decoupled weight
decay, Adam. The oracle is written like the papers and shares no code with what it judges.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cylora.flat import FloatArray

__all__ = [
    "BETA1",
    "BETA2",
    "EPS",
    "LEARNING_RATE",
    "MAX_GRAD_NORM",
    "WEIGHT_DECAY",
    "NumpyAdam",
    "in_place_grad_norm",
    "make_in_place",
    "make_naive",
    "naive_grad_norm",
    "parts",
    "true_norm",
    "true_steps",
]

LEARNING_RATE = 3e-4
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
BETA1 = 0.9
BETA2 = 0.999
EPS = 1e-8


class NumpyAdam(NamedTuple):
    """A step to call with gradients, and the parameters it updates, in the form they were given."""

    step: Callable[..., float]
    parameters: list[FloatArray]


def naive_grad_norm(grads: Sequence[FloatArray]) -> float:
    """Return the norm as a textbook has it: a temporary for each square."""
    return float(np.sqrt(sum(np.sum(g**2) for g in grads)))


def in_place_grad_norm(grads: Sequence[FloatArray]) -> float:
    """Return the norm without a temporary: a dot product of each vector with itself. ``grads`` are 1-D."""
    return math.sqrt(sum([g.dot(g) for g in grads]))


def make_naive(tensors: Sequence[FloatArray], *, max_grad_norm: float | None = MAX_GRAD_NORM) -> NumpyAdam:
    """AdamW as it stands in a textbook. ``max_grad_norm=None`` leaves the norm out altogether."""
    params = [t.copy() for t in tensors]
    m = [np.zeros_like(t) for t in tensors]
    v = [np.zeros_like(t) for t in tensors]
    t = 0

    def step(grads: Sequence[FloatArray]) -> float:
        nonlocal t
        t += 1
        norm = 0.0
        if max_grad_norm is not None:
            norm = naive_grad_norm(grads)
            if norm > max_grad_norm:
                grads = [g * (max_grad_norm / norm) for g in grads]
        for i, g in enumerate(grads):
            m[i] = BETA1 * m[i] + (1 - BETA1) * g
            v[i] = BETA2 * v[i] + (1 - BETA2) * g**2
            m_hat = m[i] / (1 - BETA1**t)
            v_hat = v[i] / (1 - BETA2**t)
            params[i] = params[i] - LEARNING_RATE * (m_hat / (np.sqrt(v_hat) + EPS) + WEIGHT_DECAY * params[i])
        return norm

    return NumpyAdam(step, params)


def make_in_place(tensors: Sequence[FloatArray], *, max_grad_norm: float | None = MAX_GRAD_NORM) -> NumpyAdam:
    """AdamW as a careful person writes it: scratch made once, ``out=`` everywhere, scalars folded on paper.

    ``max_grad_norm=None`` leaves the norm out altogether. The tensors and the gradients handed to ``step`` are 1-D; the
    gradients are read only.
    """
    params = [t.copy() for t in tensors]
    scratch = np.empty(max(t.size for t in tensors), np.float32)
    state = [(p, np.zeros_like(p), np.zeros_like(p), scratch[: p.size]) for p in params]
    t = 0

    def step(grads: Sequence[FloatArray]) -> float:
        nonlocal t
        t += 1
        norm, scale = 0.0, 1.0
        if max_grad_norm is not None:
            norm = in_place_grad_norm(grads)
            if norm > max_grad_norm:
                scale = max_grad_norm / norm
        root = math.sqrt(1 - BETA2**t)
        first, second = (1 - BETA1) * scale, (1 - BETA2) * scale * scale
        eps, rate, keep = EPS * root, LEARNING_RATE * root / (1 - BETA1**t), 1 - LEARNING_RATE * WEIGHT_DECAY
        for g, (p, m, v, x) in zip(grads, state, strict=True):
            np.multiply(m, BETA1, out=m)
            np.multiply(g, first, out=x)
            np.add(m, x, out=m)
            np.multiply(v, BETA2, out=v)
            np.multiply(g, g, out=x)
            np.multiply(x, second, out=x)
            np.add(v, x, out=v)
            np.sqrt(v, out=x)
            np.add(x, eps, out=x)
            np.divide(m, x, out=x)
            np.multiply(x, rate, out=x)
            np.multiply(p, keep, out=p)
            np.subtract(p, x, out=p)
        return norm

    return NumpyAdam(step, params)


def true_norm(flat: FloatArray) -> float:
    """L2 norm with every square and sum in float64."""
    return math.sqrt(math.fsum(float(np.sum(np.square(flat[w], dtype=np.float64))) for w in parts(flat.size)))


def true_steps(parameters: FloatArray, gradients: Sequence[FloatArray], *, clips: bool = True) -> NDArray[np.float64]:
    """Return flat parameters in float64 after one step with each gradient, moments starting at zero.

    Clipping after Pascanu, Mikolov & Bengio 2013 (scale = max_norm / norm, only above max_norm), Adam after Kingma & Ba
    2015 (algorithm 1), weight decay after Loshchilov & Hutter 2019 (decoupled).
    """
    scales = [min(1.0, MAX_GRAD_NORM / true_norm(g)) if clips else 1.0 for g in gradients]
    result = parameters.astype(np.float64)
    for where in parts(parameters.size):
        theta = result[where]
        m = np.zeros_like(theta)
        v = np.zeros_like(theta)
        for t, (g32, scale) in enumerate(zip(gradients, scales, strict=True), start=1):
            g = scale * g32[where].astype(np.float64)
            m = BETA1 * m + (1 - BETA1) * g
            v = BETA2 * v + (1 - BETA2) * g**2
            m_hat = m / (1 - BETA1**t)
            v_hat = v / (1 - BETA2**t)
            theta = theta - LEARNING_RATE * (m_hat / (np.sqrt(v_hat) + EPS) + WEIGHT_DECAY * theta)
        result[where] = theta
    return result


def parts(size: int) -> list[slice]:
    """Slices small enough that float64 temporaries stay in cache."""
    return [slice(i, min(i + 65_536, size)) for i in range(0, size, 65_536)]
