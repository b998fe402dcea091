"""A copy of arrays to go back to."""

from libc.stdint cimport int64_t

cdef enum:
    MOST = 6    # arrays: parameters, their average, both moments and their exponents

cdef class KeptState:
    cdef void* live[MOST]
    cdef void* copies[MOST]
    cdef Py_ssize_t sizes[MOST]
    cdef int count
    cdef tuple _held            # whose memory that is
    cdef int64_t[::1] steps     # (1,): applied when the copy was taken
    cdef int64_t every

    cdef void keep(self, int64_t t) noexcept
    cdef int64_t restore(self) noexcept
