"""The loops: the only source of cylora's arithmetic, compiled once for each instruction set.

Invariants that make the bits equal everywhere:
(a) only + - * / sqrt on float32 and float64, each rounded by IEEE 754; no fused multiply-add, no estimates;
(b) an element's lane and block follow from its index in the flat vector alone, so neither alignment, nor the cut
    into segments, nor the vector width changes the order of a sum;
(c) every number a step derives is computed here too, because callers set the floating-point state (_fpenv.pxd) around
    calls into this module and a compiler may move arithmetic across that, but not across an opaque call.
"""

from libc.float cimport FLT_MIN
from libc.math cimport INFINITY, sqrt, sqrtf
from libc.stdint cimport int64_t, uint32_t
from cylora.kernels._loops cimport BLOCK, LANES, AdamRule, AdamScalars, NormState

# The loops' arrays never overlap (callers check), which saves the run-time alias tests before each vector loop.
cdef extern from *:
    ctypedef float* out_floats "float *__restrict__"
    ctypedef const float* in_floats "const float *__restrict__"

# Same operations in the same order twice. Left to itself GCC loads 8 floats and takes them apart again, which makes the
# norm a third slower than converting 4 straight from memory.
cdef extern from *:
    """
    #ifdef __AVX2__
    #include <immintrin.h>
    static inline void cylora_add_squares_16(double *lanes, const float *g, Py_ssize_t groups) {
        __m256d s0 = _mm256_loadu_pd(lanes), s1 = _mm256_loadu_pd(lanes + 4);
        __m256d s2 = _mm256_loadu_pd(lanes + 8), s3 = _mm256_loadu_pd(lanes + 12);
        for (; groups > 0; groups--, g += 16) {
            const __m256d x0 = _mm256_cvtps_pd(_mm_loadu_ps(g)), x1 = _mm256_cvtps_pd(_mm_loadu_ps(g + 4));
            const __m256d x2 = _mm256_cvtps_pd(_mm_loadu_ps(g + 8)), x3 = _mm256_cvtps_pd(_mm_loadu_ps(g + 12));
            s0 = _mm256_add_pd(s0, _mm256_mul_pd(x0, x0));
            s1 = _mm256_add_pd(s1, _mm256_mul_pd(x1, x1));
            s2 = _mm256_add_pd(s2, _mm256_mul_pd(x2, x2));
            s3 = _mm256_add_pd(s3, _mm256_mul_pd(x3, x3));
        }
        _mm256_storeu_pd(lanes, s0);
        _mm256_storeu_pd(lanes + 4, s1);
        _mm256_storeu_pd(lanes + 8, s2);
        _mm256_storeu_pd(lanes + 12, s3);
    }
    #else
    static inline void cylora_add_squares_16(double *lanes, const float *g, Py_ssize_t groups) {
        double sums[16];
        for (int j = 0; j < 16; j++) sums[j] = lanes[j];
        for (; groups > 0; groups--, g += 16)
            for (int j = 0; j < 16; j++) {
                const double x = g[j];
                sums[j] += x * x;
            }
        for (int j = 0; j < 16; j++) lanes[j] = sums[j];
    }
    #endif
    """
    void add_squares_16 "cylora_add_squares_16"(double* lanes, const float* g, Py_ssize_t groups) noexcept nogil


cdef double fold(const double* lanes) noexcept nogil:
    """Sum of the lanes as a fixed tree: 16 -> 8 -> 4 -> 2 -> 1."""
    cdef double half[8]
    cdef int j
    for j in range(8):
        half[j] = lanes[j] + lanes[j + 8]
    for j in range(4):
        half[j] = half[j] + half[j + 4]
    return (half[0] + half[2]) + (half[1] + half[3])


cdef void add_squares(double* lanes, Py_ssize_t lane, in_floats g, Py_ssize_t n) noexcept nogil:
    """Add the squares of g[0:n] to the lanes, starting at ``lane``. float32 squares are exact in float64."""
    cdef double x
    cdef Py_ssize_t i = 0
    while lane != 0 and i < n:
        x = g[i]
        lanes[lane] += x * x
        lane = (lane + 1) % LANES
        i += 1
    if n - i >= LANES:
        add_squares_16(lanes, g + i, (n - i) // LANES)
        i += (n - i) // LANES * LANES
        lane = 0
    while i < n:
        x = g[i]
        lanes[lane] += x * x
        lane += 1
        i += 1


cdef api void norm_begin(NormState* state) noexcept nogil:
    cdef int j
    for j in range(LANES):
        state.lanes[j] = 0.0
    state.total = 0.0
    state.filled = 0


cdef api void norm_add(NormState* state, const float* g, Py_ssize_t n) noexcept nogil:
    """Append g[0:n] to the vector whose squares are being summed."""
    cdef Py_ssize_t part
    cdef int j
    while n > 0:
        part = BLOCK - state.filled
        if part > n:
            part = n
        add_squares(state.lanes, state.filled % LANES, g, part)
        state.filled += part
        if state.filled == BLOCK:
            state.total += fold(state.lanes)
            for j in range(LANES):
                state.lanes[j] = 0.0
            state.filled = 0
        g += part
        n -= part


cdef api double norm_finish(const NormState* state) noexcept nogil:
    """L2 norm of what was appended. NaN or infinite if and only if an element was: no finite sum overflows float64."""
    cdef double total = state.total
    if state.filled:
        total += fold(state.lanes)
    return sqrt(total)


cdef api Py_ssize_t first_nonfinite(const float* g, Py_ssize_t n) noexcept nogil:
    """Index of the first NaN or infinity in g[0:n], or -1."""
    cdef Py_ssize_t i
    for i in range(n):
        if (<const uint32_t*> g)[i] & 0x7f800000u == 0x7f800000u:
            return i
    return -1


cdef api double clip_scale(double norm, double max_norm) noexcept nogil:
    """max_norm / norm if norm > max_norm, else 1: equality does not clip."""
    return max_norm / norm if norm > max_norm else 1.0


cdef api void scale(float* g_, Py_ssize_t n, double factor_) noexcept nogil:
    cdef out_floats g = g_
    cdef float factor = <float> factor_
    cdef Py_ssize_t i
    for i in range(n):
        g[i] = g[i] * factor


cdef void add_scaled(out_floats total, in_floats g, Py_ssize_t n, float weight) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        total[i] = total[i] + weight * g[i]


cdef api void accumulate(float* total, const float* g, Py_ssize_t n, double weight) noexcept nogil:
    add_scaled(total, g, n, <float> weight)


cdef double power(double base, int64_t exponent) noexcept nogil:
    """base ** exponent by squaring, so that no C library's pow has a say in the bits."""
    cdef double result = 1.0
    while exponent > 0:
        if exponent & 1:
            result = result * base
        base = base * base
        exponent >>= 1
    return result


cdef api void adam_scalars(
    AdamScalars* scalars, const AdamRule* rule, double rate, double clip, int64_t t
) noexcept nogil:
    """Derive the scalars of step t (1-based) at learning rate ``rate`` in float64; round each once.

    The step size is folded into the denominator: rate/bc1 * m / (sqrt(v)/sqrt(bc2) + eps)
    = m / (sqrt(v) * root_scale + offset). That spares a multiplication and a rounding. A rate below 1e-18 would overflow
    the quotients and moves no float32 weight that is not itself below 1e-17: it counts as 0, where the denominator is infinite.
    """
    cdef double bc1 = 1.0 - power(rule.beta1, t)
    cdef double bc2 = 1.0 - power(rule.beta2, t)
    scalars.clip_scale = <float> clip
    scalars.one_minus_beta1 = <float> (1.0 - rule.beta1)
    scalars.one_minus_beta2 = <float> (1.0 - rule.beta2)
    if rate < 1e-18:
        scalars.root_scale = 0.0
        scalars.offset = <float> INFINITY
    else:
        scalars.root_scale = <float> (bc1 / (rate * sqrt(bc2)))
        scalars.offset = <float> (rule.eps * bc1 / rate)
        if scalars.offset < FLT_MIN:  # eps, 1 - beta1 and 1 / rate all absurdly small: never divide 0 by 0
            scalars.offset = FLT_MIN
    scalars.decay = <float> (rule.weight_decay if rule.l2 else rate * rule.weight_decay)
    scalars.l2 = rule.l2


cdef void update_decoupled(
    out_floats p, in_floats g, out_floats m, out_floats v, Py_ssize_t n, const AdamScalars* k
) noexcept nogil:
    cdef float clip = k.clip_scale, c1 = k.one_minus_beta1, c2 = k.one_minus_beta2
    cdef float root_scale = k.root_scale, offset = k.offset, decay = k.decay
    cdef float gi, mi, vi
    cdef Py_ssize_t i
    for i in range(n):
        gi = g[i] * clip
        mi = m[i] + c1 * (gi - m[i])
        vi = v[i] + c2 * (gi * gi - v[i])
        m[i] = mi
        v[i] = vi
        p[i] = p[i] - (decay * p[i] + mi / (sqrtf(vi) * root_scale + offset))


cdef void update_l2(
    out_floats p, in_floats g, out_floats m, out_floats v, Py_ssize_t n, const AdamScalars* k
) noexcept nogil:
    cdef float clip = k.clip_scale, c1 = k.one_minus_beta1, c2 = k.one_minus_beta2
    cdef float root_scale = k.root_scale, offset = k.offset, decay = k.decay
    cdef float bound = 9.2233720368547758e18  # 2^63: callers see to it that g * clip keeps it; a huge weight may not
    cdef float gi, mi, vi
    cdef Py_ssize_t i
    for i in range(n):
        gi = g[i] * clip + decay * p[i]
        gi = bound if gi > bound else gi
        gi = -bound if gi < -bound else gi
        mi = m[i] + c1 * (gi - m[i])
        vi = v[i] + c2 * (gi * gi - v[i])
        m[i] = mi
        v[i] = vi
        p[i] = p[i] - mi / (sqrtf(vi) * root_scale + offset)


cdef api void adam_update(
    float* p, const float* g, float* m, float* v, Py_ssize_t n, const AdamScalars* scalars
) noexcept nogil:
    """One Adam step (Kingma & Ba 2015, algorithm 1) in increment form; decay decoupled (Loshchilov & Hutter 2019) or l2."""
    if scalars.l2:
        update_l2(p, g, m, v, n, scalars)
    else:
        update_decoupled(p, g, m, v, n, scalars)
