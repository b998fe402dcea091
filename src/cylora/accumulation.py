"""Accumulation: micro-batches added up for one step."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cylora import checks
from cylora.errors import StateError
from cylora.flat import FlatBuffer, FloatArray

__all__ = ["MAX_WEIGHT", "MIN_WEIGHT", "Accumulation"]

MIN_WEIGHT, MAX_WEIGHT = 1e-30, 1e30  # a weight and its inverse must be normal float32 numbers


class Accumulation:
    """The weighted sum of pending micro-batches: gradients in a flat buffer, losses and weights as numbers.

    The kernel that adds a micro-batch's gradient also adds its numbers, in one uninterruptible call (`buffers`).
    """

    def __init__(self) -> None:
        self._count: NDArray[np.int64] = np.zeros(1, np.int64)
        self._sums: NDArray[np.float64] = np.zeros(2)  # weighted losses, weights
        self._buffer: FloatArray | None = None

    @property
    def count(self) -> int:
        """Micro-batches pending."""
        return int(self._count[0])

    def buffers(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the live arrays (sums, count) for a kernel that counts into them."""
        return self._sums, self._count

    @property
    def gradient(self) -> FloatArray | None:
        """The weighted sum of the gradients (meaningless while ``count`` is 0)."""
        return self._buffer

    def buffer(self, size: int) -> FloatArray:
        """Return the buffer of ``size`` elements, made when first asked for; with nothing pending it may be another."""
        if self._buffer is None or self._buffer.size != size:
            self._buffer = FlatBuffer([("gradient", (size,))]).vector
        return self._buffer

    def discard(self) -> None:
        """Forget what is pending."""
        self._count[0] = 0

    def state_dict(self) -> dict[str, Any] | None:
        """Return what is pending as plain numbers and a copy of the gradient, or None."""
        if not self.count or self._buffer is None:
            return None
        loss, weight = self._sums.tolist()
        return {"count": self.count, "loss": loss, "weight": weight, "gradient": self._buffer.copy()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any] | None, size: int | None) -> Self:
        """Return the accumulation that made ``state``; ``size`` is the parameters' number where it is known."""
        accumulation = cls()
        if state is None:
            return accumulation
        keys = ("count", "loss", "weight", "gradient")
        count, loss, weight, gradient = checks.items("accumulated", state, keys, StateError)
        shape = (getattr(gradient, "size", 0) if size is None else size,)
        gradient = checks.array("accumulated gradient", gradient, "float32", shape, StateError)
        accumulation.buffer(shape[0])[...] = gradient
        accumulation.resume(count, loss, weight)
        return accumulation

    def resume(self, count: int, loss: float, weight: float) -> None:
        """Count what is in the buffer as ``count`` pending micro-batches with these sums, or raise StateError."""
        count = checks.integer("accumulated count", count, 1, error=StateError)
        loss = checks.real("accumulated loss", loss, error=StateError)
        weight = checks.real(
            "accumulated weight", weight, "finite and >= 1e-30", checks.finite_at_least(MIN_WEIGHT), StateError
        )
        gradient: Any = self._buffer
        checks.array("accumulated gradient", gradient, "float32", gradient.shape, StateError, finite=True)
        self._sums[:] = loss, weight
        self._count[0] = count
