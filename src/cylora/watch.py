"""Watch: what a trainer keeps an eye on from step to step, the divergence guard and early stopping.

Both follow from the recorded steps. They are read from the history before the next step, and before anything is asked:
so a step that is recorded counts, one that was refused does not, and there is nothing to undo.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cylora import checks
from cylora.config import LoraTrainingConfig
from cylora.early_stopping import EarlyStopping
from cylora.errors import DivergenceError, StateError
from cylora.history import TrainingHistory, TrainingStep
from cylora.running_median import RunningMedian

__all__ = ["NO_STEP", "Watch", "WatchState"]

NO_STEP = -1.0  # a limit that no norm is within


class WatchState(NamedTuple):
    """What a `Watch` continues from.

    Attributes
    ----------
    losses, norms : float64 arrays (k,), of the last applied steps, oldest first; without a guard empty.
    stopping : what `EarlyStopping.state_dict` returned, or None.
    """

    losses: NDArray[np.float64]
    norms: NDArray[np.float64]
    stopping: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and arrays."""
        return self._asdict()

    @classmethod
    def from_dict(cls, state: Mapping[str, Any] | None) -> Self | None:
        """Return the state that made ``state``, or raise StateError."""
        if state is None:
            return None
        losses, norms, stopping = checks.items("watch", state, ("losses", "norms", "stopping"), StateError)
        size = getattr(losses, "shape", (0,))[:1]
        losses = checks.array("watch losses", losses, np.float64, size, StateError, finite=True)
        norms = checks.array("watch norms", norms, np.float64, size, StateError, finite=True)
        if stopping is not None:
            EarlyStopping(1).load_state_dict(stopping)  # which checks it
        return cls(losses, norms, stopping)


class Watch:
    """The guard and the early stopping of one trainer, over its history.

    Parameters
    ----------
    config : LoraTrainingConfig
        With ``divergence`` or ``early_stopping_patience``.
    history : TrainingHistory
        Its steps so far count only as far as ``state`` says.
    state : WatchState, optional
        To continue from. What the config does not ask for is left out of it.
    """

    def __init__(self, config: LoraTrainingConfig, history: TrainingHistory, state: WatchState | None = None) -> None:
        self._policy, self._factor = config.divergence, config.divergence_factor
        self._history = history
        none: NDArray[np.float64] = np.zeros(0)
        losses, norms, stopping = WatchState(none, none, None) if state is None else state
        if self._policy == "ignore":
            losses = norms = none
        self._losses = RunningMedian(config.divergence_window, losses.tolist())
        self._norms = RunningMedian(config.divergence_window, norms.tolist())
        self._stopping: EarlyStopping | None = None
        if config.early_stopping_patience is not None:
            patience, min_delta = config.early_stopping_patience, config.early_stopping_min_delta
            self._stopping = EarlyStopping(patience, min_delta=min_delta)
            if stopping is not None:
                self._stopping.load_state_dict(stopping)
            self._first = history.total_steps - self._stopping.count  # the step of its first value
        # Steps read, and those of them that are in the medians: one object, so that both are changed at once.
        self._read = history.total_steps, len(self._losses)

    @classmethod
    def for_training(
        cls, config: LoraTrainingConfig, history: TrainingHistory, state: WatchState | None = None
    ) -> Self | None:
        """Return a watch if the config asks for one."""
        if config.divergence == "ignore" and config.early_stopping_patience is None:
            return None
        return cls(config, history, state)

    def catch_up(self) -> None:
        """Read the steps recorded since the last time. Interrupted, it can be done again."""
        steps, applied = self._read
        for step in self._unread(steps):
            if self._policy != "ignore" and not step.skipped and math.isfinite(step.loss):
                self._losses.put(applied, step.loss)
                self._norms.put(applied, step.grad_norm)
                applied += 1
            if self._stopping is not None and self._first + self._stopping.count == step.step:
                self._stopping.update(step.loss, step.step)
            self._read = step.step + 1, applied

    def stopping(self) -> EarlyStopping | None:
        """Return the early stopping after all recorded steps: a copy, since another thread may be in a step."""
        if self._stopping is None:
            return None
        stopping = self._stopping.copy()
        for step in self._unread(self._first + stopping.count):
            stopping.update(step.loss, step.step)
        return stopping

    def _unread(self, first: int) -> list[TrainingStep]:
        missing = self._history.total_steps - first
        return self._history[-missing:] if missing > 0 else []

    def norm_limit(self, loss: float) -> float:
        """Return the largest gradient norm that a step of this loss may have; `NO_STEP` if its loss is too large.

        Raises
        ------
        DivergenceError
            If the loss is, and the policy is "raise".
        """
        self.catch_up()
        if self._policy == "ignore":
            return math.inf
        usual = self._losses.value() or 0.0
        limit = self._factor * usual if usual > 0 else math.inf
        if not (math.isfinite(loss) and loss <= limit):
            if self._policy == "raise":
                raise DivergenceError(self._message("the loss", loss, limit))
            return NO_STEP
        usual = self._norms.value() or 0.0
        return self._factor * usual if usual > 0 else math.inf

    def refusal(self, norm: float, limit: float) -> DivergenceError:
        """Return the error for a gradient of this ``norm``."""
        return DivergenceError(self._message("the gradient's norm", norm, limit))

    def state(self) -> WatchState:
        """Return copies of what this watch would continue from."""
        self.catch_up()
        applied = self._read[1]
        return WatchState(
            np.array(self._losses.values(applied), np.float64),
            np.array(self._norms.values(applied), np.float64),
            None if self._stopping is None else self._stopping.state_dict(),
        )

    def _message(self, what: str, got: float, limit: float) -> str:
        if math.isinf(limit):
            return f"{what} must be finite with divergence={self._policy!r}, got {got}"
        usual = f"{self._factor:g} times its median over the last {self._losses.window} steps"
        return f"{what} must be at most {limit:.6g}, {usual}, got {got:.6g}"
