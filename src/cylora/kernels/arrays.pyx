"""Norm, clipping and copying of a sequence of arrays, as one call that nothing can interrupt halfway."""

from cpython.buffer cimport PyBuffer_Release, Py_buffer
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc, qsort
from libc.string cimport memcpy, memset
from cylora.kernels._fpenv cimport fp_enter, fp_leave
from cylora.kernels._loops cimport FLOAT32, NormState, Piece
from cylora.kernels.buffers cimport acquire_float32, acquire_gradient
from cylora.kernels.dispatch cimport loops

import numpy as np

from cylora.errors import InputError

cdef enum:
    LARGE = 32768       # elements: what takes tens of microseconds to copy releases the GIL

cdef double MIN_FACTOR = 2.0**-130  # below, float32 holds too few bits of the factor


cdef int _by_address(const void* a, const void* b) noexcept nogil:
    cdef size_t x = <size_t> (<const Py_buffer*> a).buf, y = <size_t> (<const Py_buffer*> b).buf
    return (x > y) - (x < y)


cdef class _Borrowed:
    """The memory of several arrays, held until this object goes; to be written only float32."""

    cdef Py_buffer* views
    cdef Piece* pieces
    cdef Py_ssize_t count

    def __cinit__(self, arrays, bint writable):
        cdef Py_ssize_t i, expected = len(arrays)
        self.views = <Py_buffer*> malloc(max(expected, 1) * sizeof(Py_buffer))
        self.pieces = <Piece*> malloc(max(expected, 1) * sizeof(Piece))
        if self.views == NULL or self.pieces == NULL:
            raise MemoryError()
        for i in range(expected):
            if writable:
                acquire_float32(arrays[i], &self.views[i], f"grads[{i}]", -1, -1, True)
                self.pieces[i] = Piece(start=self.views[i].buf, n=self.views[i].len // 4, kind=FLOAT32)
            else:
                acquire_gradient(arrays[i], &self.views[i], &self.pieces[i], f"grads[{i}]", -1, -1)
            self.count = i + 1

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.count):
            PyBuffer_Release(&self.views[i])
        free(self.views)
        free(self.pieces)

    cdef double norm(self) noexcept nogil:
        cdef NormState state
        cdef Py_ssize_t i
        loops.norm_begin(&state)
        for i in range(self.count):
            loops.norm_add(&state, self.pieces[i].start, self.pieces[i].n, self.pieces[i].kind)
        return loops.norm_finish(&state)

    cdef bint has_overlap(self) except -1:
        cdef Py_buffer* sorted_views = <Py_buffer*> malloc(max(self.count, 1) * sizeof(Py_buffer))
        cdef Py_ssize_t i, used = 0
        cdef bint found = False
        if sorted_views == NULL:
            raise MemoryError()
        for i in range(self.count):
            if self.views[i].len > 0:
                sorted_views[used] = self.views[i]
                used += 1
        qsort(sorted_views, used, sizeof(Py_buffer), _by_address)
        for i in range(1, used):
            if <char*> sorted_views[i - 1].buf + sorted_views[i - 1].len > <char*> sorted_views[i].buf:
                found = True
        free(sorted_views)
        return found


def norm(list arrays not None):
    """Return the L2 norm over all arrays together: float64 sums, so NaN or infinite only if an element is."""
    cdef _Borrowed borrowed = _Borrowed(arrays, False)
    cdef double result
    cdef uint64_t fp
    with nogil:
        fp = fp_enter()
        result = borrowed.norm()
        fp_leave(fp)
    return result


def clip(list arrays not None, double max_norm):
    """Scale the arrays in place so that their joint norm is at most ``max_norm``; return the norm before.

    A norm that is not finite, or whose factor float32 cannot hold, is returned with nothing written: the caller decides
    what to say.
    """
    cdef _Borrowed borrowed = _Borrowed(arrays, True)
    cdef double result, factor
    cdef Py_ssize_t i
    cdef uint64_t fp
    if borrowed.has_overlap():
        raise InputError("grads must not overlap in memory, got two arrays that share elements")
    with nogil:
        fp = fp_enter()
        result = borrowed.norm()
        factor = loops.clip_scale(result, max_norm, 1.0)
        if factor != 1.0 and factor >= MIN_FACTOR and result - result == 0.0:
            for i in range(borrowed.count):
                loops.scale(<float*> borrowed.pieces[i].start, borrowed.pieces[i].n, factor)
        fp_leave(fp)
    return result


cdef void _join(_Borrowed borrowed, float* place) noexcept nogil:
    cdef uint64_t fp = fp_enter()
    cdef Piece* piece
    cdef Py_ssize_t i
    for i in range(borrowed.count):
        piece = &borrowed.pieces[i]
        if piece.n > 0 and piece.kind == FLOAT32:
            memcpy(place, piece.start, 4 * piece.n)
        elif piece.n > 0:
            memset(place, 0, 4 * piece.n)
            loops.accumulate(place, piece.start, piece.n, piece.kind, 1.0)
        place += piece.n
    fp_leave(fp)


def joined(list arrays not None):
    """Return a new float32 vector of all elements, array after array, and how many each array has.

    A small copy keeps the GIL: to take it back from another thread would cost more than the copy.
    """
    cdef _Borrowed borrowed = _Borrowed(arrays, False)
    cdef list sizes = [borrowed.pieces[i].n for i in range(borrowed.count)]
    cdef Py_ssize_t total = sum(sizes)
    vector = np.empty(total, np.float32)
    cdef float[::1] memory = vector
    if total > LARGE:
        with nogil:
            _join(borrowed, &memory[0])
    elif total > 0:
        _join(borrowed, &memory[0])
    return vector, sizes
