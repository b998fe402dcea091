"""The loops: the only source of cylora's arithmetic, compiled once for each instruction set.

Invariants that make the bits equal everywhere:
(a) only + - * / sqrt on float32 and float64, each rounded by IEEE 754, and operations on their bits; no estimates, and no
    fused multiply-add but of exact squares (_gradients.pxi), where it is the same number;
(b) an element's lane, span, chunk and block follow from its index in its part of the flat vector alone, so neither alignment,
    nor the cut into pieces, nor the vector width, nor who computes which block changes the order of a sum or anything else;
(c) every number a step derives is computed here too, because callers set the floating-point state (_fpenv.pxd) around
    calls into this module and a compiler may move arithmetic across that, but not across an opaque call.
"""

from libc.float cimport FLT_MIN
from libc.math cimport INFINITY, sqrt
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from cylora.kernels._fetch cimport LINE, fetch
from cylora.kernels._loops cimport (
    BFLOAT16, BLOCK, CHUNK, EIGHT_BIT, FLOAT16, FLOAT32, LANES, AdamRule, AdamScalars, AdamStep, Gradient, Moments, NormState,
    Piece,
)

# The loops' arrays never overlap (callers check), which saves the run-time alias tests before each vector loop.
cdef extern from *:
    ctypedef float* out_floats "float *__restrict__"
    ctypedef const float* in_floats "const float *__restrict__"

# What is done on bits is written in C: it counts modulo 2^32, which Cython's checked build takes for an error.
cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    #ifdef __AVX2__
    #include <immintrin.h>
    #endif
    #define CYLORA_INLINE static inline __attribute__((always_inline))
    CYLORA_INLINE uint32_t cylora_bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
    CYLORA_INLINE float cylora_float_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
    """
    uint32_t bits_of "cylora_bits_of"(float x) noexcept nogil

include "_vectors.pxi"
include "_moments.pxi"
include "_gradients.pxi"
include "_adam.pxi"
