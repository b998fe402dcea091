"""Clip + Adam over one flat vector with everything prepared: the object a trainer calls once for each step.

A call has two phases. Phase 1 reads: it borrows and checks the gradients, asks the schedule for the rate, makes room for
the record and the record itself, takes the norm. It may refuse by raising. Phase 2 writes and cannot fail: update, record,
count. Python code, and with it a signal handler, runs only in phase 1, so a step happens wholly or not at all.
"""

import os

from cpython.buffer cimport PyBuffer_Release, Py_buffer
from cpython.float cimport PyFloat_CheckExact
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_SET_ITEM
from libc.math cimport exp
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from cylora.kernels._fetch cimport LINE, fetch
from cylora.kernels._fpenv cimport fp_enter, fp_leave
from cylora.kernels._loops cimport BLOCK, CHUNK, EIGHT_BIT, FLOAT32, AdamRule, Moments, Piece
from cylora.kernels.buffers cimport acquire_gradient, overlap, takes_gradient
from cylora.kernels.dispatch cimport loops
from cylora.kernels.kept cimport KeptState
from cylora.kernels.task cimport Part, carry_out, lay_out, measure

from cylora.errors import InputError, StateError, TrainerBusyError

cdef extern from *:
    """
    #define cylora_alloc(type, items) (type)->tp_alloc((type), (items))
    #define cylora_set_float(object, value) (((PyFloatObject *) (object))->ob_fval = (value))
    """
    object allocate "cylora_alloc"(PyTypeObject* kind, Py_ssize_t items)
    void set_float "cylora_set_float"(PyObject* number, double value) noexcept

cdef extern from "Python.h":
    void untrack "PyObject_GC_UnTrack"(PyObject* record) noexcept


cdef int64_t fork_count = 0


def _count_fork():
    global fork_count
    fork_count += 1


os.register_at_fork(after_in_child=_count_fork)

cdef enum:
    # Elements up to which the GIL stays held: at most some 5 us. Letting go and retaking it would cost 0.05 us, a tenth of
    # a step of a small adapter, and other threads could do nothing in between.
    GIL_SIZE = 8192


cdef class PreparedAdam:
    """Adam state over the flat vector ``parameters`` (written), with its ``moments`` (written).

    ``moments`` is (kind, m, v, exponents of m, exponents of v): the number of a storage kind in _loops.pxd, and the arrays'
    bytes as uint8 vectors (exponents: empty but for 8-bit moments). ``parts``: (start, size, factor on the rate, weight
    decay) of what is trained, in the order of the vector; None is one part, everything. The moments are those of the parts,
    one after the other. ``average``: where a running average of the parameters is kept (written), of the same length.
    ``shape_a`` and ``shape_b`` are those of the two matrices that lie one after the other in the vector when gradients come
    as a pair; without them there is only the flat form. ``skips``: a step whose gradient cannot be applied is recorded as
    skipped, not refused. A subclass gives the answers to what is out of the ordinary: ``refusal(norm, limit)``,
    ``to_loss(x)``, ``to_rate(x)``, ``too_fast(rate, limit)``.
    """

    def __cinit__(self):
        # Also of an object that `__init__` has not seen, or has refused, the properties can be read.
        self.task.parts = &self.whole
        self.task.nonfinite_part = -1

    def __init__(
        self, float[::1] parameters not None, tuple moments not None, *,
        double beta1, double beta2, double eps, double weight_decay, bint l2, double max_grad_norm, double norm_limit,
        double max_rate=1e6, int64_t t=0, int threads=1, bint skips=False, shape_a=(-1, -1), shape_b=(-1, -1),
        parts=None, float[::1] average=None, double average_weight=0.0,
    ):
        cdef uint8_t[::1] m, v, m_exponents, v_exponents
        cdef Py_ssize_t i
        cdef int kind
        if self.task.count != 0:
            raise TypeError("PreparedAdam is initialised once")
        if parameters.shape[0] == 0:
            raise ValueError("parameters must not be empty")
        if average is not None and average.shape[0] != parameters.shape[0]:
            raise ValueError("average must have the length of parameters")
        self.n = parameters.shape[0]
        self.rows_a, self.columns_a = shape_a
        self.rows_b, self.columns_b = shape_b
        self._lay_parts(
            [(0, self.n, 1.0, weight_decay)] if parts is None else parts,
            AdamRule(beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0, l2=l2), t)
        kind, m, v, m_exponents, v_exponents = moments
        self._lend_moments(kind, m, v, m_exponents, v_exponents)
        self._keep_apart(&parameters[0], 4 * self.n)
        if average is not None:
            self._keep_apart(&average[0], 4 * self.n)
            self.average = &average[0]
        for i in range(self.task.count):
            self.task.parts[i].step.p = &parameters[self.task.parts[i].start]
            if average is not None:
                self.task.parts[i].step.average = &average[self.task.parts[i].start]
        self._kept = (parameters.base, moments, None if average is None else average.base)
        self.task.max_norm, self.task.norm_limit, self.max_rate = max_grad_norm, norm_limit, max_rate
        self.task.threads, self.task.divisor, self.skips = threads, 1.0, skips
        self.task.average_weight = average_weight
        self.parameters = &parameters[0]

    def __dealloc__(self):
        if self.task.parts != &self.whole:
            free(self.task.parts)
        free(self.task.block_sums)
        free(self.own_rules)

    @property
    def t(self):
        """Steps applied."""
        return self.task.parts[0].t

    @property
    def nonfinite_index(self):
        """Index of the first trained element of the last gradient that was not finite, or -1."""
        if self.task.nonfinite_part < 0:
            return -1
        return self.task.parts[self.task.nonfinite_part].start + self.task.nonfinite_index

    @property
    def nonfinite_value(self):
        """That element's value."""
        return self.task.nonfinite_value

    def attach(self, schedule, steady_from, record_type, history):
        """Take rates from ``schedule(step)``; record steps as ``record_type``, a tuple type of six, in ``history``.

        From step ``steady_from`` on (None: never) the rate is taken to stay what it is there, and asked for no more.

        ``history.buffers()`` gives its live arrays; ``history.make_room(capacity)`` says whether they are now others than
        those of that capacity, and is not asked any more once that is ``history.limit``.
        """
        is_tuple = isinstance(record_type, type) and issubclass(record_type, tuple)
        if not is_tuple or record_type.__itemsize__ != tuple.__itemsize__:
            raise TypeError("record_type must be a tuple type")
        self.enter()
        try:
            self._take(history.buffers())
        finally:
            self.leave()
        self.limit = -1 if history.limit is None else history.limit
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
        self._waiting = (sums.base, pending.base)
        self.pending_sums, self.pending = &sums[0], &pending[0]

    def attach_guard(self, guard, divergence, bint skips):
        """Let no step be applied whose norm is above ``guard(loss)``, which may refuse the loss by raising.

        Such a step is refused with the error ``divergence(norm, limit)``, or where ``skips`` recorded as skipped.
        """
        self.guard, self.divergence, self.skips_divergent = guard, divergence, skips

    def keep_state(self, live, copies, int64_t[::1] steps not None, int64_t every):
        """Copy ``live`` arrays into ``copies`` every so many applied steps, and back when the guard skips a step."""
        self.kept = KeptState(live, copies, steps, every)

    def lending(self, float[::1] other not None):
        """Return what lets the parameters hold ``other`` inside a ``with``, and refuses every step there."""
        if other.shape[0] != self.n:
            raise ValueError(f"other must have {self.n} elements")
        return Lent(self, other)

    def exclusively(self, function):
        """Call ``function`` while every step is refused, and return what it returns."""
        self.enter()
        try:
            return function()
        finally:
            self.leave()

    def retire(self):
        """Refuse every call from now on: another object has taken over the parameters."""
        self.retired = True

    def apply(self, gradient, double rate):
        """Do one step with a flat gradient at ``rate``, unrecorded; return the norm before clipping."""
        cdef uint64_t fp
        self.enter()
        try:
            if not 0.0 <= rate <= self.max_rate:
                rate = self.to_rate(rate)
            self._borrow(gradient, None)
            self.task.rate, self.task.divisor = rate, 1.0
            fp = fp_enter()
            self._carry_out()
            fp_leave(fp)
            if not self.task.is_applied and not self.skips:
                raise self.refused()
            return self.task.norm
        finally:
            self.leave()

    def run_step(self, loss, grad_a, grad_b, bint accumulated=False):
        """Do one scheduled, recorded step, report it if it is time to, and return its record.

        ``accumulated`` says that the gradient is what `accumulate` added up: then the step takes its mean, and that of
        the losses instead of ``loss``. Otherwise nothing may be waiting there. The floating-point state is the standard
        one while the schedule runs.
        """
        cdef uint64_t fp = fp_enter()
        try:
            self.begin(loss, grad_a, grad_b, accumulated)
            try:
                self._carry_out()
                record = self.commit()
                if record is None:
                    raise self.refused()
            finally:
                self.leave()
        finally:
            fp_leave(fp)
        if self.report_every > 0:
            self.announce(record)
        return record

    def run_overridden(self, loss, grad_a, grad_b, bint accumulated, tuple overrides not None):
        """Do what `run_step` does, for this step alone with ``overrides``.

        They are (rate or -1 for the schedule's, beta1, beta2, eps, weight decays of the parts or None, max_norm,
        norm_limit, largest rate).
        """
        if self.busy:
            self.enter()  # raises: the step under way has its own
        self.overrides = overrides
        try:
            return self.run_step(loss, grad_a, grad_b, accumulated)
        finally:
            self.overrides = None

    def accumulate(self, float[::1] total not None, loss, grad_a, grad_b, double weight):
        """Add ``weight`` times the gradients to ``total`` (written; starts from zero when no micro-batch waits)."""
        cdef double loss_value, norm
        cdef Py_ssize_t offset, k, n = self.n
        cdef uint64_t fp
        cdef int i
        self.enter()
        try:
            if self.pending == NULL or total.shape[0] != n:
                raise ValueError(f"attach_pending comes before accumulate, and total must have {n} elements")
            self._borrow(grad_a, grad_b)
            for i in range(self.held):
                if overlap(self.grads[i].buf, self.grads[i].len, &total[0], 4 * n):
                    raise InputError("gradients must not overlap the trainer's accumulation buffer in memory")
            fp = fp_enter()
            try:
                loss_value = loss if PyFloat_CheckExact(loss) else self.to_loss(loss)
                fp_enter()  # again: a loss's __float__ may have changed the state
                self.task.divisor = 1.0
                norm = self._measure()
                # Whatever the clipping, the weighted gradient itself must fit float32.
                if not norm * max(weight, 1.0) <= 2.0**63:
                    raise self.refusal(norm * weight)
                with nogil:
                    if self.pending[0] == 0:
                        memset(&total[0], 0, 4 * n)
                    for k in range(self.task.count):  # what is not trained is not read: it stays zero
                        part = &self.task.parts[k]
                        offset = part.start
                        for i in range(part.step.gradient.count):
                            piece = &part.step.gradient.pieces[i]
                            loops.accumulate(&total[offset], piece.start, piece.n, piece.kind, weight)
                            offset += piece.n
                if self.pending[0] == 0:
                    self.pending_sums[0] = self.pending_sums[1] = 0.0
                self.pending_sums[0] += weight * loss_value
                self.pending_sums[1] += weight
                self.pending[0] += 1
            finally:
                fp_leave(fp)
        finally:
            self.leave()

    # ------------------------------------------------------------------ one step's parts, in their order

    cdef int enter(self) except -1:
        if self.busy and self.fork_count != fork_count:
            raise StateError(
                "this process was forked while another thread was in a step of this trainer: its parameters may be half "
                "updated; make a new trainer and load a state")
        if self.busy:
            raise TrainerBusyError(
                "this trainer is busy: a step is under way in another thread or further up this call stack")
        if self.retired:
            raise TrainerBusyError("this trainer is busy: another thread has given it another state or adapter meanwhile")
        if self.parameters == NULL:
            raise ValueError("PreparedAdam was not initialised")
        self.busy = True
        self.fork_count = fork_count
        return 0

    cdef int begin(self, object loss, object grad_a, object grad_b, bint accumulated) except -1:
        """Check and fetch all that a recorded step needs, within `fp_enter`. Writes nothing that counts; `leave` follows."""
        if self.reporting:
            raise TrainerBusyError("this trainer is busy: on_step may read it, but not step it")
        self.enter()
        try:
            self._prepare(loss, grad_a, grad_b, accumulated)
        except BaseException:
            self.leave()
            raise
        return 0

    cdef bint begin_quickly(self, object loss, object grad_a, object grad_b) except -1:
        """Do what `begin` does, or nothing and return False, where that would ask Python: for a rate, a number, memory,
        an error, or later for a report. No Python code runs here or in the step until `leave`, but the garbage collector may."""
        cdef int64_t step
        if self.busy or self.retired or self.reporting or self.record_type is None or self.guard is not None:
            return False
        if self.task.parts[0].t == 0 or self.pending == NULL or self.pending[0] != 0 or not PyFloat_CheckExact(loss):
            return False
        step = self.count[0]
        if step < self.steady_from or (step >= self.capacity and self.capacity != self.limit):
            return False
        if self.report_every > 0 and (step + 1) % self.report_every == 0:
            return False
        if not self._borrow_quickly(grad_a, grad_b):
            return False
        self.busy, self.fork_count = True, fork_count
        self.loss, self.task.divisor = loss, 1.0
        try:
            self._make_record(step, self.steady_rate)
        except BaseException:
            self.leave()
            raise
        return True

    cdef void fetch_object(self) noexcept:
        """Ask early for this object's memory: of thousands of trainers none is in a cache."""
        cdef const char* line = <const char*> <PyObject*> self
        while line < <const char*> &self.loss:
            fetch(line)
            line += LINE

    cdef void fetch_records(self) noexcept:
        """Ask early for what `begin_quickly` and `commit` read and write elsewhere."""
        cdef Py_ssize_t slot
        if self.record_type is None:
            return
        fetch(self.count)
        fetch(self.sums)
        fetch(self.pending)
        fetch(self.task.block_sums)
        slot = self.task.parts[0].t % self.capacity  # the history's own count is not here yet, and this is mostly the same
        fetch(&self.rows[3 * slot])
        fetch(&self.flags[slot])

    cdef int _prepare(self, object loss, object grad_a, object grad_b, bint accumulated) except -1:
        cdef double rate, divisor = 1.0
        cdef int64_t step
        if self.record_type is None or (accumulated and self.pending == NULL):
            raise ValueError("attach comes before run_step, and attach_pending before that of what is accumulated")
        if accumulated:
            if self.pending[0] == 0:
                raise StateError("step_accumulated needs at least one accumulated micro-batch, got none")
            divisor = self.pending_sums[1]
        elif self.pending != NULL and self.pending[0] != 0:
            raise StateError(
                f"{self.pending[0]} micro-batches wait: call step_accumulated() or discard_accumulated() first")
        self._borrow(grad_a, grad_b)
        if accumulated:
            self.loss = self.pending_sums[0] / divisor
        else:
            self.loss = loss if PyFloat_CheckExact(loss) else self.to_loss(loss)
        step = self.count[0]
        rate = self._scheduled(step) if self.overrides is None else self._override(self.overrides, step)
        if self.guard is not None:
            self._heed_guard()
        if step >= self.capacity and self.capacity != self.limit and self.history.make_room(self.capacity):
            self._take(self.history.buffers())
        if self.count[0] != step:
            raise StateError("the history changed during the step: its schedule or loss wrote to it")
        fp_enter()  # again: a callable schedule, or a loss's __float__, may have changed the state
        self.task.divisor = divisor
        self._make_record(step, rate)
        if self.task.parts[0].t == 0:
            self._begin_here()
        return 0

    cdef int _make_record(self, int64_t step, double rate) except -1:
        cdef object record
        self.task.rate, self.index = rate, step
        # tuple.__new__(record_type, (step, loss, rate, norm, exp(loss), skipped)) at a third of the time.
        record = allocate(<PyTypeObject*> self.record_type, 6)
        _put(record, 0, step)
        _put(record, 1, self.loss)
        _put(record, 2, rate)
        # Made now because later nothing may fail; `commit` sets the value. Not from a literal: that is one object for all.
        _put(record, 3, self.task.norm)
        _put(record, 4, exp(self.loss))
        _put(record, 5, False)
        # Numbers alone are in no cycle. The collector would look through thousands of records again and again.
        untrack(<PyObject*> record)
        self.record = record
        return 0

    cdef void _begin_here(self) noexcept:
        """Until a step is applied, the average and the state to go back to are those of the parameters as they are now."""
        if self.average != NULL:
            memcpy(self.average, self.parameters, self.n * sizeof(float))
        if self.kept is not None:
            self.kept.keep(0)

    cdef bint is_recordable(self) noexcept:
        """Whether the history is still as `begin` found it."""
        return self.count[0] == self.index

    cdef void _carry_out(self) noexcept:
        if self.task.n <= GIL_SIZE:
            carry_out(&self.task)
        else:
            with nogil:
                carry_out(&self.task)

    cdef object commit(self):
        """Record the step that was carried out; None if it is to be refused. Cannot fail; under the GIL, so that no reader
        meets half a record."""
        cdef object record = self.record
        cdef Py_ssize_t slot
        cdef bint skipped = not self.task.is_applied
        if skipped and not (self.skips_divergent if self._is_divergent() else self.skips):
            return None
        if self.kept is not None:
            self._roll()
        set_float(PyTuple_GET_ITEM(record, 3), self.task.norm)
        if skipped:
            _replace(record, 5, True)
        slot = self.index % self.capacity
        self.rows[3 * slot] = self.loss
        self.rows[3 * slot + 1] = self.task.rate
        self.rows[3 * slot + 2] = self.task.norm
        self.flags[slot] = skipped
        if self.index == 0:
            self.sums[2] = self.loss
        self.sums[0] += self.loss
        self.sums[1] += skipped
        self.count[0] = self.index + 1
        if self.pending != NULL:
            self.pending[0] = 0
        return record

    cdef object refused(self):
        """Return the error for a step that was not applied."""
        if self._is_divergent():
            return self.divergence(self.task.norm, self.task.norm_limit)
        return self.refusal(self.task.norm, self.task.norm_limit if not self.is_guarded else self.full_limit)

    cdef void leave(self) noexcept:
        cdef int i
        for i in range(self.held):
            PyBuffer_Release(&self.grads[i])
        self.held = 0
        if self.is_overridden or self.is_guarded:
            self._end_exceptions()
        self.record = None
        self.busy = False

    cdef int announce(self, object record) except -1:
        """Report a step, if it is time to."""
        # Not record[0]: for a subclass of tuple CPython goes by way of its __getitem__, an eighth of a small step.
        if self.report_every > 0 and (<int64_t> <object> PyTuple_GET_ITEM(record, 0) + 1) % self.report_every == 0:
            self.reporting = True
            try:
                self.report(record)
            finally:
                self.reporting = False
        return 0

    # ------------------------------------------------------------------ what is not as in every step

    cdef double _override(self, tuple overrides, int64_t step) except? -1.0:
        """Let this step have other rules, until `leave`; return its rate."""
        cdef double rate, beta1, beta2, eps, max_norm, norm_limit, max_rate
        cdef Py_ssize_t i
        rate, beta1, beta2, eps, weight_decays, max_norm, norm_limit, max_rate = overrides
        if rate < 0.0:
            rate = self._scheduled(step)
        if not rate <= max_rate:
            raise self.too_fast(rate, max_rate)
        if weight_decays is not None and len(weight_decays) != self.task.count:
            raise ValueError("weight decays must be those of the parts")
        if self.own_rules == NULL:
            self.own_rules = <AdamRule*> calloc(self.task.count, sizeof(AdamRule))
            if self.own_rules == NULL:
                raise MemoryError()
        self.own_max_norm, self.own_norm_limit = self.task.max_norm, self.task.norm_limit
        for i in range(self.task.count):
            self.own_rules[i] = self.task.parts[i].rule
        self.is_overridden = True
        for i in range(self.task.count):
            rule = &self.task.parts[i].rule
            rule.beta1, rule.beta2, rule.eps = beta1, beta2, eps
            if weight_decays is not None:
                rule.weight_decay = weight_decays[i]
        self.task.max_norm, self.task.norm_limit = max_norm, norm_limit
        return rate

    cdef int _heed_guard(self) except -1:
        cdef double limit = self.guard(self.loss)
        self.full_limit, self.is_guarded = self.task.norm_limit, True
        self.task.norm_limit = min(limit, self.full_limit)
        return 0

    cdef bint _is_divergent(self) noexcept:
        """Whether it is the guard that keeps this step from being applied."""
        return self.is_guarded and not self.task.is_applied and self.task.norm <= self.full_limit

    cdef void _roll(self) noexcept:
        """Keep the state that an applied step made; go back to the one kept after a step that the guard skipped."""
        cdef Py_ssize_t i
        cdef int64_t t
        if self.task.is_applied:
            self.kept.keep(self.task.parts[0].t)
        elif self._is_divergent():
            t = self.kept.restore()
            for i in range(self.task.count):
                self.task.parts[i].t = t

    cdef void _end_exceptions(self) noexcept:
        cdef Py_ssize_t i
        if self.is_guarded:
            self.task.norm_limit, self.is_guarded = self.full_limit, False
        if self.is_overridden:
            for i in range(self.task.count):
                self.task.parts[i].rule = self.own_rules[i]
            self.task.max_norm, self.task.norm_limit = self.own_max_norm, self.own_norm_limit
            self.is_overridden = False

    # ------------------------------------------------------------------ what they are made of

    cdef int _take(self, tuple buffers) except -1:
        cdef double[:, ::1] rows = buffers[0]
        cdef uint8_t[::1] flags = buffers[1]
        cdef double[::1] sums = buffers[2]
        cdef int64_t[::1] count = buffers[3]
        if rows.shape[0] == 0 or rows.shape[1] != 3 or flags.shape[0] != rows.shape[0] or sums.shape[0] != 3 or count.shape[0] != 1:
            raise ValueError("a history's buffers must be (capacity, 3), (capacity,), (3,) and (1,)")
        self._recorded = buffers
        self.rows, self.flags, self.sums, self.count = &rows[0, 0], &flags[0], &sums[0], &count[0]
        self.capacity = rows.shape[0]
        return 0

    cdef int _lay_parts(self, object parts, AdamRule rule, int64_t t) except -1:
        cdef Py_ssize_t end = 0, blocks = 0, i, count = len(parts)
        if count == 0:
            raise ValueError("parts must not be empty")
        if count > 1:
            several = <Part*> calloc(count, sizeof(Part))
            if several == NULL:
                raise MemoryError()
            self.task.parts = several
        self.task.count = count
        for i, (start, size, rate_factor, weight_decay) in enumerate(parts):
            part = &self.task.parts[i]
            part.start, part.step.n = start, size
            if part.start < end or part.step.n < 1 or part.step.n > self.n - part.start:
                raise ValueError(f"parts must lie one after the other in the {self.n} parameters, got {tuple(parts)}")
            end = part.start + part.step.n
            blocks += (part.step.n + BLOCK - 1) // BLOCK
            part.rule, part.rule.weight_decay, part.rate_factor, part.t = rule, weight_decay, rate_factor, t
        self.task.block_sums = <double*> calloc(blocks, sizeof(double))
        if self.task.block_sums == NULL:
            raise MemoryError()
        lay_out(&self.task)
        return 0

    cdef int _lend_moments(
        self, int kind, uint8_t[::1] m, uint8_t[::1] v, uint8_t[::1] m_exponents, uint8_t[::1] v_exponents
    ) except -1:
        cdef Py_ssize_t item = 4 if kind == FLOAT32 else 1 if kind == EIGHT_BIT else 2, offset = 0, chunk = 0, chunks = 0, i
        for i in range(self.task.count):
            chunks += (self.task.parts[i].step.n + CHUNK - 1) // CHUNK
        if m.shape[0] != v.shape[0] or m.shape[0] != self.task.n * item:
            raise ValueError("m and v must have the length of all parts of the parameters")
        if m_exponents.shape[0] != v_exponents.shape[0] or m_exponents.shape[0] != (chunks if kind == EIGHT_BIT else 0):
            raise ValueError("8-bit moments need an exponent for each chunk of 256, others none")
        self.task.needs_noise = kind != FLOAT32
        self._keep_apart(&m[0], m.shape[0])
        self._keep_apart(&v[0], v.shape[0])
        if kind == EIGHT_BIT:
            self._keep_apart(&m_exponents[0], chunks)
            self._keep_apart(&v_exponents[0], chunks)
        for i in range(self.task.count):
            part = &self.task.parts[i]
            part.step.moments = Moments(kind=kind, m=&m[offset], v=&v[offset], m_exponents=NULL, v_exponents=NULL)
            if kind == EIGHT_BIT:
                part.step.moments.m_exponents, part.step.moments.v_exponents = &m_exponents[chunk], &v_exponents[chunk]
            part.step.first_chunk = chunk
            offset += part.step.n * item
            chunk += (part.step.n + CHUNK - 1) // CHUNK
        return 0

    cdef int _borrow(self, object grad_a, object grad_b) except -1:
        cdef Piece* pieces = self.gradient.pieces
        if grad_b is None:
            acquire_gradient(grad_a, &self.grads[0], &pieces[0], "gradient", self.n, -1)
            self.gradient.count = self.held = 1
            self._check_apart("gradient", &self.grads[0])
        else:
            if self.rows_a < 0:
                raise InputError("gradients of an AdapterSet must be one Gradients or flat vector, got a pair")
            acquire_gradient(grad_a, &self.grads[0], &pieces[0], "grad_a", self.rows_a, self.columns_a)
            self.held = 1
            self._check_apart("grad_a", &self.grads[0])
            acquire_gradient(grad_b, &self.grads[1], &pieces[1], "grad_b", self.rows_b, self.columns_b)
            self.gradient.count = self.held = 2
            self._check_apart("grad_b", &self.grads[1])
        self._hand_out()
        return 0

    cdef bint _borrow_quickly(self, object grad_a, object grad_b) noexcept:
        cdef Piece* pieces = self.gradient.pieces
        cdef bint is_pair = grad_b is not None, is_apart
        cdef int i, j
        if is_pair and self.rows_a < 0:
            return False
        if not takes_gradient(
            grad_a, &self.grads[0], &pieces[0], self.rows_a if is_pair else self.n, self.columns_a if is_pair else -1
        ):
            return False
        self.gradient.count = self.held = 1
        if is_pair and takes_gradient(grad_b, &self.grads[1], &pieces[1], self.rows_b, self.columns_b):
            self.gradient.count = self.held = 2
        is_apart = self.held == 1 + is_pair
        for i in range(self.held):
            for j in range(self.regions):
                is_apart &= not overlap(self.grads[i].buf, self.grads[i].len, self.starts[j], self.sizes[j])
        if not is_apart:
            self.leave()
            return False
        self._hand_out()
        return True

    cdef void _hand_out(self) noexcept:
        """Give each part its piece, or pieces, of the gradient."""
        cdef Py_ssize_t i, start, n, taken
        cdef int j
        if self.task.parts == &self.whole and self.whole.step.n == self.n:
            self.whole.step.gradient = self.gradient
            return
        for i in range(self.task.count):
            part = &self.task.parts[i]
            start, n = part.start, part.step.n
            part.step.gradient.count = 0
            for j in range(self.gradient.count):
                piece = &self.gradient.pieces[j]
                taken = max(min(piece.n - start, n), 0)
                if taken > 0:
                    part.step.gradient.pieces[part.step.gradient.count] = Piece(
                        start=<const char*> piece.start + start * (4 if piece.kind == FLOAT32 else 2), n=taken, kind=piece.kind)
                    part.step.gradient.count += 1
                    n -= taken
                start = max(start - piece.n, 0)

    cdef void _keep_apart(self, const void* start, Py_ssize_t size) noexcept:
        self.starts[self.regions], self.sizes[self.regions] = start, size
        self.regions += 1

    cdef int _check_apart(self, str name, const Py_buffer* view) except -1:
        cdef int i
        for i in range(self.regions):
            if overlap(view.buf, view.len, self.starts[i], self.sizes[i]):
                raise InputError(f"{name} must not overlap the parameters or the optimizer's state in memory")
        return 0

    cdef double _measure(self) noexcept:
        """Norm of the borrowed gradients, which lead to the first culprit if it is not finite."""
        with nogil:
            measure(&self.task)
        return self.task.norm

    cdef double _scheduled(self, int64_t step) except? -1.0:
        if step >= self.steady_from:
            return self.steady_rate
        rate = self.schedule(step)
        if PyFloat_CheckExact(rate) and 0.0 <= <double> rate <= self.max_rate:
            return <double> rate
        return self.to_rate(rate)


cdef class Lent:
    """While inside a ``with``, the parameters of ``adam`` hold ``other``; afterwards their own values again, to the bit.

    Of compiled code because a signal handler, and with it a KeyboardInterrupt, comes between any two lines of Python.
    """

    cdef PreparedAdam adam
    cdef float[::1] other, own

    def __init__(self, PreparedAdam adam not None, float[::1] other not None):
        self.adam, self.other, self.own = adam, other, other.copy()  # whose values do not matter yet

    def __enter__(self):
        cdef size_t size = 4 * <size_t> self.adam.n
        self.adam.enter()
        memcpy(&self.own[0], self.adam.parameters, size)
        memcpy(self.adam.parameters, &self.other[0], size)

    def __exit__(self, *error):
        memcpy(self.adam.parameters, &self.own[0], 4 * <size_t> self.adam.n)
        self.adam.leave()


cdef inline void _put(object record, Py_ssize_t index, object item):
    Py_INCREF(item)
    PyTuple_SET_ITEM(record, index, item)


cdef inline void _replace(object record, Py_ssize_t index, object item):
    cdef PyObject* old = PyTuple_GET_ITEM(record, index)
    _put(record, index, item)
    Py_DECREF(<object> old)
