"""A tensor borrowed from a DLPack producer, for as long as this object lives."""

from libc.stdint cimport int64_t, uint64_t
from cylora.kernels._dlpack cimport DLTensor, Managed, Versioned

cdef class Tensor:
    cdef Managed* managed           # one of these two owns the memory
    cdef Versioned* versioned
    cdef const DLTensor* tensor
    cdef uint64_t flags
    cdef int kind                   # how the elements are stored; -1: not as a kernel can read them
    cdef bint is_contiguous
    cdef bint is_writable
    cdef int ndim
    cdef const int64_t* shape       # (ndim,)
    cdef void* start
    cdef Py_ssize_t n_bytes

    cdef int own(self, object capsule) except -1
    cdef int measure(self) except -1
    cdef str traits(self, bint writable)

cdef Tensor borrow_tensor(object producer, bint writable)
