"""A copy of what a step writes, taken and brought back in one uninterruptible call each."""

from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memcpy


cdef class KeptState:
    """Copies of ``live`` arrays (both sequences of uint8 vectors, written), and how many steps they had seen.

    ``steps`` is an int64 vector of one, written; a copy is taken every so many applied steps.
    """

    def __init__(self, live, copies, int64_t[::1] steps not None, int64_t every):
        cdef uint8_t[::1] one, other
        cdef int i, count = len(live)
        if self.count:
            raise TypeError("KeptState is initialised once")
        if not 1 <= count <= MOST or len(copies) != count or steps.shape[0] != 1 or every < 1:
            raise ValueError(f"live and copies must be the same 1 to {MOST} arrays, steps (1,), every >= 1")
        held = []
        for i in range(count):
            one, other = live[i], copies[i]
            if one.shape[0] != other.shape[0] or one.shape[0] == 0:
                raise ValueError("a copy must have the length of its array")
            self.live[i], self.copies[i], self.sizes[i] = &one[0], &other[0], one.shape[0]
            held.append((one, other))
        self._held, self.steps, self.every = tuple(held), steps, every
        self.count = count

    cdef void keep(self, int64_t t) noexcept:
        """Take a copy after ``t`` applied steps, if it is time to."""
        cdef int i
        if t % self.every == 0:
            with nogil:
                for i in range(self.count):
                    memcpy(self.copies[i], self.live[i], self.sizes[i])
            self.steps[0] = t

    cdef int64_t restore(self) noexcept:
        """Bring the copy back; return how many steps it has seen."""
        cdef int i
        with nogil:
            for i in range(self.count):
                memcpy(self.live[i], self.copies[i], self.sizes[i])
        return self.steps[0]
