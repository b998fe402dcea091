"""thinc, a Cython kernel over BLAS calls: its Adam as documented, and its kernel called by hand.

thinc takes the learning rate corrected for bias but eps as it is, so eps is handed to it corrected too, which makes the
step the paper's. Its Adam clips each array by itself: a lone adapter is one vector, whose norm is the global one; for a
model the global norm is found here. Its kernel zeroes the gradient it was given, so each step begins with a copy that
restores it, which for the kernel by hand is the pass that clips.
"""

import math

import numpy as np
from built import Built, gradient_vectors, joined, parameter_vectors
from cases import Case
from oracle import FLOAT32_NORM_TOLERANCE
from thinc.api import Adam, NumpyOps, Schedule

from cylora._cli_numpy import BETA1, BETA2, EPS, LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, in_place_grad_norm


def adam(case: Case, threads: int) -> Built:
    done = 0

    def eps(schedule: Schedule, step: int, **kwargs: object) -> float:
        return EPS * math.sqrt(1 - BETA2**done)

    optimizer = Adam(
        LEARNING_RATE,
        beta1=BETA1,
        beta2=BETA2,
        eps=Schedule("eps", eps),
        L2=WEIGHT_DECAY,
        grad_clip=0.0 if case.is_model else MAX_GRAD_NORM,
    )
    weights = parameter_vectors(case)
    fresh, load = gradient_vectors(case)
    tensors = [((i, "W"), w, np.empty_like(w)) for i, w in enumerate(weights)]

    def step_one() -> None:
        nonlocal done
        done += 1
        ((key, w, g),) = tensors
        np.copyto(g, fresh[0])
        optimizer(key, w, g)

    def step_model() -> float:
        nonlocal done
        done += 1
        norm = in_place_grad_norm(fresh)
        scale = min(1.0, MAX_GRAD_NORM / norm)
        for values, (key, w, g) in zip(fresh, tensors, strict=True):
            np.multiply(values, scale, out=g)
            optimizer(key, w, g)
        return norm

    return Built(
        step_model if case.is_model else step_one,
        (),
        load,
        lambda: joined(weights),
        norm_tolerance=FLOAT32_NORM_TOLERANCE,
    )


def kernel(case: Case, threads: int) -> Built:
    """Leave out the optimizer's schedules and look-ups, which few of its users would."""
    adam = NumpyOps().adam
    weights = parameter_vectors(case)
    fresh, load = gradient_vectors(case)
    state = [tuple(np.zeros_like(w) for _ in range(3)) for w in weights]
    keep = 1 - LEARNING_RATE * WEIGHT_DECAY
    t = 0

    def step() -> float:
        nonlocal t
        t += 1
        norm = in_place_grad_norm(fresh)
        scale = min(1.0, MAX_GRAD_NORM / norm)
        root = math.sqrt(1 - BETA2**t)
        rate, eps = LEARNING_RATE * root / (1 - BETA1**t), EPS * root
        for w, values, (g, m, v) in zip(weights, fresh, state, strict=True):
            np.multiply(values, scale, out=g)
            np.multiply(w, keep, out=w)
            adam(w, g, m, v, BETA1, BETA2, eps, rate)
        return norm

    return Built(step, (), load, lambda: joined(weights), norm_tolerance=FLOAT32_NORM_TOLERANCE)
