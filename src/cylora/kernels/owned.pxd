"""What one thread has at a time."""

from cylora.kernels.adam cimport PreparedAdam

cdef class Owned:
    cdef readonly str name
    cdef public object trainer      # None while it is on disk only
    cdef public PreparedAdam adam   # the trainer's, once that is known for good, or None
    cdef public long long owner     # the thread that has it, or 0
    cdef public int depth
    cdef public long long used
    cdef public long long queued
    cdef public bint is_dirty
