"""Memory that is lent read-only and comes back by itself when nobody can reach it any more.

(a) A reader keeps an array, a view of it, a memoryview, a tensor of torch over it: each keeps what it was made from,
    down to the array that was lent, and that one keeps a `_Lease`. So the lease goes when the last of them goes, and
    takes the memory back. Nothing is counted, and nothing asks who still holds it.
(b) NumPy shortens chains: a view of a view refers to the array that owns the memory. The lease is no array, so the
    chains end there; and since it is not writable, no reader can make its array writable.
(c) An array is nothing that Python's cycle collector knows. So it never takes a lease for garbage, however its readers
    refer to each other, before the last array is really gone.
"""

from typing import Any

import numpy as np

from cylora.flat import FloatArray, aligned_zeros

__all__ = ["Lending"]


class Lending:
    """Float32 vectors of one size, 64-byte aligned; each is lent to many and used again after the last of them.

    Attributes
    ----------
    allocated : int
        How many vectors were made so far; all other `take` found one that had come back.
    """

    MAX_SPARE = 1  # what waits to be used again; more would only be kept after a burst of readers

    def __init__(self, size: int) -> None:
        self._size = size
        self._spare: list[FloatArray] = []
        self.allocated = 0

    def take(self) -> FloatArray:
        """Return a vector to be filled that nobody else has, its content undefined."""
        try:
            return self._spare.pop()  # one bytecode: a lease may give back at any moment, from any thread
        except IndexError:
            self.allocated += 1
            return aligned_zeros(self._size, np.float32, phase=1)

    def give_back(self, memory: FloatArray) -> None:
        """Take back what `take` returned."""
        if len(self._spare) < self.MAX_SPARE:
            self._spare.append(memory)

    def lend(self, memory: FloatArray) -> FloatArray:
        """Return a read-only array over ``memory``, which comes back when nothing of that array is left."""
        lent: FloatArray = np.asarray(_Lease(memory, self))
        return lent


class _Lease:
    """What the lent arrays keep alive, and nothing else does."""

    __slots__ = ("_lending", "_memory")

    def __init__(self, memory: FloatArray, lending: Lending) -> None:
        self._memory, self._lending = memory, lending

    @property
    def __array_interface__(self) -> dict[str, Any]:
        data = (self._memory.ctypes.data, True)  # True: read-only
        return {"version": 3, "shape": self._memory.shape, "typestr": self._memory.dtype.str, "data": data}

    def __del__(self) -> None:
        self._lending.give_back(self._memory)
