"""One Adam step: its scalars, and the update of parameters and moments in each form that these are stored in."""

# Below these the moments of elements without a gradient are dropped, see advance_moments.
cdef extern from *:
    """
    #define CYLORA_QUIET_M 0x1p-120f
    #define CYLORA_QUIET_V 0x1p-112f
    """
    const float QUIET_M "CYLORA_QUIET_M"
    const float QUIET_V "CYLORA_QUIET_V"


cdef double power(double base, int64_t exponent) noexcept nogil:
    """base ** exponent by squaring, so that no C library's pow has a say in the bits."""
    cdef double result = 1.0
    while exponent > 0:
        if exponent & 1:
            result = result * base
        base = base * base
        exponent >>= 1
    return result


cdef api void adam_scalars(AdamScalars* scalars, const AdamRule* rule, double rate, double clip, int64_t t) noexcept nogil:
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
    scalars.noise_key = mix(<uint64_t> t)


cdef enum:
    SPAN = 32   # elements of compact moments done at once

cdef enum:      # of a chunk
    LIVE        # has a gradient
    QUIET       # has none: every element of it is zero
    SILENT      # nor a first moment, and no l2 decay: no parameter moves but by its decay


cdef inline void advance_moments(
    float p, float g, float* m, float* v, const AdamScalars* k, bint l2, int mode
) noexcept nogil:
    """One element's moments, in increment form.

    Without a gradient they decay to 0, not for good to subnormal numbers, which take the arithmetic units up to ten times
    as long: m is dropped while its product with 1 - beta1 is normal, far below what eps (1e-30 at least) lets a parameter
    feel; v once m is gone, below 2^-112, which a later step feels only if its gradient and eps are below some 1e-16.
    """
    cdef float gi = g * k.clip_scale, mi, vi
    cdef uint32_t keep
    if l2:
        gi = gi + k.decay * p
        gi = bounded(gi)
    mi = m[0] + k.one_minus_beta1 * (gi - m[0])
    vi = v[0] + k.one_minus_beta2 * (gi * gi - v[0])
    if mode != LIVE:
        keep = 0 if mode == SILENT else <uint32_t> (fabsf(mi) >= QUIET_M) | <uint32_t> (gi != 0.0)
        mi = kept(mi, keep)
        vi = kept(vi, keep | <uint32_t> (vi >= QUIET_V))
    m[0] = mi
    v[0] = vi


cdef inline float advanced(float p, float m, float v, const AdamScalars* k, bint l2, int mode) noexcept nogil:
    """One parameter after the step whose moments are given (Kingma & Ba 2015, algorithm 1); decay decoupled (Loshchilov &
    Hutter 2019) or, in l2 mode, already in the gradient."""
    cdef float pull = 0.0 if mode == SILENT else m / (sqrtf(v) * k.root_scale + k.offset)
    return p - (pull if l2 else k.decay * p + pull)


cdef inline void update_float32(
    out_floats p, in_floats g, out_floats m, out_floats v, Py_ssize_t n, AdamScalars k, bint l2, int mode
) noexcept nogil:
    cdef float mi, vi
    cdef Py_ssize_t i
    for i in range(n):
        mi, vi = m[i], v[i]
        advance_moments(p[i], g[i], &mi, &vi, &k, l2, mode)
        m[i], v[i] = mi, vi
        p[i] = advanced(p[i], mi, vi, &k, l2, mode)


# The compact forms go SPAN elements at a time, moments first, parameters after: as one loop the many operations that
# pack and unpack stand between one division and the next in the CPU's window, and the divider waits (a third slower).

cdef inline void span_bfloat16(
    out_floats p, in_floats g, out_halves m, out_halves v, Py_ssize_t n, in_noise noise, uint32_t shift,
    const AdamScalars* k, bint l2, int mode
) noexcept nogil:
    cdef float new_m[SPAN]
    cdef float new_v[SPAN]
    cdef float mi, vi
    cdef Py_ssize_t i
    for i in range(n):
        mi, vi = from_bfloat16(m[i]), from_bfloat16(v[i])
        advance_moments(p[i], g[i], &mi, &vi, k, l2, mode)
        new_m[i], new_v[i] = mi, vi
        m[i] = m_to_bfloat16(mi, noise[i], shift)
        v[i] = v_to_bfloat16(vi, noise[i], shift)
    for i in range(n):
        p[i] = advanced(p[i], new_m[i], new_v[i], k, l2, mode)


cdef inline void update_bfloat16(
    out_floats p, in_floats g, out_halves m, out_halves v, Py_ssize_t n, in_noise noise, uint32_t shift,
    AdamScalars k, bint l2, int mode
) noexcept nogil:
    cdef Py_ssize_t i = 0
    while n - i >= SPAN:
        span_bfloat16(p + i, g + i, m + i, v + i, SPAN, noise + i, shift, &k, l2, mode)
        i += SPAN
    if i < n:
        span_bfloat16(p + i, g + i, m + i, v + i, n - i, noise + i, shift, &k, l2, mode)


cdef inline void span_eight_bit(
    out_floats p, in_floats g, out_floats m, out_floats v, Py_ssize_t n, const AdamScalars* k, bint l2, int mode
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        advance_moments(p[i], g[i], &m[i], &v[i], k, l2, mode)
    for i in range(n):
        p[i] = advanced(p[i], m[i], v[i], k, l2, mode)


cdef inline void update_eight_bit(
    out_floats p, in_floats g, uint8_t* m_codes, uint8_t* v_codes, uint8_t* m_exponent, uint8_t* v_exponent,
    Py_ssize_t n, in_noise noise, uint32_t shift, AdamScalars k, bint l2, int mode
) noexcept nogil:
    cdef float m[CHUNK]
    cdef float v[CHUNK]
    cdef uint32_t m_base = <uint32_t> m_exponent[0] << 23, v_base = <uint32_t> v_exponent[0] << 23
    cdef uint32_t largest_m = 0, largest_v = 0
    cdef Py_ssize_t i = 0
    while n - i >= SPAN:
        decode(m + i, v + i, m_codes + i, v_codes + i, SPAN, m_base, v_base)
        span_eight_bit(p + i, g + i, m + i, v + i, SPAN, &k, l2, mode)
        i += SPAN
    if i < n:
        decode(m + i, v + i, m_codes + i, v_codes + i, n - i, m_base, v_base)
        span_eight_bit(p + i, g + i, m + i, v + i, n - i, &k, l2, mode)
    for i in range(n):
        largest_m = max(largest_m, bits_of(m[i]) & 0x7fffffffu)
        largest_v = max(largest_v, bits_of(v[i]))
    m_base, v_base = base_of(largest_m, 16), base_of(largest_v, 32)
    m_exponent[0], v_exponent[0] = <uint8_t> (m_base >> 23), <uint8_t> (v_base >> 23)
    encode(m_codes, v_codes, m, v, n, m_base, v_base, noise, shift)


cdef inline void update_chunks(
    const AdamStep* step, Py_ssize_t start, in_floats g, Py_ssize_t n, bint l2, int mode
) noexcept nogil:
    """Elements [start, start + n); one chunk only where moments are compact."""
    cdef const Moments* s = &step.moments
    cdef Py_ssize_t chunk = start // CHUNK
    cdef uint32_t shift
    if s.kind == FLOAT32:
        update_float32(step.p + start, g, <float*> s.m + start, <float*> s.v + start, n, step.scalars, l2, mode)
        return
    shift = noise_at(step.scalars.noise_key, step.first_chunk + chunk)
    if s.kind == BFLOAT16:
        update_bfloat16(
            step.p + start, g, <uint16_t*> s.m + start, <uint16_t*> s.v + start, n,
            step.noise, shift, step.scalars, l2, mode)
    else:
        update_eight_bit(
            step.p + start, g, <uint8_t*> s.m + start, <uint8_t*> s.v + start, &s.m_exponents[chunk], &s.v_exponents[chunk], n,
            step.noise, shift, step.scalars, l2, mode)


cdef bint is_clear(const void* memory, Py_ssize_t n_bytes) noexcept nogil:
    cdef const uint8_t* bytes = <const uint8_t*> memory
    cdef uint8_t any_bit = 0
    cdef Py_ssize_t i
    for i in range(n_bytes):
        any_bit |= bytes[i]
    return any_bit == 0


cdef bint is_zero(in_floats g, Py_ssize_t n) noexcept nogil:
    cdef uint32_t any_bit = 0
    cdef Py_ssize_t i
    for i in range(n):
        any_bit |= bits_of(g[i])
    return any_bit & 0x7fffffffu == 0  # signs aside


cdef void update_quiet_chunk(const AdamStep* step, Py_ssize_t start, in_floats g, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t size = 4 if step.moments.kind == FLOAT32 else 2 if step.moments.kind == BFLOAT16 else 1
    if step.scalars.l2:
        update_chunks(step, start, g, n, True, QUIET)
    elif is_clear(<const char*> step.moments.m + start * size, n * size):
        update_chunks(step, start, g, n, False, SILENT)
    else:
        update_chunks(step, start, g, n, False, QUIET)


cdef void follow(out_floats average, in_floats p, Py_ssize_t n, float weight) noexcept nogil:
    """Move a running average towards the parameters, in increment form."""
    cdef Py_ssize_t i
    for i in range(n):
        average[i] = average[i] + weight * (p[i] - average[i])


cdef api void update_blocks(const AdamStep* step, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Do the step for blocks first..last-1: any number of threads may share them.

    A chunk whose gradient is all zero is known by its place in the flat vector, however that is cut into pieces.
    """
    cdef float room[CHUNK]
    cdef Py_ssize_t start = first * BLOCK, stop = min(last * BLOCK, step.n), n, live
    cdef const float* g
    while start < stop:
        n = stop - start if step.moments.kind == FLOAT32 else min(stop - start, CHUNK)
        g = window(&step.gradient, start, &n, room, CHUNK)
        while n > 0:
            live = 0
            while live < n and (g[live] != 0.0 or not is_zero(g + live, min(n - live, CHUNK))):
                live += CHUNK
            live = min(live, n)
            if live == 0:
                live = min(n, CHUNK)
                update_quiet_chunk(step, start, g, live)
            elif step.scalars.l2:
                update_chunks(step, start, g, live, True, LIVE)
            else:
                update_chunks(step, start, g, live, False, LIVE)
            if step.average != NULL:  # while the parameters are in the cache
                follow(step.average + start, step.p + start, live, step.scalars.average_weight)
            start += live
            g += live
            n -= live
