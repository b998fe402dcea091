"""The loops: the only source of cylora's arithmetic, compiled once for each instruction set.

Invariants that make the bits equal everywhere:
(a) only + - * / sqrt on float32 and float64, each rounded by IEEE 754, and operations on their bits; no fused
    multiply-add, no estimates;
(b) an element's lane, chunk and block follow from its index in the flat vector alone, so neither alignment, nor the cut
    into pieces, nor the vector width, nor who computes which block changes the order of a sum or anything else;
(c) every number a step derives is computed here too, because callers set the floating-point state (_fpenv.pxd) around
    calls into this module and a compiler may move arithmetic across that, but not across an opaque call.
"""

from libc.float cimport FLT_MIN
from libc.math cimport INFINITY, fabsf, sqrt, sqrtf
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from cylora.kernels._loops cimport (
    BFLOAT16, BLOCK, CHUNK, EIGHT_BIT, FLOAT16, FLOAT32, LANES, AdamRule, AdamScalars, AdamStep, Gradient, Moments, NormState,
    Piece,
)

# The loops' arrays never overlap (callers check), which saves the run-time alias tests before each vector loop.
cdef extern from *:
    ctypedef float* out_floats "float *__restrict__"
    ctypedef const float* in_floats "const float *__restrict__"
    ctypedef uint16_t* out_halves "uint16_t *__restrict__"
    ctypedef const uint32_t* in_noise "const uint32_t *__restrict__"

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
    /* x if keep is 1, 0 if it is 0, in a form that every compiler vectorises. */
    CYLORA_INLINE float cylora_kept(float x, uint32_t keep) { return cylora_float_of(cylora_bits_of(x) & (0u - keep)); }
    /* x, or 2^63 with its sign beyond that; NaN as it is. Callers see to it that g * clip stays within, a huge weight may
       not. In integers: as a choice between floats GCC does not vectorise it, and the step takes seven times as long. */
    CYLORA_INLINE float cylora_bounded(float x) {
        const uint32_t bits = cylora_bits_of(x), magnitude = bits & 0x7fffffffu;
        const uint32_t beyond = 0u - (uint32_t) ((magnitude > 0x5f000000u) & (magnitude <= 0x7f800000u));
        return cylora_float_of((bits & ~beyond) | (((bits & 0x80000000u) | 0x5f000000u) & beyond));
    }
    """
    uint32_t bits_of "cylora_bits_of"(float x) noexcept nogil
    float kept "cylora_kept"(float x, uint32_t keep) noexcept nogil
    float bounded "cylora_bounded"(float x) noexcept nogil

include "_moments.pxi"
include "_gradients.pxi"
include "_adam.pxi"
