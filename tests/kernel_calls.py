"""The kernels as a test calls them: one step on arrays of the test's choosing, at any address and from any state."""

import sys
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from reference import Rule

from cylora.history import TrainingHistory, TrainingStep
from cylora.kernels import PreparedAdam

Floats = NDArray[np.float32]
NONE = np.zeros(0, np.uint8)


class Stored(NamedTuple):
    """Moments as the kernels keep them: the number of a form in _loops.pxd, and arrays of any type."""

    kind: int
    m: NDArray[Any]
    v: NDArray[Any]
    m_exponents: NDArray[np.uint8] = NONE
    v_exponents: NDArray[np.uint8] = NONE


def prepare_stored(
    p: Floats, stored: Stored, rule: Rule, t: int = 1, threads: int = 1, **shapes: tuple[int, int]
) -> PreparedAdam:
    """Return the prepared step t (1-based) over these very arrays; nothing finite is refused."""
    return PreparedAdam(
        p, (stored.kind, *(x.view(np.uint8) for x in stored[1:])), beta1=rule.beta1, beta2=rule.beta2, eps=rule.eps,
        weight_decay=rule.weight_decay, l2=rule.mode == "l2", max_grad_norm=rule.max_norm,
        norm_limit=sys.float_info.max, t=t - 1, threads=threads, **shapes,
    )  # fmt: skip


def prepare(p: Floats, m: Floats, v: Floats, rule: Rule, t: int = 1, **shapes: tuple[int, int]) -> PreparedAdam:
    """Return the prepared step t over these very arrays, moments in float32."""
    return prepare_stored(p, Stored(0, m, v), rule, t, **shapes)


def step(adam: PreparedAdam, rate: float, gradient: Any) -> float:
    """Do one step with a flat gradient and return the norm before clipping."""
    return adam.apply(gradient, rate)


def step_pair(adam: PreparedAdam, rate: float, grad_a: Any, grad_b: Any) -> float:
    """Do one step with a pair of gradients and return the norm before clipping."""
    adam.attach(lambda step: rate, None, TrainingStep, TrainingHistory())
    return adam.run_step(0.0, grad_a, grad_b).grad_norm


def step_mean(adam: PreparedAdam, rate: float, total: Floats, divisor: float) -> float:
    """Do one step with total / divisor, as after micro-batches of that weight, and return the norm before clipping."""
    adam.attach(lambda step: rate, None, TrainingStep, TrainingHistory())
    adam.attach_pending(np.array([0.0, divisor]), np.array([1], np.int64))
    return adam.run_step(None, total, None, True).grad_norm


def accumulate(adam: PreparedAdam, total: Floats, weight: float, gradient: Any) -> None:
    """Add weight times a flat gradient to total; the first time on this adam total counts as zero."""
    adam.accumulate(total, 0.0, gradient, None, weight)


def begin_micro_batches(adam: PreparedAdam) -> None:
    """Make adam ready to accumulate."""
    adam.attach_pending(np.zeros(2), np.zeros(1, np.int64))
