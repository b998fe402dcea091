"""The loops of the chosen instruction set, for cylora's own modules and for any Cython package that cimports them.

``loops`` is the raw table: call through it only between ``fp_enter`` and ``fp_leave`` of ``_fpenv``.
The functions below do that themselves; arrays must not overlap, nothing is checked, no GIL is needed.
"""

from libc.stdint cimport int64_t
from cylora.kernels._loops cimport AdamRule, Loops

cdef Loops loops

cdef double norm(const float* g, Py_ssize_t n) noexcept nogil
cdef void scale(float* g, Py_ssize_t n, double factor) noexcept nogil
cdef void accumulate(float* total, const float* g, Py_ssize_t n, double weight) noexcept nogil
cdef void adam_step(
    float* p, const float* g, float* m, float* v, Py_ssize_t n,
    const AdamRule* rule, double rate, double clip, int64_t t
) noexcept nogil
