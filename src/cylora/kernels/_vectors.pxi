"""Several float32 at once, as many as a register of the instruction set holds: one form of the arithmetic for all of them.

To Cython `floats` is a number: + - * on it are C's own on vectors (GCC and Clang), each lane rounded by IEEE 754 like a
single number. Division and root go by functions, since Cython's checked build would compare a divisor with 0.
"""

cdef extern from *:
    """
    #ifdef __AVX2__
    #define CYLORA_WIDTH 8
    #else
    #define CYLORA_WIDTH 4
    #endif
    #if defined(__x86_64__)
    #include <immintrin.h>
    #elif defined(__aarch64__)
    #include <arm_neon.h>
    #endif
    typedef float cylora_floats __attribute__((vector_size(4 * CYLORA_WIDTH)));
    typedef int32_t cylora_ints __attribute__((vector_size(4 * CYLORA_WIDTH)));
    typedef uint32_t cylora_words __attribute__((vector_size(4 * CYLORA_WIDTH)));

    CYLORA_INLINE cylora_floats cylora_load(const float *x) { cylora_floats r; memcpy(&r, x, sizeof r); return r; }
    CYLORA_INLINE void cylora_store(float *x, cylora_floats r) { memcpy(x, &r, sizeof r); }
    CYLORA_INLINE cylora_floats cylora_splat(float x) {
        const cylora_floats zero = {0.0f};
        return x - zero; /* -0.0 stays what it is */
    }
    CYLORA_INLINE cylora_floats cylora_quotient(cylora_floats x, cylora_floats y) { return x / y; }
    CYLORA_INLINE cylora_floats cylora_root(cylora_floats x) {
    #if defined(__AVX2__)
        return (cylora_floats) _mm256_sqrt_ps((__m256) x);
    #elif defined(__x86_64__)
        return (cylora_floats) _mm_sqrt_ps((__m128) x);
    #elif defined(__aarch64__)
        return (cylora_floats) vsqrtq_f32((float32x4_t) x);
    #else
        for (int j = 0; j < CYLORA_WIDTH; j++) x[j] = sqrtf(x[j]);
        return x;
    #endif
    }
    /* Whether any lane of some vectors, none of them negative, is at least the number with these bits. */
    CYLORA_INLINE int cylora_any_reaches(const cylora_floats *x, int count, int32_t limit) {
        const uint32_t rest = 0x80000000u - (uint32_t) limit; /* with it such a lane's highest bit is set */
        cylora_words sums = (cylora_words) x[0] + rest;
        for (int i = 1; i < count; i++) sums |= (cylora_words) x[i] + rest;
    #if defined(__AVX2__)
        return _mm256_movemask_ps((__m256) sums);
    #elif defined(__x86_64__)
        return _mm_movemask_ps((__m128) sums);
    #else
        uint64_t halves[2];
        memcpy(halves, &sums, 16);
        return ((halves[0] | halves[1]) & UINT64_C(0x8000000080000000)) != 0;
    #endif
    }
    /* x, or 2^63 with its sign beyond that; NaN as it is. Callers see to it that g * clip stays within, a huge weight may not. */
    CYLORA_INLINE cylora_floats cylora_bounded(cylora_floats x) {
        const cylora_ints bits = (cylora_ints) x, magnitude = bits & 0x7fffffff;
        const cylora_ints beyond = (magnitude > 0x5f000000) & (magnitude <= 0x7f800000);
        return (cylora_floats) ((bits & ~beyond) | (((bits & (int32_t) 0x80000000) | 0x5f000000) & beyond));
    }
    /* Drop m below its limit, and where it is dropped v below its own, of elements without a gradient. */
    CYLORA_INLINE void cylora_drop_tiny(
        cylora_floats *m, cylora_floats *v, cylora_floats g, int drops_all, float m_limit, float v_limit
    ) {
        const cylora_floats magnitude = (cylora_floats) ((cylora_ints) *m & 0x7fffffff);
        const cylora_ints none = {0}, kept = (magnitude >= cylora_splat(m_limit)) | (g != cylora_splat(0.0f));
        const cylora_ints keep = drops_all ? none : kept;
        *m = (cylora_floats) ((cylora_ints) *m & keep);
        *v = (cylora_floats) ((cylora_ints) *v & (keep | (*v >= cylora_splat(v_limit))));
    }
    """
    enum:
        WIDTH "CYLORA_WIDTH"
    ctypedef float floats "cylora_floats"
    floats load "cylora_load"(const float* x) noexcept nogil
    void store "cylora_store"(float* x, floats r) noexcept nogil
    floats splat "cylora_splat"(float x) noexcept nogil
    floats quotient "cylora_quotient"(floats x, floats y) noexcept nogil
    floats root "cylora_root"(floats x) noexcept nogil
    bint any_reaches "cylora_any_reaches"(const floats* x, int count, int32_t limit) noexcept nogil
    floats bounded "cylora_bounded"(floats x) noexcept nogil
    void drop_tiny "cylora_drop_tiny"(
        floats* m, floats* v, floats g, bint drops_all, float m_limit, float v_limit) noexcept nogil
