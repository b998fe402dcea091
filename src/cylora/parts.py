"""Parts: which runs of a flat vector are trained, each at which share of the rate and with which decay.

The matrices of adapters lie one after the other in one vector. Where a config treats them differently (LoRA+, LoRA-FA,
patterns), the kernel gets runs of neighbours that are treated alike; what is in none of them is not trained.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cylora.config import MAX_LEARNING_RATE, MAX_RATE_TIMES_DECAY, LoraTrainingConfig
from cylora.errors import ConfigError
from cylora.flat import Layout
from cylora.patterns import Pattern

__all__ = ["Part", "max_rate", "parts_of", "trained_runs", "trained_sizes"]


class Part(NamedTuple):
    """A run of parameters that are treated alike.

    Attributes
    ----------
    start, size : where it begins, how many they are.
    rate_factor : > 0, times the step's rate.
    weight_decay : its own where ``has_own_decay``, else the config's.
    """

    start: int
    size: int
    rate_factor: float
    weight_decay: float
    has_own_decay: bool


def parts_of(layout: Layout, config: LoraTrainingConfig) -> list[Part] | None:
    """Return the runs of a vector of this layout, in order; None if it is a plain one, all with the config's own rule.

    Parameters
    ----------
    layout : of adapters: "<module>.A", "<module>.B" for each module, or "A", "B" for one without a name.

    Raises
    ------
    ConfigError
        If a key of a pattern counts for no module, nothing is left to train, or a rate of the config times a factor is
        above what its weight decay allows.
    """
    plain = config.lora_plus_ratio == 1 and config.train_a and not config.rate_pattern
    if plain and not config.weight_decay_pattern:
        return None
    modules = dict.fromkeys(name[:-2] for name, _ in layout)
    for field in ("rate_pattern", "weight_decay_pattern"):
        Pattern(getattr(config, field)).require_match(field, modules)
    size = sum(math.prod(shape) for _, shape in layout)
    parts = list(_merged(layout, config))
    if not parts:
        raise ConfigError(f"train_a and rate_pattern must leave a matrix to train, got {config.rate_pattern!r}")
    highest, limit = max(config.learning_rate, config.min_learning_rate), max_rate(config, parts)
    if highest > limit:
        rule = f"learning_rate and min_learning_rate must be at most {limit:g} with these factors and weight decays"
        raise ConfigError(f"{rule}, got {highest:g}")
    return None if parts == [Part(0, size, 1.0, config.weight_decay, has_own_decay=False)] else parts


def trained_runs(layout: Layout, config: LoraTrainingConfig) -> list[tuple[int, int]]:
    """Return (start, size) of the runs that are trained: those that have moments."""
    parts = parts_of(layout, config)
    return [(0, sum(math.prod(shape) for _, shape in layout))] if parts is None else [part[:2] for part in parts]


def trained_sizes(layout: Layout, config: LoraTrainingConfig) -> tuple[int, ...]:
    """Return the sizes of these runs."""
    return tuple(size for _, size in trained_runs(layout, config))


def max_rate(config: LoraTrainingConfig, parts: Sequence[Part] | None) -> float:
    """Return the largest rate of a step: no factor takes it above 1e6, and decoupled decay never makes weights grow."""
    rules = [(1.0, config.weight_decay)] if parts is None else [part[2:4] for part in parts]
    limit = MAX_LEARNING_RATE
    for factor, decay in rules:
        limit = min(limit, MAX_LEARNING_RATE / factor)
        if config.weight_decay_mode == "decoupled" and factor * decay * limit > MAX_RATE_TIMES_DECAY:
            limit = MAX_RATE_TIMES_DECAY / (factor * decay)
    return limit


def _merged(layout: Layout, config: LoraTrainingConfig) -> Iterator[Part]:
    rates, decays = Pattern(config.rate_pattern), Pattern(config.weight_decay_pattern)
    start, last = 0, None
    for name, shape in layout:
        module, role, size = name[:-2], name[-1:], math.prod(shape)
        factor = rates.value(module, 1.0) * (config.lora_plus_ratio if role == "B" else 1.0)
        if role == "A" and not config.train_a:
            factor = 0.0
        has_own = decays.key(module) is not None
        part = Part(start, size, factor, decays.value(module, config.weight_decay), has_own)
        start += size
        if last is not None and last[2:] == part[2:]:
            last = last._replace(size=last.size + size)
            continue
        if last is not None and last.rate_factor:
            yield last
        last = part
    if last is not None and last.rate_factor:
        yield last
