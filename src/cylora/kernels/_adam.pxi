"""One Adam step: its scalars, and the update of parameters and moments in each form that these are stored in."""

# Never inlined: its registers would be missing in the loops that hardly ever call it.
cdef extern from *:
    """
    #define CYLORA_APART __attribute__((noinline, cold))
    static CYLORA_APART void cylora_call_apart(
        void (*function)(float *, const float *, const float *, const void *, int),
        float *p, const float *m, const float *v, const void *scalars, int l2
    ) {
        function(p, m, v, scalars, l2);
    }
    """
    void call_apart "cylora_call_apart"(
        void (*function)(float*, const float*, const float*, const void*, int) noexcept nogil,
        float* p, const float* m, const float* v, const void* scalars, int l2) noexcept nogil

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

    The step size and both bias corrections go into a parameter's quotient in one of two forms, see `paired_pull` and
    `single_pull`. The second one, for extremes, folds them into the denominator: rate/bc1 * m / (sqrt(v)/sqrt(bc2) + eps)
    = m / (sqrt(v) * root_scale + offset). A rate below 1e-18 would overflow the quotients and moves no float32 weight that
    is not itself below 1e-17: it counts as 0, where the denominator is infinite.
    """
    cdef double bc1 = 1.0 - power(rule.beta1, t)
    cdef double root_bc2 = sqrt(1.0 - power(rule.beta2, t))
    cdef double paired_rate = rate * root_bc2 / bc1, paired_eps = rule.eps * root_bc2
    scalars.clip_scale = <float> clip
    scalars.one_minus_beta1 = <float> (1.0 - rule.beta1)
    scalars.one_minus_beta2 = <float> (1.0 - rule.beta2)
    if rate < 1e-18:
        scalars.root_scale = 0.0
        scalars.offset = <float> INFINITY
    else:
        scalars.root_scale = <float> (bc1 / (rate * root_bc2))
        scalars.offset = <float> (rule.eps * bc1 / rate)
        if scalars.offset < FLT_MIN:  # eps, 1 - beta1 and 1 / rate all absurdly small: never divide 0 by 0
            scalars.offset = FLT_MIN
    scalars.paired_rate, scalars.paired_eps, scalars.paired_limit = 0.0, 1.0, 0
    # Denominators are at least eps and, roots of float32, at most 2^64 more. Then no product of two, no quotient of the rate
    # by such a product, and none by a single one leaves the normal numbers.
    if 2.0**-60 <= paired_eps <= 2.0**60 and 2.0**-60 <= paired_rate <= 2.0**60 and paired_rate <= paired_eps**2 * 2.0**120:
        scalars.paired_rate, scalars.paired_eps = <float> paired_rate, <float> paired_eps
        scalars.paired_limit = <int32_t> bits_of(<float> min(paired_rate * 2.0**120, 2.0**126))
    scalars.decay = <float> (rule.weight_decay if rule.l2 else rate * rule.weight_decay)
    scalars.l2 = rule.l2
    scalars.noise_key = mix(<uint64_t> t)


cdef enum:
    SPAN = 32   # elements done together
    PAIR = 8    # an element shares a division with the one so many before or after it
    VECTORS = 8     # at most, in a span: WIDTH is at least 4
    PRODUCTS = 4    # at most, of the denominators of pairs of vectors

cdef enum:      # of a chunk
    LIVE        # has a gradient
    QUIET       # has none: every element of it is zero
    SILENT      # nor a first moment, and no l2 decay: no parameter moves but by its decay

cdef struct Wide:   # a step's scalars, in each lane
    floats clip_scale
    floats one_minus_beta1
    floats one_minus_beta2
    floats paired_rate
    floats paired_eps
    floats decay

cdef struct Storage:    # how moments are stored, and what compact forms need
    int kind
    const uint32_t* noise
    uint32_t shift
    uint32_t m_base     # EIGHT_BIT, of the chunk
    uint32_t v_base
    Ahead ahead


cdef inline void widen_scalars(Wide* wide, const AdamScalars* k) noexcept nogil:
    wide.clip_scale = splat(k.clip_scale)
    wide.one_minus_beta1, wide.one_minus_beta2 = splat(k.one_minus_beta1), splat(k.one_minus_beta2)
    wide.paired_rate, wide.paired_eps, wide.decay = splat(k.paired_rate), splat(k.paired_eps), splat(k.decay)


cdef inline void advance_moments(floats p, floats g, floats* m, floats* v, const Wide* k, bint l2, int mode) noexcept nogil:
    """The moments of WIDTH elements, in increment form.

    Without a gradient they decay to 0, not for good to subnormal numbers, which take the arithmetic units up to ten times
    as long: m is dropped while its product with 1 - beta1 is normal, far below what eps (1e-30 at least) lets a parameter
    feel; v once m is gone, below 2^-112, which a later step feels only if its gradient and eps are below some 1e-16.
    """
    cdef floats gi = g * k.clip_scale
    if l2:
        gi = bounded(gi + k.decay * p)
    m[0] = m[0] + k.one_minus_beta1 * (gi - m[0])
    v[0] = v[0] + k.one_minus_beta2 * (gi * gi - v[0])
    if mode != LIVE:
        drop_tiny(m, v, gi, mode == SILENT, QUIET_M, QUIET_V)


cdef inline void advance_span(
    const float* p, const float* g, void* m, void* v, float* new_m, float* new_v, floats* denominators,
    const Storage* stored, const Wide* k, bint l2, int mode
) noexcept nogil:
    """The moments of a span as they are before rounding, and the denominators of its parameters. Float32 moments are in their
    place then, ``new_m`` and ``new_v``; bfloat16 ones are stored too; 8-bit codes follow when the whole chunk is known."""
    cdef floats mi, vi
    cdef int j
    if stored.kind == EIGHT_BIT:
        decode(new_m, new_v, <uint8_t*> m, <uint8_t*> v, SPAN, stored.m_base, stored.v_base)
    for j in range(SPAN // WIDTH):
        if stored.kind == BFLOAT16:
            mi, vi = load_bfloat16(<uint16_t*> m + j * WIDTH), load_bfloat16(<uint16_t*> v + j * WIDTH)
        else:
            mi, vi = load(new_m + j * WIDTH), load(new_v + j * WIDTH)
        advance_moments(load(p + j * WIDTH), load(g + j * WIDTH), &mi, &vi, k, l2, mode)
        store(new_m + j * WIDTH, mi)
        store(new_v + j * WIDTH, vi)
        denominators[j] = root(vi) + k.paired_eps
    if stored.kind == BFLOAT16:
        to_bfloat16(<uint16_t*> m, <uint16_t*> v, new_m, new_v, SPAN, stored.noise, stored.shift)


cdef inline void move(float* p, floats pull, const Wide* k, bint l2) noexcept nogil:
    """WIDTH parameters after the step (Kingma & Ba 2015, algorithm 1); decay decoupled (Loshchilov & Hutter 2019) or, in l2
    mode, already in the gradient."""
    cdef floats pi = load(p)
    store(p, pi - (pull if l2 else k.decay * pi + pull))


cdef void single_pull(float* p, const float* m, const float* v, const void* scalars, int l2) noexcept nogil:
    """Move a span where a product of two denominators, or a quotient by one, might leave the normal numbers."""
    cdef const AdamScalars* s = <const AdamScalars*> scalars
    cdef floats root_scale = splat(s.root_scale), offset = splat(s.offset)
    cdef Wide k
    cdef int j
    widen_scalars(&k, s)
    for j in range(SPAN // WIDTH):
        move(p + j * WIDTH, quotient(load(m + j * WIDTH), root(load(v + j * WIDTH)) * root_scale + offset), &k, l2)


cdef inline int first_of_pair(int pair) noexcept nogil:
    """Index among a span's vectors of the first one of a pair; the second comes PAIR elements later."""
    return pair // (PAIR // WIDTH) * (2 * PAIR // WIDTH) + pair % (PAIR // WIDTH)


cdef inline void move_span(
    float* p, const float* m, const float* v, const floats* d, const AdamScalars* s, const Wide* k, bint l2, int mode
) noexcept nogil:
    """The parameters of a span whose moments are advanced, by rate * m / denominator, with denominators d.

    Two vectors share a division: 1/x = y * 1/(xy). The unit that divides and takes roots is what a step waits for; two
    products more cost less, and two roundings of the pull. m comes from memory, where it was just stored: in registers it
    would displace others.
    """
    cdef floats products[PRODUCTS]
    cdef floats shared
    cdef int i, j, pair
    if mode == SILENT:
        for j in range(SPAN // WIDTH):
            move(p + j * WIDTH, splat(0.0), k, l2)
        return
    for pair in range(SPAN // 2 // WIDTH):
        i = first_of_pair(pair)
        products[pair] = d[i] * d[i + PAIR // WIDTH]
    if any_reaches(products, SPAN // 2 // WIDTH, s.paired_limit):
        call_apart(single_pull, p, m, v, s, l2)
        return
    for pair in range(SPAN // 2 // WIDTH):
        i = first_of_pair(pair)
        j = i + PAIR // WIDTH
        shared = quotient(k.paired_rate, products[pair])
        move(p + i * WIDTH, load(m + i * WIDTH) * (shared * d[j]), k, l2)
        move(p + j * WIDTH, load(m + j * WIDTH) * (shared * d[i]), k, l2)


cdef inline void update_run(
    float* p, const float* g, void* m_, void* v_, float* new_m, float* new_v, Py_ssize_t n,
    Storage stored, const AdamScalars* s, bint l2, int mode
) noexcept nogil:
    """Spans one after the other, each one's parameters after the next one's moments: roots and divisions wait for each other
    less. The last span is filled up with zeros. New moments go to ``new_m`` and ``new_v``, whole spans."""
    cdef Py_ssize_t item = 4 if stored.kind == FLOAT32 else 2 if stored.kind == BFLOAT16 else 1, i = 0, rest
    cdef char* m = <char*> m_
    cdef char* v = <char*> v_
    cdef floats now[VECTORS]
    cdef floats then[VECTORS]
    cdef Wide k
    cdef float room[4][SPAN]
    widen_scalars(&k, s)
    if n >= SPAN:
        advance_span(p, g, m, v, new_m, new_v, now, &stored, &k, l2, mode)
        while n - i >= 2 * SPAN:
            if stored.kind != FLOAT32:  # which has no noise, and does not look ahead
                if mode == LIVE:
                    fetch_ahead(&stored.ahead, i, item)
                stored.noise += SPAN
            m += SPAN * item
            v += SPAN * item
            advance_span(p + i + SPAN, g + i + SPAN, m, v, new_m + i + SPAN, new_v + i + SPAN, then, &stored, &k, l2, mode)
            move_span(p + i, new_m + i, new_v + i, now, s, &k, l2, mode)
            now = then
            i += SPAN
        move_span(p + i, new_m + i, new_v + i, now, s, &k, l2, mode)
        if stored.kind != FLOAT32:
            if mode == LIVE:
                fetch_ahead(&stored.ahead, i, item)
            stored.noise += SPAN
        m += SPAN * item
        v += SPAN * item
        i += SPAN
    rest = n - i
    if rest > 0:
        memset(room, 0, sizeof(room))
        memcpy(room[0], p + i, rest * sizeof(float))
        memcpy(room[1], g + i, rest * sizeof(float))
        memcpy(room[2], m, rest * item)
        memcpy(room[3], v, rest * item)
        if stored.kind == FLOAT32:
            advance_span(room[0], room[1], NULL, NULL, room[2], room[3], now, &stored, &k, l2, mode)
            move_span(room[0], room[2], room[3], now, s, &k, l2, mode)
        else:
            advance_span(room[0], room[1], room[2], room[3], new_m + i, new_v + i, now, &stored, &k, l2, mode)
            move_span(room[0], new_m + i, new_v + i, now, s, &k, l2, mode)
        memcpy(p + i, room[0], rest * sizeof(float))
        if stored.kind != EIGHT_BIT:
            memcpy(m, room[2], rest * item)
            memcpy(v, room[3], rest * item)


cdef inline void encode_chunk(
    const AdamStep* step, Py_ssize_t start, const float* m, const float* v, Py_ssize_t n, uint32_t shift
) noexcept nogil:
    """Store the new moments of a chunk as 8-bit codes, with the exponents that their largest need."""
    cdef const Moments* s = &step.moments
    cdef uint32_t largest_m = 0, largest_v = 0, m_base, v_base
    cdef Py_ssize_t i
    for i in range(n):
        largest_m = max(largest_m, bits_of(m[i]) & 0x7fffffffu)
        largest_v = max(largest_v, bits_of(v[i]))
    m_base, v_base = base_of(largest_m, 16), base_of(largest_v, 32)
    s.m_exponents[start // CHUNK], s.v_exponents[start // CHUNK] = <uint8_t> (m_base >> 23), <uint8_t> (v_base >> 23)
    encode(<uint8_t*> s.m + start, <uint8_t*> s.v + start, m, v, n, m_base, v_base, step.noise, shift)


cdef inline void update_chunks(
    const AdamStep* step, Py_ssize_t start, const float* g, Py_ssize_t n, bint l2, int mode
) noexcept nogil:
    """Elements [start, start + n); one chunk only where moments are compact."""
    cdef const Moments* s = &step.moments
    cdef float* m
    cdef float* v
    cdef float new_m[CHUNK]
    cdef float new_v[CHUNK]
    cdef Storage stored
    stored.kind, stored.noise, stored.shift, stored.m_base, stored.v_base, stored.ahead.p = FLOAT32, NULL, 0, 0, 0, NULL
    if s.kind == FLOAT32:
        m, v = <float*> s.m + start, <float*> s.v + start
        update_run(step.p + start, g, m, v, m, v, n, stored, &step.scalars, l2, mode)
        return
    if mode == LIVE and step.next != NULL:
        look_ahead(&stored.ahead, step.next, start)
    stored.noise, stored.shift = step.noise, noise_at(step.scalars.noise_key, step.first_chunk + start // CHUNK)
    if s.kind == BFLOAT16:
        stored.kind = BFLOAT16
        update_run(
            step.p + start, g, <uint16_t*> s.m + start, <uint16_t*> s.v + start, new_m, new_v, n,
            stored, &step.scalars, l2, mode)
        return
    stored.kind = EIGHT_BIT
    stored.m_base, stored.v_base = (
        <uint32_t> s.m_exponents[start // CHUNK] << 23, <uint32_t> s.v_exponents[start // CHUNK] << 23)
    update_run(
        step.p + start, g, <uint8_t*> s.m + start, <uint8_t*> s.v + start, new_m, new_v, n, stored, &step.scalars, l2, mode)
    encode_chunk(step, start, new_m, new_v, n, stored.shift)


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
