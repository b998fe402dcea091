"""GoodState: a copy of what a step writes, to go back to."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cylora import checks
from cylora.errors import StateError
from cylora.flat import FloatArray
from cylora.moments import Moments, checked_sizes

__all__ = ["GoodState"]


class GoodState:
    """Parameters, moments and average after some applied step, in arrays that a kernel copies from and into.

    Parameters
    ----------
    parameters : float32 array (n,)
    moments : Moments
    ema : float32 array (n,), or None
    t : int
        Steps applied.
    """

    __slots__ = ("ema", "moments", "parameters", "steps")

    def __init__(self, parameters: FloatArray, moments: Moments, ema: FloatArray | None, t: int) -> None:
        self.parameters, self.moments, self.ema = parameters, moments, ema
        self.steps: NDArray[np.int64] = np.array([t], np.int64)

    @classmethod
    def of(cls, parameters: FloatArray, moments: Moments, ema: FloatArray | None, t: int) -> Self:
        """Return a copy of these."""
        return cls(parameters.copy(), moments.copy(), None if ema is None else ema.copy(), t)

    @property
    def t(self) -> int:
        """Steps applied."""
        return int(self.steps[0])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the live arrays by name."""
        average = {} if self.ema is None else {"ema": self.ema}
        return {"parameters": self.parameters, **average, **self.moments.arrays()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and copies of the arrays."""
        arrays = {"parameters": self.parameters.copy(), "ema": None if self.ema is None else self.ema.copy()}
        return {"t": self.t, **arrays, "sizes": list(self.moments.sizes), "moments": self.moments.to_dict()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return the state that made ``state``, or raise StateError."""
        keys = ("t", "parameters", "ema", "sizes", "moments")
        t, parameters, ema, sizes, moments = checks.items("good", state, keys, StateError)
        arrays = {"parameters": parameters} | ({} if ema is None else {"ema": ema})
        size = getattr(parameters, "size", 0)
        copies = {
            name: checks.array(f"good {name}", values, np.float32, (size,), StateError, finite=True).copy()
            for name, values in arrays.items()
        }
        t = checks.integer("good t", t, 0, error=StateError)
        stored = Moments.from_dict(moments, checked_sizes("good sizes", sizes))
        return cls(copies["parameters"], stored, copies.get("ema"), t)
