"""Reading gradients: from float32, float16 and bfloat16 in one or two pieces; their norm; adding them up."""

# Same sums in the same order twice. Left to itself GCC loads 8 floats and takes them apart again, which makes the norm a
# third slower than converting 4 straight from memory. The square of a float32 is exact in float64, so a fused multiply-add
# rounds once where product and sum round once too: the only place where one is allowed, since it is the same number.
cdef extern from *:
    """
    #define CYLORA_LANES 32
    #ifdef __AVX2__
    CYLORA_INLINE void cylora_add_squares(double *lanes, const float *g, Py_ssize_t groups) {
        __m256d s[8];
        for (int j = 0; j < 8; j++) s[j] = _mm256_loadu_pd(lanes + 4 * j);
        for (; groups > 0; groups--, g += CYLORA_LANES)
            for (int j = 0; j < 8; j++) {
                const __m256d x = _mm256_cvtps_pd(_mm_loadu_ps(g + 4 * j));
                s[j] = _mm256_fmadd_pd(x, x, s[j]);
            }
        for (int j = 0; j < 8; j++) _mm256_storeu_pd(lanes + 4 * j, s[j]);
    }
    #else
    CYLORA_INLINE void cylora_add_squares(double *lanes, const float *g, Py_ssize_t groups) {
        for (int half = 0; half < CYLORA_LANES; half += 16) { /* more sums than that do not fit the registers */
            const float *x = g + half;
            double sums[16];
            for (int j = 0; j < 16; j++) sums[j] = lanes[half + j];
            for (Py_ssize_t i = 0; i < groups; i++, x += CYLORA_LANES)
                for (int j = 0; j < 16; j++) sums[j] += (double) x[j] * (double) x[j];
            for (int j = 0; j < 16; j++) lanes[half + j] = sums[j];
        }
    }
    #endif
    """
    void add_squares_by_lanes "cylora_add_squares"(double* lanes, const float* g, Py_ssize_t groups) noexcept nogil


cdef extern from *:
    """
    /* Exact. A subnormal number gets an implicit one that is then subtracted: no operand here is subnormal in float32. */
    CYLORA_INLINE float cylora_from_float16(uint16_t half) {
        uint32_t bits = (half & 0x7fffu) << 13;
        const uint32_t exponent = bits & 0x0f800000u;
        const uint32_t special = 0u - (uint32_t) (exponent == 0x0f800000u), subnormal = 0u - (uint32_t) (exponent == 0);
        bits += (112u << 23) + (special & 112u << 23) + (subnormal & 1u << 23);
        bits = cylora_bits_of(cylora_float_of(bits) - cylora_float_of(subnormal & 113u << 23));
        return cylora_float_of(bits | (half & 0x8000u) << 16);
    }
    """
    float from_float16 "cylora_from_float16"(uint16_t half) noexcept nogil


# The CPU's own instruction where there is one: as exact, in a third of the time.
cdef extern from *:
    """
    #ifdef __F16C__
    CYLORA_INLINE Py_ssize_t cylora_widen_8(float *wide, const uint16_t *half, Py_ssize_t n) {
        Py_ssize_t i = 0;
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(wide + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (half + i))));
        return i;
    }
    #else
    CYLORA_INLINE Py_ssize_t cylora_widen_8(float *wide, const uint16_t *half, Py_ssize_t n) { return 0; }
    #endif
    """
    Py_ssize_t widen_8 "cylora_widen_8"(float* wide, const uint16_t* half, Py_ssize_t n) noexcept nogil


cdef void widen(out_floats wide, const void* narrow, Py_ssize_t n, int kind) noexcept nogil:
    cdef const uint16_t* half = <const uint16_t*> narrow
    cdef Py_ssize_t i
    if kind == BFLOAT16:
        for i in range(n):
            wide[i] = from_bfloat16(half[i])
    elif kind == FLOAT16:
        for i in range(widen_8(wide, half, n), n):
            wide[i] = from_float16(half[i])
    else:
        memcpy(wide, narrow, n * sizeof(float))


cdef inline Py_ssize_t size_of(int kind) noexcept nogil:
    return 4 if kind == FLOAT32 else 1 if kind == EIGHT_BIT else 2


cdef const float* window(
    const Gradient* gradient, Py_ssize_t start, Py_ssize_t* n, float* room, Py_ssize_t room_size
) noexcept nogil:
    """Elements [start, start + n) as float32: where they lie, or in ``room``, with n lowered to what there is at once.

    That is a multiple of CHUNK, as ``room_size`` is, or all that was asked for: no chunk is cut, wherever the pieces meet.
    """
    cdef const Piece* piece = &gradient.pieces[0]
    cdef Py_ssize_t begin = start, wanted = n[0], part, filled = 0
    while begin >= piece.n:
        begin -= piece.n
        piece += 1
    part = piece.n - begin
    if piece.kind == FLOAT32:
        if part >= wanted:
            return <const float*> piece.start + begin
        if part >= CHUNK:
            n[0] = part // CHUNK * CHUNK
            return <const float*> piece.start + begin
    if wanted > room_size:
        wanted = n[0] = room_size
    while filled < wanted:
        part = min(piece.n - begin, wanted - filled)
        widen(room + filled, <const char*> piece.start + begin * size_of(piece.kind), part, piece.kind)
        filled += part
        begin = 0
        piece += 1
    return room


cdef double fold(const double* lanes) noexcept nogil:
    """Sum of the lanes as a fixed tree: 32 -> 16 -> 8 -> 4 -> 2 -> 1."""
    cdef double half[16]
    cdef int j
    for j in range(16):
        half[j] = lanes[j] + lanes[j + 16]
    for j in range(8):
        half[j] = half[j] + half[j + 8]
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
        add_squares_by_lanes(lanes, g + i, (n - i) // LANES)
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


cdef api void norm_add(NormState* state, const void* g, Py_ssize_t n, int kind) noexcept nogil:
    """Append g[0:n] to the vector whose squares are being summed."""
    cdef float room[CHUNK]
    cdef const float* wide
    cdef Py_ssize_t part
    cdef int j
    while n > 0:
        part = min(n, BLOCK - state.filled)
        wide = <const float*> g
        if kind != FLOAT32:
            part = min(part, CHUNK)
            widen(room, g, part, kind)
            wide = room
        add_squares(state.lanes, state.filled % LANES, wide, part)
        state.filled += part
        if state.filled == BLOCK:
            state.total += fold(state.lanes)
            for j in range(LANES):
                state.lanes[j] = 0.0
            state.filled = 0
        g = <const char*> g + part * size_of(kind)
        n -= part


cdef api double norm_finish(const NormState* state) noexcept nogil:
    """L2 norm of what was appended. NaN or infinite if and only if an element was: no finite sum overflows float64."""
    cdef double total = state.total
    if state.filled:
        total += fold(state.lanes)
    return sqrt(total)


cdef enum:
    PAGE = 1024         # float32 in a page of memory
    FETCHED = 1 << 18   # parameters up to which a step may find its memory in a cache, or put it there


cdef inline void fetch_page(const void* memory) noexcept nogil:
    fetch(memory)
    fetch(<const char*> memory + LINE)


cdef void fetch_pages(const AdamStep* step, Py_ssize_t start, Py_ssize_t stop) noexcept nogil:
    """Ask early for the first lines of each page that the update of elements [start, stop) will touch.

    After a forward and backward pass all of it is in memory at best. A CPU's own prefetching ends with a page: where the next
    one lies, and that it is wanted, is found out by waiting.
    """
    cdef Py_ssize_t item = size_of(step.moments.kind)
    while start < stop:
        fetch_page(step.p + start)
        fetch_page(<const char*> step.moments.m + start * item)
        fetch_page(<const char*> step.moments.v + start * item)
        start += PAGE


cdef struct Ahead:  # where what another step will look at soon begins
    const char* p
    const char* m
    const char* v
    const char* g
    Py_ssize_t g_item


cdef inline void look_ahead(Ahead* ahead, const AdamStep* next, Py_ssize_t start) noexcept nogil:
    """Find what ``next`` will look at from element ``start`` on."""
    cdef Py_ssize_t item = size_of(next.moments.kind), begin = start
    cdef const Piece* piece = &next.gradient.pieces[0]
    if start >= next.n:
        return
    if begin >= piece.n and next.gradient.count > 1:
        begin -= piece.n
        piece += 1
    ahead.g_item = size_of(piece.kind)
    ahead.p, ahead.g = <const char*> (next.p + start), <const char*> piece.start + begin * ahead.g_item
    ahead.m, ahead.v = <const char*> next.moments.m + start * item, <const char*> next.moments.v + start * item


cdef inline void fetch_ahead(const Ahead* ahead, Py_ssize_t i, Py_ssize_t item) noexcept nogil:
    """Ask for 32 elements from the i-th on, so few at a time that no request waits for another.

    Moments are taken to have ``item`` bytes, as this step's: of a larger kind only some lines are asked for.
    """
    if ahead.p == NULL:
        return
    fetch(ahead.p + 4 * i)
    fetch(ahead.p + 4 * i + LINE)
    fetch(ahead.m + item * i)
    fetch(ahead.v + item * i)
    fetch(ahead.g + ahead.g_item * i)
    if ahead.g_item == 4:
        fetch(ahead.g + 4 * i + LINE)


cdef api void square_blocks(const AdamStep* step, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Sum the squares of the gradient's blocks first..last-1, each on its own: any number of threads may share them."""
    cdef double lanes[LANES]
    cdef float room[8 * CHUNK]
    cdef const float* g
    cdef Py_ssize_t block, start, stop, n
    cdef int j
    for block in range(first, last):
        for j in range(LANES):
            lanes[j] = 0.0
        start, stop = block * BLOCK, min((block + 1) * BLOCK, step.n)
        if step.n <= FETCHED:
            fetch_pages(step, start, stop)
        while start < stop:
            n = stop - start
            g = window(&step.gradient, start, &n, room, 8 * CHUNK)
            add_squares(lanes, 0, g, n)
            start += n
        step.block_sums[block] = fold(lanes)


cdef api double norm_of_blocks(const double* block_sums, Py_ssize_t blocks, double divisor) noexcept nogil:
    """L2 norm of the gradient over ``divisor``, from the sums of all blocks."""
    cdef double total = 0.0
    cdef Py_ssize_t block
    for block in range(blocks):
        total += block_sums[block]
    return sqrt(total) / divisor


cdef api double value_at(const void* g, Py_ssize_t index, int kind) noexcept nogil:
    cdef float value
    widen(&value, <const char*> g + index * size_of(kind), 1, kind)
    return value


cdef api Py_ssize_t first_nonfinite(const void* g, Py_ssize_t n, int kind) noexcept nogil:
    """Index of the first NaN or infinity in g[0:n], or -1."""
    cdef uint32_t exponent = 0x7f800000u if kind == FLOAT32 else 0x7c00u if kind == FLOAT16 else 0x7f80u
    cdef uint32_t bits
    cdef Py_ssize_t i
    for i in range(n):
        bits = (<const uint32_t*> g)[i] if kind == FLOAT32 else (<const uint16_t*> g)[i]
        if bits & exponent == exponent:
            return i
    return -1


cdef api double clip_scale(double norm, double max_norm, double divisor) noexcept nogil:
    """max_norm / norm if norm > max_norm, else 1 (equality does not clip), of a gradient still to be divided."""
    return (max_norm / norm if norm > max_norm else 1.0) / divisor


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


cdef api void accumulate(float* total, const void* g, Py_ssize_t n, int kind, double weight) noexcept nogil:
    cdef float room[CHUNK]
    cdef Py_ssize_t part
    if kind == FLOAT32:
        add_scaled(total, <const float*> g, n, <float> weight)
        return
    while n > 0:
        part = min(n, CHUNK)
        widen(room, g, part, kind)
        add_scaled(total, room, part, <float> weight)
        g = <const char*> g + part * size_of(kind)
        total += part
        n -= part
