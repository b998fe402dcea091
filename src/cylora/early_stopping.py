"""EarlyStopping: whether a measure has not become better for too long."""

import math
from collections.abc import Mapping
from typing import Any

from cylora import checks
from cylora.errors import StateError

__all__ = ["EarlyStopping"]


class EarlyStopping:
    """Tell when to stop: after ``patience`` values in a row none of which was better than the best before them.

    >>> stopping = EarlyStopping(patience=2)
    >>> [stopping.update(loss) for loss in (3.0, 2.0, 2.5, 2.1)]
    [False, False, False, True]
    >>> stopping.best, stopping.best_step
    (2.0, 1)

    Parameters
    ----------
    patience : int >= 1
        As in Keras' ``EarlyStopping`` and Hugging Face's ``EarlyStoppingCallback``.
    min_delta : float >= 0
        A value is better only if it is so by more than this.
    mode : "min" or "max"
        Whether a smaller or a larger value is better. One that is not finite never is.

    Raises
    ------
    ConfigError
        If a parameter breaks its rule.
    """

    __slots__ = ("_state", "min_delta", "mode", "patience")

    def __init__(self, patience: int, *, min_delta: float = 0.0, mode: str = "min") -> None:
        self.patience = checks.integer("patience", patience, 1)
        self.min_delta = checks.real("min_delta", min_delta, "finite and >= 0", checks.finite_at_least(0.0))
        self.mode = checks.choice("mode", mode, ("min", "max"))
        # Best value (None: none yet), its step, values since, values. One object: an update is whole or not at all.
        self._state: tuple[float | None, int | None, int, int] = (None, None, 0, 0)

    @property
    def best(self) -> float | None:
        """The best value so far."""
        return self._state[0]

    @property
    def best_step(self) -> int | None:
        """The step of the best value."""
        return self._state[1]

    @property
    def count(self) -> int:
        """How many values there have been."""
        return self._state[3]

    @property
    def is_over(self) -> bool:
        """Whether it is time to stop."""
        return self._state[2] >= self.patience

    def update(self, value: float, step: int | None = None) -> bool:
        """Take the next value, and return whether it is time to stop.

        ``step`` is what `best_step` shall say if this is the best; default the number of values before it.
        """
        best, best_step, waited, count = self._state
        value = checks.real("value", value)
        gain = value if best is None else (best - value if self.mode == "min" else value - best)
        if math.isfinite(value) and (best is None or gain > self.min_delta):
            best, best_step, waited = value, count if step is None else step, 0
        else:
            waited += 1
        self._state = best, best_step, waited, count + 1
        return waited >= self.patience

    def copy(self) -> "EarlyStopping":
        """Return one that goes on from here by itself."""
        new = EarlyStopping(self.patience, min_delta=self.min_delta, mode=self.mode)
        new._state = self._state
        return new

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen as plain numbers."""
        return dict(zip(("best", "best_step", "waited", "count"), self._state, strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, or raise StateError and change nothing."""
        best, step, waited, count = checks.items(
            "early stopping", state, ("best", "best_step", "waited", "count"), StateError
        )
        count = checks.integer("early stopping count", count, 0, error=StateError)
        waited = checks.integer("early stopping waited", waited, 0, count, StateError)
        if (best is None) != (step is None):
            raise StateError(f"early stopping best and best_step must both be there or None, got {best!r} and {step!r}")
        if best is not None:
            best = checks.real("early stopping best", best, "finite", math.isfinite, StateError)
            step = checks.integer("early stopping best_step", step, 0, error=StateError)
        self._state = best, step, waited, count
