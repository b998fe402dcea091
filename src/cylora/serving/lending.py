"""Memory that is lent read-only and comes back by itself when nobody can reach it any more.

(a) A reader keeps an array, a view of it, a memoryview, a tensor of torch over it: each keeps what it was made from,
    down to the array that was lent, and that one keeps a `_Lease`. So the lease goes when the last of them goes.
    Nothing is counted, and nothing asks who still holds it.
(b) NumPy shortens chains: a view of a view refers to the array that owns the memory. The lease is no array, so the
    chains end there; and since it is not writable, no reader can make its array writable.
(c) An array is nothing that Python's cycle collector knows. So it never takes a lease for garbage, however its readers
    refer to each other, before the last array is really gone.
(d) The end of a lease runs no Python code in the reader, only ``deque.append``: in a ``__del__`` a KeyboardInterrupt
    that came at the wrong moment would be lost.
"""

import weakref
from collections import deque
from typing import Any

import numpy as np

from cylora.flat import FloatArray, aligned_zeros

__all__ = ["Lending"]


class Lending:
    """Float32 vectors of one size, 64-byte aligned; each is lent to many and used again after the last of them.

    One thread at a time calls it; what was lent may go in any thread.

    Attributes
    ----------
    allocated : int
        How many vectors were made so far; all other `take` found one that had come back.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._spare: FloatArray | None = None  # one: more would only be kept after a burst of readers
        self._loans: dict[int, _Loan] = {}  # what is watched; a weak reference must be kept itself
        self._ended: deque[_Loan] = deque()
        self.allocated = 0

    def take(self) -> FloatArray:
        """Return a vector to be filled that nobody else has, its content undefined."""
        while self._ended:  # in an order that an interrupt between any two lines leaves to be done again
            loan = self._ended[0]
            self._spare = loan.memory
            self._loans.pop(id(loan), None)
            self._ended.popleft()
        memory, self._spare = self._spare, None
        if memory is None:
            self.allocated += 1
            memory = aligned_zeros(self._size, np.float32, phase=1)
        return memory

    def give_back(self, memory: FloatArray) -> None:
        """Take back what `take` returned and `lend` has not lent."""
        self._spare = memory

    def lend(self, memory: FloatArray) -> FloatArray:
        """Return a read-only array over ``memory``, which comes back when nothing of that array is left."""
        lease = _Lease(memory)
        loan = _Loan(lease, self._ended.append)
        loan.memory = memory
        self._loans[id(loan)] = loan
        lent: FloatArray = np.asarray(lease)
        return lent


class _Lease:
    """What the lent arrays keep alive, and nothing else does."""

    __slots__ = ("__weakref__", "_memory")

    def __init__(self, memory: FloatArray) -> None:
        self._memory = memory

    @property
    def __array_interface__(self) -> dict[str, Any]:
        data = (self._memory.ctypes.data, True)  # True: read-only
        return {"version": 3, "shape": self._memory.shape, "typestr": self._memory.dtype.str, "data": data}


class _Loan(weakref.ref[_Lease]):
    """A lease seen from the lender, who gets the memory back when that one is gone."""

    __slots__ = ("memory",)

    memory: FloatArray
