"""A kernel written by hand for numba: a norm pass and one pass that updates everything.

The norm is float32 with fast-math, so that LLVM may add in lanes: faster and less exact than cylora's. In the update
only contraction is allowed: with all of fast-math division would become an estimate. One thread runs serial kernels,
since numba's parallel ones cost 5 us a call even then.
"""

import math
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from built import Built, gradient_vectors, joined, parameter_vectors
from cases import Case
from oracle import FLOAT32_NORM_TOLERANCE

from cylora._cli_numpy import BETA1, BETA2, EPS, LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY

ONE = np.float32(1.0)


def _square_sum(g):
    total = np.float32(0.0)
    for i in numba.prange(g.size):
        total += g[i] * g[i]
    return total


def _update(p, g, m, v, scale, beta1, beta2, rate, eps, keep):
    for i in numba.prange(p.size):
        x = g[i] * scale
        mi = beta1 * m[i] + (ONE - beta1) * x
        vi = beta2 * v[i] + (ONE - beta2) * (x * x)
        m[i] = mi
        v[i] = vi
        p[i] = keep * p[i] - rate * (mi / (np.sqrt(vi) + eps))


@lru_cache
def _compiled(parallel: bool) -> tuple[Any, Any]:
    square_sum = numba.njit(_square_sum, fastmath=True, parallel=parallel)
    return square_sum, numba.njit(_update, fastmath={"contract"}, error_model="numpy", parallel=parallel)


def kernel(case: Case, threads: int) -> Built:
    """One vector for a lone adapter; for a model one call per matrix, since that is how its arrays come."""
    numba.set_num_threads(threads)
    square_sum, update = _compiled(parallel=threads > 1)
    params = parameter_vectors(case)
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in params]
    grads, load = gradient_vectors(case)
    f = np.float32
    beta1, beta2, keep = f(BETA1), f(BETA2), f(1 - LEARNING_RATE * WEIGHT_DECAY)
    t = 0

    def step() -> float:
        nonlocal t
        t += 1
        norm = math.sqrt(sum([square_sum(g) for g in grads]))
        scale = f(min(1.0, MAX_GRAD_NORM / norm))
        root = math.sqrt(1 - BETA2**t)
        rate, eps = f(LEARNING_RATE * root / (1 - BETA1**t)), f(EPS * root)
        for p, g, (m, v) in zip(params, grads, moments, strict=True):
            update(p, g, m, v, scale, beta1, beta2, rate, eps, keep)
        return norm

    return Built(step, (), load, lambda: joined(params), norm_tolerance=FLOAT32_NORM_TOLERANCE)
