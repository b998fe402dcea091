"""Clip + Adam over one flat vector with everything prepared: the object a trainer calls once for each step.

A call has two phases. Phase 1 reads: it borrows and checks the gradients, takes their norm, asks the schedule for the
rate, makes room for the record. It may refuse by raising. Phase 2 writes and cannot fail: update, record, count. Python
code, and with it a signal handler, runs only in phase 1, so a step happens wholly or not at all.
"""

import os

from cpython.buffer cimport PyBuffer_Release, Py_buffer
from cpython.float cimport PyFloat_CheckExact
from cpython.object cimport PyTypeObject
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_SET_ITEM
from libc.math cimport exp
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint64_t
from libc.string cimport memset
from cylora.kernels._fpenv cimport fp_enter, fp_leave
from cylora.kernels._loops cimport AdamRule, AdamScalars, NormState
from cylora.kernels.buffers cimport acquire, overlap
from cylora.kernels.dispatch cimport loops

from cylora.errors import InputError, StateError, TrainerBusyError

cdef extern from *:
    """
    #define cylora_alloc(type, items) (type)->tp_alloc((type), (items))
    """
    object allocate "cylora_alloc"(PyTypeObject* kind, Py_ssize_t items)


cdef int64_t fork_count = 0


def _count_fork():
    global fork_count
    fork_count += 1


os.register_at_fork(after_in_child=_count_fork)

cdef enum:
    # Elements up to which the GIL stays held: at most some 5 us. Letting go and retaking it twice would cost 0.1 us, a
    # seventh of a step of a small adapter, and other threads could do nothing in between.
    GIL_SIZE = 8192


cdef class PreparedAdam:
    """Adam state over the flat vector ``parameters`` (written), with moments ``m``, ``v`` (written) of its length.

    ``shape_a`` and ``shape_b`` are those of the two matrices that lie one after the other in the vector when gradients
    come as a pair; without them there is only the flat form. A subclass gives the answers to what is out of the ordinary:
    ``refuse(norm)``, ``to_loss(x)``, ``to_rate(x)``.
    """

    cdef float[::1] _parameters
    cdef float[::1] _m
    cdef float[::1] _v
    cdef float* p
    cdef float* m
    cdef float* v
    cdef Py_ssize_t n
    cdef Py_ssize_t rows_a, columns_a, rows_b, columns_b
    cdef AdamRule rule
    cdef double max_norm
    cdef double norm_limit
    cdef double max_rate
    cdef readonly int64_t t
    cdef readonly bint busy
    cdef int64_t fork_count
    cdef bint retired
    cdef readonly Py_ssize_t nonfinite_index
    cdef readonly double nonfinite_value
    cdef Py_buffer grads[2]
    cdef int held
    # What `attach` and `attach_pending` set: the schedule, and where steps and micro-batches are recorded.
    cdef object schedule
    cdef int64_t steady_from
    cdef double steady_rate
    cdef object record_type
    cdef object history
    cdef object report
    cdef int64_t report_every
    cdef readonly bint reporting
    cdef double[:, ::1] rows        # (capacity, 3): loss, learning rate, norm
    cdef uint8_t[::1] flags         # (capacity,): skipped
    cdef double[::1] sums           # losses, skipped steps, first loss
    cdef int64_t[::1] count         # steps ever
    cdef double[::1] pending_sums   # weighted losses, weights
    cdef int64_t[::1] pending       # micro-batches waiting

    def __init__(
        self, float[::1] parameters not None, float[::1] m not None, float[::1] v not None, *,
        double beta1, double beta2, double eps, double weight_decay, bint l2, double max_grad_norm, double norm_limit,
        double max_rate=1e6, int64_t t=0, shape_a=(-1, -1), shape_b=(-1, -1),
    ):
        if self.p != NULL:
            raise TypeError("PreparedAdam is initialised once")
        if m.shape[0] != parameters.shape[0] or v.shape[0] != parameters.shape[0]:
            raise ValueError("m and v must have the length of parameters")
        if parameters.shape[0] == 0:
            raise ValueError("parameters must not be empty")
        self.rows_a, self.columns_a = shape_a
        self.rows_b, self.columns_b = shape_b
        self._parameters, self._m, self._v = parameters, m, v
        self.m, self.v = &m[0], &v[0]
        self.n = parameters.shape[0]
        self.pending_sums = self.pending = None  # a memoryview never assigned is not None, but NULL
        self.rule = AdamRule(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, l2=l2)
        self.max_norm, self.norm_limit, self.max_rate = max_grad_norm, norm_limit, max_rate
        self.t = t
        self.nonfinite_index = -1
        self.p = &parameters[0]

    def attach(self, schedule, steady_from, record_type, history):
        """Take rates from ``schedule(step)``; record steps as ``record_type``, a tuple type of six, in ``history``.

        From step ``steady_from`` on (None: never) the rate is taken to stay what it is there, and asked for no more.

        ``history.buffers()`` gives its live arrays; ``history.make_room(capacity)`` says whether they are now others than
        those of that capacity.
        """
        is_tuple = isinstance(record_type, type) and issubclass(record_type, tuple)
        if not is_tuple or record_type.__itemsize__ != tuple.__itemsize__:
            raise TypeError("record_type must be a tuple type")
        self._enter()
        try:
            self._take(history.buffers())
        finally:
            self._leave()
        self.steady_from = INT64_MAX if steady_from is None else steady_from
        self.steady_rate = 0.0 if steady_from is None else self.to_rate(schedule(steady_from))
        self.schedule, self.record_type, self.history = schedule, record_type, history

    def attach_report(self, report, int64_t every):
        """Call ``report(record)`` after every so many steps (0: never); it may read, but not step."""
        self.report, self.report_every = report, every

    def attach_pending(self, double[::1] sums not None, int64_t[::1] pending not None):
        """Count micro-batches and sum their weighted losses and weights here."""
        if sums.shape[0] != 2 or pending.shape[0] != 1:
            raise ValueError("sums must be (2,), pending (1,)")
        self.pending_sums, self.pending = sums, pending

    def exclusively(self, function):
        """Call ``function`` while every step is refused, and return what it returns."""
        self._enter()
        try:
            return function()
        finally:
            self._leave()

    def retire(self):
        """Refuse every call from now on: another object has taken over the parameters."""
        self.retired = True

    def apply(self, gradient, double rate):
        """Do one step with a flat gradient at ``rate``, unrecorded; return the norm before clipping."""
        cdef double norm
        cdef uint64_t fp
        self._enter()
        try:
            if not 0.0 <= rate <= self.max_rate:
                rate = self.to_rate(rate)
            self._borrow(gradient, None)
            fp = fp_enter()
            try:
                norm = self._measure()
                if not norm <= self.norm_limit:
                    self.refuse(norm)
                    return norm
                self._update(rate, norm, 1.0)
                return norm
            finally:
                fp_leave(fp)
        finally:
            self._leave()

    def run_step(self, loss, grad_a, grad_b, bint accumulated=False):
        """Do one scheduled, recorded step, report it if it is time to, and return its record.

        ``accumulated`` says that the gradient is what `accumulate` added up: then the step takes its mean, and that of
        the losses instead of ``loss``. Otherwise nothing may be waiting there. The floating-point state is the standard
        one while the schedule runs.
        """
        cdef int64_t step
        if self.reporting:
            raise TrainerBusyError("this trainer is busy: on_step may read it, but not step it")
        record = self._step(loss, grad_a, grad_b, accumulated, &step)
        if self.report_every > 0 and (step + 1) % self.report_every == 0:
            self.reporting = True
            try:
                self.report(record)
            finally:
                self.reporting = False
        return record

    cdef object _step(self, object loss, object grad_a, object grad_b, bint accumulated, int64_t* index):
        cdef double norm, rate, loss_value, divisor = 1.0
        cdef int64_t step
        cdef Py_ssize_t slot
        cdef bint skipped = False
        cdef uint64_t fp
        self._enter()
        try:
            if self.record_type is None or (accumulated and self.pending is None):
                raise ValueError("attach comes before run_step, and attach_pending before that of what is accumulated")
            if accumulated:
                if self.pending[0] == 0:
                    raise StateError("step_accumulated needs at least one accumulated micro-batch, got none")
                divisor = self.pending_sums[1]
            elif self.pending is not None and self.pending[0] != 0:
                raise StateError(
                    f"{self.pending[0]} micro-batches wait: call step_accumulated() or discard_accumulated() first")
            self._borrow(grad_a, grad_b)
            fp = fp_enter()
            try:
                if accumulated:
                    loss_value = self.pending_sums[0] / divisor
                else:
                    loss_value = loss if PyFloat_CheckExact(loss) else self.to_loss(loss)
                step = self.count[0]
                rate = self._scheduled(step)
                if step >= self.rows.shape[0] and self.history.make_room(self.rows.shape[0]):
                    self._take(self.history.buffers())
                if self.count[0] != step:
                    raise StateError("the history changed during the step: its schedule or loss wrote to it")
                fp_enter()  # again: a callable schedule, or a loss's __float__, may have changed the state
                norm = self._measure() / divisor
                if not norm <= self.norm_limit:
                    self.refuse(norm)
                    skipped = True
                slot = step % self.rows.shape[0]
                record = self._record(step, loss_value, rate, norm, skipped)
                if not skipped:
                    self._update(rate, norm, divisor)
                # Under the GIL, so that no reader meets half a record.
                self.rows[slot, 0] = loss_value
                self.rows[slot, 1] = rate
                self.rows[slot, 2] = norm
                self.flags[slot] = skipped
                if step == 0:
                    self.sums[2] = loss_value
                self.sums[0] += loss_value
                self.sums[1] += skipped
                self.count[0] = step + 1
                if self.pending is not None:
                    self.pending[0] = 0
                index[0] = step
                return record
            finally:
                fp_leave(fp)
        finally:
            self._leave()

    def accumulate(self, float[::1] total not None, loss, grad_a, grad_b, double weight):
        """Add ``weight`` times the gradients to ``total`` (written; starts from zero when no micro-batch waits)."""
        cdef double loss_value, norm
        cdef Py_ssize_t offset = 0
        cdef uint64_t fp
        cdef int i
        self._enter()
        try:
            if self.pending is None or total.shape[0] != self.n:
                raise ValueError(f"attach_pending comes before accumulate, and total must have {self.n} elements")
            self._borrow(grad_a, grad_b)
            for i in range(self.held):
                if overlap(self.grads[i].buf, self.grads[i].len, &total[0], 4 * self.n):
                    raise InputError("gradients must not overlap the trainer's accumulation buffer in memory")
            fp = fp_enter()
            try:
                loss_value = loss if PyFloat_CheckExact(loss) else self.to_loss(loss)
                fp_enter()  # again: a loss's __float__ may have changed the state
                norm = self._measure()
                # Whatever the clipping, the weighted gradient itself must fit float32.
                if not norm * max(weight, 1.0) <= 2.0**63:
                    raise self.refusal(norm * weight)
                with nogil:
                    if self.pending[0] == 0:
                        memset(&total[0], 0, 4 * self.n)
                    for i in range(self.held):
                        loops.accumulate(
                            &total[offset], <const float*> self.grads[i].buf, self.grads[i].len // 4, weight)
                        offset += self.grads[i].len // 4
                if self.pending[0] == 0:
                    self.pending_sums[0] = self.pending_sums[1] = 0.0
                self.pending_sums[0] += weight * loss_value
                self.pending_sums[1] += weight
                self.pending[0] += 1
            finally:
                fp_leave(fp)
        finally:
            self._leave()

    cdef int _take(self, tuple buffers) except -1:
        cdef double[:, ::1] rows = buffers[0]
        cdef uint8_t[::1] flags = buffers[1]
        cdef double[::1] sums = buffers[2]
        cdef int64_t[::1] count = buffers[3]
        if rows.shape[0] == 0 or rows.shape[1] != 3 or flags.shape[0] != rows.shape[0] or sums.shape[0] != 3 or count.shape[0] != 1:
            raise ValueError("a history's buffers must be (capacity, 3), (capacity,), (3,) and (1,)")
        self.rows, self.flags, self.sums, self.count = rows, flags, sums, count
        return 0

    cdef int _enter(self) except -1:
        if self.busy and self.fork_count != fork_count:
            raise StateError(
                "this process was forked while another thread was in a step of this trainer: its parameters may be half "
                "updated; make a new trainer and load a state")
        if self.busy:
            raise TrainerBusyError(
                "this trainer is busy: a step is under way in another thread or further up this call stack")
        if self.retired:
            raise TrainerBusyError("this trainer is busy: another thread has given it another state or adapter meanwhile")
        if self.p == NULL:
            raise ValueError("PreparedAdam was not initialised")
        self.busy = True
        self.fork_count = fork_count
        return 0

    cdef void _leave(self) noexcept:
        cdef int i
        for i in range(self.held):
            PyBuffer_Release(&self.grads[i])
        self.held = 0
        self.busy = False

    cdef int _borrow(self, object grad_a, object grad_b) except -1:
        cdef int i
        if grad_b is None:
            acquire(grad_a, &self.grads[0], "gradient", self.n, -1, False)
            self.held = 1
        else:
            if self.rows_a < 0:
                raise InputError("gradients of an AdapterSet must be one Gradients or flat vector, got a pair")
            acquire(grad_a, &self.grads[0], "grad_a", self.rows_a, self.columns_a, False)
            self.held = 1
            acquire(grad_b, &self.grads[1], "grad_b", self.rows_b, self.columns_b, False)
            self.held = 2
        for i in range(self.held):
            if (
                overlap(self.grads[i].buf, self.grads[i].len, self.p, 4 * self.n)
                or overlap(self.grads[i].buf, self.grads[i].len, self.m, 4 * self.n)
                or overlap(self.grads[i].buf, self.grads[i].len, self.v, 4 * self.n)
            ):
                name = "gradient" if grad_b is None else "grad_b" if i else "grad_a"
                raise InputError(f"{name} must not overlap the parameters or the optimizer's state in memory")
        return 0

    cdef double _measure(self):
        """Norm of the borrowed gradients; if not finite, ``nonfinite_index`` and ``_value`` tell of the first culprit."""
        cdef double norm
        if self.n <= GIL_SIZE:
            norm = self._norm()
        else:
            with nogil:
                norm = self._norm()
        self.nonfinite_index = -1
        if norm - norm != 0.0:
            with nogil:
                self._find_nonfinite()
        return norm

    cdef double _norm(self) noexcept nogil:
        cdef NormState state
        cdef int i
        loops.norm_begin(&state)
        for i in range(self.held):
            loops.norm_add(&state, <const float*> self.grads[i].buf, self.grads[i].len // 4)
        return loops.norm_finish(&state)

    cdef void _find_nonfinite(self) noexcept nogil:
        cdef Py_ssize_t found, offset = 0
        cdef int i
        for i in range(self.held):
            found = loops.first_nonfinite(<const float*> self.grads[i].buf, self.grads[i].len // 4)
            if found >= 0:
                self.nonfinite_index = offset + found
                self.nonfinite_value = (<const float*> self.grads[i].buf)[found]
                return
            offset += self.grads[i].len // 4

    cdef double _scheduled(self, int64_t step) except? -1.0:
        if step >= self.steady_from:
            return self.steady_rate
        rate = self.schedule(step)
        if PyFloat_CheckExact(rate) and 0.0 <= <double> rate <= self.max_rate:
            return <double> rate
        return self.to_rate(rate)

    cdef object _record(self, int64_t step, double loss, double rate, double norm, bint skipped):
        """tuple.__new__(record_type, (step, loss, rate, norm, exp(loss), skipped)) at a third of the time."""
        cdef object record = allocate(<PyTypeObject*> self.record_type, 6)
        _put(record, 0, step)
        _put(record, 1, loss)
        _put(record, 2, rate)
        _put(record, 3, norm)
        _put(record, 4, exp(loss))
        _put(record, 5, skipped)
        return record

    cdef void _update(self, double rate, double norm, double divisor) noexcept:
        cdef AdamScalars scalars
        loops.adam_scalars(&scalars, &self.rule, rate, loops.clip_scale(norm, self.max_norm) / divisor, self.t + 1)
        if self.n <= GIL_SIZE:
            self._update_all(&scalars)
        else:
            with nogil:
                self._update_all(&scalars)
        self.t += 1

    cdef void _update_all(self, const AdamScalars* scalars) noexcept nogil:
        cdef Py_ssize_t n, offset = 0
        cdef int i
        for i in range(self.held):
            n = self.grads[i].len // 4
            loops.adam_update(
                self.p + offset, <const float*> self.grads[i].buf, self.m + offset, self.v + offset, n, scalars)
            offset += n


cdef inline void _put(object record, Py_ssize_t index, object item):
    Py_INCREF(item)
    PyTuple_SET_ITEM(record, index, item)
