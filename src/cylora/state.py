"""TrainerState: all that a trainer continues from, its form as a dict, and whether it goes with a config."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cylora import checks
from cylora.accumulation import Accumulation
from cylora.config import LoraTrainingConfig
from cylora.errors import StateError
from cylora.flat import FloatArray, Layout
from cylora.good_state import GoodState
from cylora.history import TrainingHistory
from cylora.optimizer import AdamState
from cylora.parts import trained_sizes
from cylora.watch import WatchState

__all__ = ["STATE_VERSION", "TrainerState", "check_config", "check_layout", "state_from_dict", "state_to_dict"]

STATE_VERSION = 2
KEYS = ("version", "adam", "history", "accumulated", "ema", "watch", "good")
FIRST_KEYS = KEYS[:4]  # of version 1


class TrainerState(NamedTuple):
    """The parts a trainer continues from, themselves and no copies: for those who write and read files.

    Attributes
    ----------
    adam : None before the first step that was applied.
    history, accumulation : what was recorded, and what waits for a step.
    ema : float32 array (n,), or None: the average of the parameters.
    watch : WatchState, or None without guard and early stopping.
    good : GoodState, or None: what a rollback goes back to.
    """

    adam: AdamState | None
    history: TrainingHistory
    accumulation: Accumulation
    ema: FloatArray | None = None
    watch: WatchState | None = None
    good: GoodState | None = None


def state_to_dict(state: TrainerState) -> dict[str, Any]:
    """Return a state as plain numbers and copies of arrays."""
    return {
        "version": STATE_VERSION,
        "adam": None if state.adam is None else state.adam.to_dict(),
        "history": state.history.state_dict(),
        "accumulated": state.accumulation.state_dict(),
        "ema": None if state.ema is None else state.ema.copy(),
        "watch": None if state.watch is None else state.watch.to_dict(),
        "good": None if state.good is None else state.good.to_dict(),
    }


def state_from_dict(state: Mapping[str, Any], size: int | None) -> TrainerState:
    """Return the state that made ``state`` (of this version or the one before), or raise StateError.

    ``size`` is the parameters' number where it is known already.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    keys = FIRST_KEYS if version == 1 else KEYS
    found = dict(zip(keys, checks.items("state", state, keys, StateError), strict=True))
    if version not in (1, STATE_VERSION):
        raise StateError(f"state version must be 1 or {STATE_VERSION}, got {version!r}")
    history = TrainingHistory.from_state_dict(found["history"])
    adam = None if found["adam"] is None else AdamState.from_dict(found["adam"])
    if size is None and adam is not None:
        size = sum(math.prod(shape) for _, shape in adam.layout)
    accumulation = Accumulation.from_state_dict(found["accumulated"], size)
    ema = found.get("ema")
    if ema is not None:
        shape = (getattr(ema, "size", 0) if size is None else size,)
        ema = checks.array("ema", ema, np.float32, shape, StateError, finite=True).copy()
    good = None if found.get("good") is None else GoodState.from_dict(found["good"])
    return TrainerState(adam, history, accumulation, ema, WatchState.from_dict(found.get("watch")), good)


def check_config(state: TrainerState, config: LoraTrainingConfig) -> None:
    """Raise StateError unless a trainer of this config could have come to this state."""
    adam, history = state.adam, state.history
    if history.limit != config.history_limit:
        raise StateError(f"history limit must be {config.history_limit}, as configured, got {history.limit}")
    if adam is not None and adam.t > history.total_steps:
        raise StateError(f"adam t must be at most the {history.total_steps} steps of the history, got {adam.t}")
    if adam is not None and adam.moments.dtype != config.state_dtype:
        raise StateError(f"adam dtype must be {config.state_dtype!r}, as configured, got {adam.moments.dtype!r}")
    if state.ema is not None and config.ema_decay is None:
        raise StateError(f"ema must be None, as ema_decay is, got an average of {state.ema.size} parameters")
    if state.good is not None:
        if config.divergence != "rollback":
            raise StateError(f"good must be None with divergence={config.divergence!r}, got a state to go back to")
        if state.good.moments.dtype != config.state_dtype:
            got = state.good.moments.dtype
            raise StateError(f"good dtype must be {config.state_dtype!r}, as configured, got {got!r}")
        if (state.good.ema is None) != (config.ema_decay is None):
            raise StateError(f"good ema must be there if and only if ema_decay is, got {config.ema_decay!r}")


def check_layout(state: TrainerState, layout: Layout, config: LoraTrainingConfig, whose: str) -> None:
    """Raise StateError unless the state is one of adapters of this layout, which ``whose`` names."""
    adam, size = state.adam, sum(math.prod(shape) for _, shape in layout)
    if adam is not None and adam.layout != layout:
        raise StateError(f"adapter must have the layout of the loaded state, {adam.layout}, got {whose}")
    if adam is not None and adam.moments.sizes != (sizes := trained_sizes(layout, config)):
        rule = "adam sizes must be those that the config trains (train_a, lora_plus_ratio, patterns)"
        raise StateError(f"{rule}, {list(sizes)}, got {list(adam.moments.sizes)}")
    accumulation, good = state.accumulation, state.good
    vectors = [accumulation.gradient if accumulation.count else None, state.ema]
    if good is not None:
        vectors.append(good.parameters)
        if adam is None or good.moments.sizes != adam.moments.sizes or good.t > adam.t:
            raise StateError(f"good must be an earlier state of adam, got one after {good.t} steps")
    if state.ema is not None and adam is None:
        raise StateError("ema must be None while adam is, got an average")
    for values in vectors:
        if values is not None and values.size != size:
            raise StateError(f"adapter must have the {values.size} parameters of the loaded state, got {whose}")
