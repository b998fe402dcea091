"""Borrow memory from any buffer provider, checked before it is used."""

from cpython.buffer cimport Py_buffer
from cylora.kernels._loops cimport Piece

cdef int acquire_float32(
    object provider, Py_buffer* view, str name, Py_ssize_t rows, Py_ssize_t columns, bint writable
) except -1
cdef int acquire_gradient(
    object provider, Py_buffer* view, Piece* piece, str name, Py_ssize_t rows, Py_ssize_t columns
) except -1
cdef bint overlap(const void* a, Py_ssize_t a_bytes, const void* b, Py_ssize_t b_bytes) noexcept nogil
