"""Learning-rate schedules: pure functions from the 0-based step index to the rate.

Each starts with a linear warm-up, ``learning_rate * step / warmup_steps`` below ``warmup_steps``, so step 0 of a
warmed-up run has rate 0. After ``total_steps`` a decaying schedule stays at its floor.
"""

import math
from collections.abc import Callable

from cylora.config import LoraTrainingConfig

__all__ = ["Schedule", "constant", "cosine", "from_config", "linear", "steady_from", "warmup_stable_decay"]

Schedule = Callable[[int], float]


def constant(learning_rate: float, warmup_steps: int = 0) -> Schedule:
    """Return warm-up, then ``learning_rate`` for ever."""

    def rate(step: int) -> float:
        return learning_rate * step / warmup_steps if step < warmup_steps else learning_rate

    return rate


def linear(learning_rate: float, warmup_steps: int, total_steps: int, min_learning_rate: float = 0.0) -> Schedule:
    """Return warm-up, then a straight line from ``learning_rate`` to ``min_learning_rate`` at ``total_steps``."""
    span = max(total_steps - warmup_steps, 0)

    def rate(step: int) -> float:
        if step < warmup_steps:
            return learning_rate * step / warmup_steps
        if step - warmup_steps >= span:
            return min_learning_rate
        return learning_rate + (min_learning_rate - learning_rate) * ((step - warmup_steps) / span)

    return rate


def cosine(learning_rate: float, warmup_steps: int, total_steps: int, min_learning_rate: float = 0.0) -> Schedule:
    """Return warm-up, then half a cosine from ``learning_rate`` to ``min_learning_rate`` at ``total_steps``.

    min + (peak - min) * (1 + cos(pi * q)) / 2 with q = (step - warmup) / (total - warmup), at most 1: Loshchilov &
    Hutter 2017 (arXiv:1608.03983), equation 5, without restarts.
    """
    span = max(total_steps - warmup_steps, 0)

    def rate(step: int) -> float:
        if step < warmup_steps:
            return learning_rate * step / warmup_steps
        if step - warmup_steps >= span:
            return min_learning_rate
        swing = 1.0 + math.cos(math.pi * ((step - warmup_steps) / span))
        return min_learning_rate + 0.5 * (learning_rate - min_learning_rate) * swing

    return rate


def warmup_stable_decay(
    learning_rate: float, warmup_steps: int, total_steps: int, decay_steps: int, min_learning_rate: float = 0.0
) -> Schedule:
    """Return warm-up, ``learning_rate`` until ``decay_steps`` before ``total_steps``, then a line to the floor.

    Hu et al. 2024 (arXiv:2404.06395), section 4, with a linear instead of an exponential decay. It begins no earlier
    than the warm-up ends.
    """
    start = max(total_steps - decay_steps, warmup_steps)
    decay = linear(learning_rate, start, total_steps, min_learning_rate)
    warm = constant(learning_rate, warmup_steps)

    def rate(step: int) -> float:
        return warm(step) if step < start else decay(step)

    return rate


def from_config(config: LoraTrainingConfig) -> Schedule:
    """Return the schedule a training config asks for."""
    if callable(config.schedule):
        return config.schedule
    peak, warmup, total, floor = (
        config.learning_rate,
        config.warmup_steps,
        config.max_steps,
        config.min_learning_rate,
    )
    if config.schedule == "constant":
        return constant(peak, warmup)
    if config.schedule == "linear":
        return linear(peak, warmup, total, floor)
    if config.schedule == "cosine":
        return cosine(peak, warmup, total, floor)
    return warmup_stable_decay(peak, warmup, total, config.decay_steps or max(total // 10, 1), floor)


def steady_from(config: LoraTrainingConfig) -> int | None:
    """Return the step from which a config's schedule keeps one rate for ever; None for a callable: who knows."""
    if callable(config.schedule):
        return None
    return config.warmup_steps if config.schedule == "constant" else max(config.warmup_steps, config.max_steps)
