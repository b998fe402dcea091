"""The oracle: one step of clipping and Adam in float64, written like the papers. It never imports cylora.

Clipping: Pascanu, Mikolov & Bengio 2013, section 3.2. Adam: Kingma & Ba 2015, algorithm 1. Decoupled decay: Loshchilov
& Hutter 2019, algorithm 2, with the schedule multiplier folded into the rate, as everybody writes it. Nothing is
rounded to float32 and no coefficient is folded into another, so that the oracle shares no shortcut with what it judges.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

UNIT_ROUNDOFF = 2.0**-24  # of float32
DENORMAL_HALF = 2.0**-150  # half the smallest float32: what a product may lose when it is denormal

Doubles = NDArray[np.float64]


class Rule(NamedTuple):
    """The hyper-parameters of a step."""

    rate: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    mode: str = "decoupled"
    max_norm: float = math.inf


class Step(NamedTuple):
    """What one step gives: parameters, moments, and the norm before clipping."""

    p: Doubles
    m: Doubles
    v: Doubles
    norm: float


def norm(*arrays: ArrayLike) -> float:
    """Return the L2 norm over all arrays together: squares of float32 are exact in float64, fsum adds them exactly."""
    flat = [np.asarray(a, np.float64).ravel() for a in arrays]
    return math.sqrt(math.fsum(x for a in flat for x in (a * a).tolist()))


def clip_scale(norm_before: float, max_norm: float) -> float:
    """Return the factor on the gradients: max_norm / norm if norm > max_norm, else 1."""
    return max_norm / norm_before if norm_before > max_norm else 1.0


def bias_correction(beta: float, t: int) -> float:
    """Return 1 - beta^t without cancellation."""
    return 1.0 if beta == 0 else -math.expm1(t * math.log(beta))


def effective_gradient(p: ArrayLike, g: ArrayLike, rule: Rule, clip: float) -> Doubles:
    """Return what enters the moments: the clipped gradient, plus the decay in l2 mode."""
    clipped = np.asarray(g, np.float64) * clip
    return clipped + rule.weight_decay * np.asarray(p, np.float64) if rule.mode == "l2" else clipped


def moments(m: ArrayLike, v: ArrayLike, g: Doubles, rule: Rule) -> tuple[Doubles, Doubles]:
    """Return both moments after seeing the effective gradient."""
    m_next = rule.beta1 * np.asarray(m, np.float64) + (1.0 - rule.beta1) * g
    v_next = rule.beta2 * np.asarray(v, np.float64) + (1.0 - rule.beta2) * g * g
    return m_next, v_next


def update(m: ArrayLike, v: ArrayLike, t: int, rule: Rule) -> Doubles:
    """Return rate * m_hat / (sqrt(v_hat) + eps) for the moments after step t (1-based)."""
    m_hat = np.asarray(m, np.float64) / bias_correction(rule.beta1, t)
    v_hat = np.asarray(v, np.float64) / bias_correction(rule.beta2, t)
    return rule.rate * m_hat / (np.sqrt(v_hat) + rule.eps)


def decay(rule: Rule) -> float:
    """Return the share of a parameter that decoupled decay takes in one step."""
    return rule.rate * rule.weight_decay if rule.mode == "decoupled" else 0.0


def adam_step(p: ArrayLike, g: ArrayLike, m: ArrayLike, v: ArrayLike, t: int, rule: Rule) -> Step:
    """Return the state after step t (1-based) on gradient g."""
    before = norm(g)
    m_next, v_next = moments(m, v, effective_gradient(p, g, rule, clip_scale(before, rule.max_norm)), rule)
    p_next = np.asarray(p, np.float64) * (1.0 - decay(rule)) - update(m_next, v_next, t, rule)
    return Step(p_next, m_next, v_next, before)


class Group(NamedTuple):
    """Some of the parameters: their factor on the rate, and their weight decay."""

    where: slice
    rate_factor: float
    weight_decay: float


def grouped_step(
    p: ArrayLike, g: ArrayLike, m: ArrayLike, v: ArrayLike, t: int, rule: Rule, groups: list[Group]
) -> Step:
    """Return the state after step t where only the groups are trained, as an optimizer with parameter groups does it.

    What is in no group has no gradient: it is not part of the norm, and stays.
    """
    p, g, m, v = (np.array(x, np.float64) for x in (p, g, m, v))
    before = norm(*(g[group.where] for group in groups))
    clip = clip_scale(before, rule.max_norm)
    for where, factor, weight_decay in groups:
        own = rule._replace(rate=rule.rate * factor, weight_decay=weight_decay, max_norm=math.inf)
        step = adam_step(p[where], clip * g[where], m[where], v[where], t, own)
        p[where], m[where], v[where] = step.p, step.m, step.v
    return Step(p, m, v, before)


def averaged(average: ArrayLike, p: ArrayLike, decay: float) -> Doubles:
    """Return an exponential moving average after it has seen ``p``."""
    return decay * np.asarray(average, np.float64) + (1.0 - decay) * np.asarray(p, np.float64)


def ulp(x: ArrayLike) -> Doubles:
    """Return the distance between neighbouring float32 at |x|; denormals have the one of the smallest normal number."""
    magnitude = np.maximum(np.abs(np.asarray(x, np.float64)), 2.0**-126)
    return np.ldexp(1.0, np.frexp(magnitude)[1] - 24)
