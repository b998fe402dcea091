"""Threads that give way to others: their nice value and their CPUs, which only Linux has for each thread."""

import logging
import os
import sys
from collections.abc import Collection

from cylora import checks
from cylora.errors import ConfigError

__all__ = ["checked_cpus", "give_way"]

logger = logging.getLogger("cylora")


def checked_cpus(cpus: Collection[int] | None) -> frozenset[int] | None:
    """Return the CPUs as a set, or raise ConfigError if a thread of this process cannot be kept to them."""
    if cpus is None:
        return None
    if sys.platform != "linux":
        raise ConfigError(f"cpus must be None on {sys.platform}, got {cpus!r}")
    try:
        chosen = frozenset(checks.integer("cpus", cpu, 0) for cpu in cpus)
    except TypeError:
        raise ConfigError(f"cpus must be a collection of integers, got {cpus!r}") from None
    allowed = os.sched_getaffinity(0)
    if not chosen or not chosen <= allowed:
        raise ConfigError(f"cpus must be some of {sorted(allowed)}, got {sorted(chosen)}")
    return chosen


def give_way(nice: int, cpus: frozenset[int] | None) -> None:
    """Give the calling thread its priority and CPUs, as far as the system lets it have its own."""
    if sys.platform != "linux":
        return
    try:
        os.setpriority(os.PRIO_PROCESS, 0, max(nice, os.getpriority(os.PRIO_PROCESS, 0)))
        if cpus is not None:
            os.sched_setaffinity(0, cpus)
    except OSError as error:  # a sandbox's rule, say: better to train at another priority than not at all
        logger.warning("an online trainer's worker keeps its priority and CPUs: %s", error)
