"""One clipped step of Adam over one or more parts: one norm over all of them, then each part's update by its own rule.

Norm blocks, chunks and threads' work are counted from the beginning of each part, so what a part becomes depends on the
others through the clip scale alone.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp
from cylora.kernels._loops cimport BLOCK, CHUNK, AdamRule, AdamScalars
from cylora.kernels.dispatch cimport loops
from cylora.kernels.threads cimport close_team, open_team, share

# One thread's work in microseconds for each element, inside the caches: what a second thread is worth is judged by it.
cdef double NORM_US = 0.05e-3, UPDATE_US = 0.3e-3
# The same with what surrounds a step, and where little of it is in a cache.
cdef double STEP_US = 1.0, ELEMENT_US = 0.4e-3


cdef double expected_us(Py_ssize_t n) noexcept nogil:
    return STEP_US + ELEMENT_US * n


cdef extern from *:
    """
    /* The noise that this thread drew last. Of thousands of adapters most are at the same step, and draw the same. */
    static __thread uint32_t cylora_noise[256];  /* CHUNK */
    static __thread uint64_t cylora_noise_key;
    static __thread int cylora_has_noise;
    """
    uint32_t* NOISE "cylora_noise"
    uint64_t noise_key "cylora_noise_key"
    bint has_noise "cylora_has_noise"


cdef inline Py_ssize_t _blocks_of(const Part* part) noexcept nogil:
    return 0 if part.is_left_out else (part.step.n + BLOCK - 1) // BLOCK


cdef void lay_out(Task* task) noexcept nogil:
    cdef Part* part
    cdef Py_ssize_t i
    task.blocks = task.n = 0
    for i in range(task.count):
        part = &task.parts[i]
        part.first_block = task.blocks
        part.step.block_sums = task.block_sums + task.blocks
        task.blocks += _blocks_of(part)
        if not part.is_left_out:
            task.n += part.step.n


cdef Py_ssize_t _part_with(const Task* task, Py_ssize_t block) noexcept nogil:
    """Index of the last part that begins at or before ``block``: as parts without blocks come before, it has that block."""
    cdef Py_ssize_t low = 0, high = task.count, middle
    while high - low > 1:
        middle = (low + high) // 2
        if task.parts[middle].first_block <= block:
            low = middle
        else:
            high = middle
    return low


cdef void _over_blocks(Task* task, Py_ssize_t first, Py_ssize_t last, bint updates) noexcept nogil:
    """Square, or update, blocks first..last-1 of those of all parts."""
    cdef Py_ssize_t i = _part_with(task, first), begin, end
    cdef Part* part
    while first < last:
        part = &task.parts[i]
        begin = first - part.first_block
        end = min(last - part.first_block, _blocks_of(part))
        if begin < end:
            if updates:
                loops.update_blocks(&part.step, begin, end)
            else:
                loops.square_blocks(&part.step, begin, end)
            first += end - begin
        i += 1


cdef void _square(void* context, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    _over_blocks(<Task*> context, first, last, False)


cdef void _update(void* context, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    _over_blocks(<Task*> context, first, last, True)


cdef void _find_nonfinite(Task* task) noexcept nogil:
    cdef Py_ssize_t found, offset, i
    cdef int j
    for i in range(task.count):
        if task.parts[i].is_left_out:
            continue
        gradient = &task.parts[i].step.gradient
        offset = 0
        for j in range(gradient.count):
            piece = &gradient.pieces[j]
            found = loops.first_nonfinite(piece.start, piece.n, piece.kind)
            if found >= 0:
                task.nonfinite_part, task.nonfinite_index = i, offset + found
                task.nonfinite_value = loops.value_at(piece.start, found, piece.kind)
                return
            offset += piece.n


cdef void _finish_norm(Task* task) noexcept nogil:
    task.norm = loops.norm_of_blocks(task.block_sums, task.blocks, task.divisor)
    task.nonfinite_part = -1
    if task.norm - task.norm != 0.0:
        _find_nonfinite(task)


cdef void measure(Task* task) noexcept nogil:
    _square(task, 0, task.blocks)
    _finish_norm(task)


cdef inline bint _agree(const Task* task, Py_ssize_t i, Py_ssize_t j) noexcept nogil:
    """Whether part j takes part in this step, as part i does, and has the same scalars."""
    a, b = &task.parts[i], &task.parts[j]
    return (
        not b.is_left_out and a.t == b.t and a.rate_factor == b.rate_factor and a.ascends == b.ascends
        and memcmp(&a.rule, &b.rule, sizeof(AdamRule)) == 0)


cdef inline const uint32_t* _noise_of(uint64_t key) noexcept nogil:
    global noise_key, has_noise
    if not has_noise or noise_key != key:
        loops.draw_noise(NOISE, CHUNK, key)
        noise_key, has_noise = key, True
    return NOISE


cdef void _derive_scalars(Task* task) noexcept nogil:
    """Count the step and derive each part's scalars, which as a rule are those of one of the two parts before: B's of A's
    or, where the two learn at different rates, of the last B's."""
    cdef double clip = loops.clip_scale(task.norm, task.max_norm, task.divisor)
    cdef AdamScalars* scalars
    cdef Py_ssize_t i
    for i in range(task.count):
        part = &task.parts[i]
        if part.is_left_out:
            continue
        part.t += 1
        scalars = &part.step.scalars
        if i > 0 and _agree(task, i, i - 1):
            scalars[0] = task.parts[i - 1].step.scalars
        elif i > 1 and _agree(task, i, i - 2):
            scalars[0] = task.parts[i - 2].step.scalars
        else:
            loops.adam_scalars(
                scalars, &part.rule, task.rate * part.rate_factor, -clip if part.ascends else clip, part.t)
            scalars.average_weight = <float> task.average_weight
        if task.needs_noise:
            part.step.noise = _noise_of(scalars.noise_key)


cdef void carry_out(Task* task) noexcept nogil:
    cdef bint has_team = task.threads > 1 and open_team(task.threads, task.n * (NORM_US + UPDATE_US))
    if has_team:
        share(_square, task, task.blocks, 4)
        _finish_norm(task)
    else:
        measure(task)
    task.is_applied = task.norm <= task.norm_limit
    if task.is_applied:
        _derive_scalars(task)
        if has_team:
            share(_update, task, task.blocks, 1)
        else:
            _update(task, 0, task.blocks)
    if has_team:
        close_team()
