"""Eight float32 at once: one form of the arithmetic for every instruction set, two 4-wide halves where 8 do not fit.

To Cython `f8` is a number: + - * on it are C's own on vectors (GCC and Clang), each lane rounded by IEEE 754 like a single
number. Division and root go by functions, since Cython's checked build would compare a divisor with 0.
"""

cdef extern from *:
    """
    typedef float cylora_f8 __attribute__((vector_size(32)));
    typedef int32_t cylora_i8 __attribute__((vector_size(32)));
    typedef uint32_t cylora_u8 __attribute__((vector_size(32)));
    #if defined(__x86_64__) && !defined(__AVX2__)
    #include <immintrin.h>
    #endif
    #if defined(__aarch64__)
    #include <arm_neon.h>
    #endif

    CYLORA_INLINE cylora_f8 cylora_load(const float *x) { cylora_f8 r; memcpy(&r, x, 32); return r; }
    CYLORA_INLINE void cylora_store(float *x, cylora_f8 r) { memcpy(x, &r, 32); }
    CYLORA_INLINE cylora_f8 cylora_splat(float x) { return (cylora_f8) {x, x, x, x, x, x, x, x}; }
    CYLORA_INLINE cylora_f8 cylora_quotient(cylora_f8 x, cylora_f8 y) { return x / y; }
    CYLORA_INLINE cylora_f8 cylora_root(cylora_f8 x) {
    #if defined(__AVX2__)
        return (cylora_f8) _mm256_sqrt_ps((__m256) x);
    #elif defined(__x86_64__)
        __m128 half[2];
        memcpy(half, &x, 32);
        half[0] = _mm_sqrt_ps(half[0]);
        half[1] = _mm_sqrt_ps(half[1]);
        memcpy(&x, half, 32);
        return x;
    #elif defined(__aarch64__)
        float32x4_t half[2];
        memcpy(half, &x, 32);
        half[0] = vsqrtq_f32(half[0]);
        half[1] = vsqrtq_f32(half[1]);
        memcpy(&x, half, 32);
        return x;
    #else
        for (int j = 0; j < 8; j++) x[j] = sqrtf(x[j]);
        return x;
    #endif
    }
    /* Whether any lane of x or y, none of them negative, is at least the number with these bits. */
    CYLORA_INLINE int cylora_any_reaches(cylora_f8 x, cylora_f8 y, int32_t limit) {
        const uint32_t rest = 0x80000000u - (uint32_t) limit; /* with it such a lane's highest bit is set */
        const cylora_u8 sums = ((cylora_u8) x + rest) | ((cylora_u8) y + rest);
    #if defined(__AVX2__)
        return _mm256_movemask_ps((__m256) sums);
    #else
        uint64_t words[4];
        memcpy(words, &sums, 32);
        return ((words[0] | words[1] | words[2] | words[3]) & UINT64_C(0x8000000080000000)) != 0;
    #endif
    }
    /* x, or 2^63 with its sign beyond that; NaN as it is. Callers see to it that g * clip stays within, a huge weight may not. */
    CYLORA_INLINE cylora_f8 cylora_bounded(cylora_f8 x) {
        const cylora_i8 bits = (cylora_i8) x, magnitude = bits & 0x7fffffff;
        const cylora_i8 beyond = (magnitude > 0x5f000000) & (magnitude <= 0x7f800000);
        return (cylora_f8) ((bits & ~beyond) | (((bits & (int32_t) 0x80000000) | 0x5f000000) & beyond));
    }
    /* Drop m below its limit, and where it is dropped v below its own, of elements without a gradient. */
    CYLORA_INLINE void cylora_drop_tiny(cylora_f8 *m, cylora_f8 *v, cylora_f8 g, int drops_all, float m_limit, float v_limit) {
        const cylora_f8 magnitude = (cylora_f8) ((cylora_i8) *m & 0x7fffffff);
        const cylora_i8 all = {-1, -1, -1, -1, -1, -1, -1, -1};
        const cylora_i8 keep = drops_all ? all ^ all : (magnitude >= cylora_splat(m_limit)) | (g != cylora_splat(0.0f));
        *m = (cylora_f8) ((cylora_i8) *m & keep);
        *v = (cylora_f8) ((cylora_i8) *v & (keep | (*v >= cylora_splat(v_limit))));
    }
    """
    ctypedef float f8 "cylora_f8"
    f8 load "cylora_load"(const float* x) noexcept nogil
    void store "cylora_store"(float* x, f8 r) noexcept nogil
    f8 splat "cylora_splat"(float x) noexcept nogil
    f8 quotient "cylora_quotient"(f8 x, f8 y) noexcept nogil
    f8 root "cylora_root"(f8 x) noexcept nogil
    bint any_reaches "cylora_any_reaches"(f8 x, f8 y, int32_t limit) noexcept nogil
    f8 bounded "cylora_bounded"(f8 x) noexcept nogil
    void drop_tiny "cylora_drop_tiny"(f8* m, f8* v, f8 g, bint drops_all, float m_limit, float v_limit) noexcept nogil
