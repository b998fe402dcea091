"""One step over one flat vector: what its computation needs, and the object that prepares and records it."""

from cpython.buffer cimport Py_buffer
from libc.stdint cimport int64_t, uint8_t
from cylora.kernels._loops cimport AdamRule, Gradient
from cylora.kernels.kept cimport KeptState
from cylora.kernels.task cimport Part, Task

cdef class PreparedAdam:
    cdef Task task
    cdef Part whole                 # the only part, where there is but one
    cdef Gradient gradient          # what the caller lends, as one vector
    cdef Py_ssize_t n               # parameters, trained or not
    cdef float* parameters
    cdef float* average             # of as many, or NULL
    cdef readonly bint busy
    cdef readonly bint reporting
    cdef bint skips
    cdef bint retired
    cdef int64_t fork_count
    cdef double max_rate
    cdef Py_ssize_t rows_a, columns_a, rows_b, columns_b
    cdef Py_buffer grads[2]
    cdef int held
    cdef const void* starts[6]      # what a gradient must not overlap
    cdef Py_ssize_t sizes[6]
    cdef int regions
    # Whose memory it points into. Not as memoryviews: of thousands of trainers those would take more than all else here.
    cdef tuple _kept                # the task: parameters, moments, average
    cdef tuple _recorded, _waiting  # what comes next
    # What `attach`, `attach_report` and `attach_pending` set: the schedule, and where steps and micro-batches are recorded.
    cdef object schedule
    cdef int64_t steady_from
    cdef double steady_rate
    cdef object record_type
    cdef object history
    cdef object report
    cdef int64_t report_every
    cdef Py_ssize_t capacity
    cdef Py_ssize_t limit           # of the history, or -1: rows that are as many are never replaced by others
    cdef double* rows               # (capacity, 3): loss, learning rate, norm
    cdef uint8_t* flags             # (capacity,): skipped
    cdef double* sums               # (3,): losses, skipped steps, first loss
    cdef int64_t* count             # (1,): steps ever
    cdef double* pending_sums       # (2,): weighted losses, weights; NULL before `attach_pending`
    cdef int64_t* pending           # (1,): micro-batches waiting
    # What `attach_guard` and `keep_state` set.
    cdef object guard               # loss -> the largest norm that the step may have
    cdef object divergence          # (norm, limit) -> the error for a larger one
    cdef bint skips_divergent
    cdef KeptState kept
    # The rules that an override stands for in the step under way, and its limit without the guard.
    cdef AdamRule* own_rules        # (parts,), or NULL
    cdef double own_max_norm, own_norm_limit, full_limit
    cdef bint is_overridden, is_guarded
    cdef tuple overrides            # of the step that `run_overridden` does, or None
    # The step under way.
    cdef object record
    cdef int64_t index
    cdef double loss

    cdef int enter(self) except -1
    cdef void leave(self) noexcept
    cdef int begin(self, object loss, object grad_a, object grad_b, bint accumulated) except -1
    cdef bint begin_quickly(self, object loss, object grad_a, object grad_b) except -1
    cdef void fetch_object(self) noexcept
    cdef void fetch_records(self) noexcept
    cdef bint is_recordable(self) noexcept
    cdef object commit(self)
    cdef object refused(self)
    cdef int announce(self, object record) except -1
    cdef int _make_record(self, int64_t step, double rate) except -1
    cdef void _begin_here(self) noexcept
    cdef int _prepare(self, object loss, object grad_a, object grad_b, bint accumulated) except -1
    cdef double _override(self, tuple overrides, int64_t step) except? -1.0
    cdef int _heed_guard(self) except -1
    cdef bint _is_divergent(self) noexcept
    cdef void _roll(self) noexcept
    cdef void _end_exceptions(self) noexcept
    cdef int _take(self, tuple buffers) except -1
    cdef int _lay_parts(self, object parts, AdamRule rule, int64_t t) except -1
    cdef int _lend_moments(
        self, int kind, uint8_t[::1] m, uint8_t[::1] v, uint8_t[::1] m_exponents, uint8_t[::1] v_exponents) except -1
    cdef bint _borrow_quickly(self, object grad_a, object grad_b) noexcept
    cdef int _borrow(self, object grad_a, object grad_b) except -1
    cdef void _hand_out(self) noexcept
    cdef void _keep_apart(self, const void* start, Py_ssize_t size) noexcept
    cdef int _check_apart(self, str name, const Py_buffer* view) except -1
    cdef double _scheduled(self, int64_t step) except? -1.0
    cdef void _carry_out(self) noexcept
    cdef double _measure(self) noexcept
