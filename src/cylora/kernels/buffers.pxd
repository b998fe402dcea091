"""Borrow memory from any buffer provider, checked before it is used."""

from cpython.buffer cimport Py_buffer
from cylora.kernels._loops cimport Piece

cdef int acquire_float32(
    object provider, Py_buffer* view, str name, Py_ssize_t rows, Py_ssize_t columns, bint writable
) except -1
cdef int acquire_gradient(
    object provider, Py_buffer* view, Piece* piece, str name, Py_ssize_t rows, Py_ssize_t columns
) except -1
# Whether an ordinary array satisfies every rule; then ``view``, which the caller releases, and ``piece`` are filled.
cdef bint takes_gradient(object provider, Py_buffer* view, Piece* piece, Py_ssize_t rows, Py_ssize_t columns) noexcept
# Ask early for what ``takes_gradient`` looks at, once the object itself has been asked for.
cdef void fetch_shape(object provider) noexcept
cdef bint overlap(const void* a, Py_ssize_t a_bytes, const void* b, Py_ssize_t b_bytes) noexcept nogil
