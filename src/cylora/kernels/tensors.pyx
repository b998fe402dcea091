"""Clip + Adam over many separate tensors of another library in one call; their moments lie in flat vectors.

A step looks at where the tensors, their gradients and their state lie now, since the other library may have moved them,
and compares that with what was prepared: if anything is not as it was, `apply` returns None and the caller prepares anew.
Phase 1 reads and may refuse; phase 2 writes all tensors or none and cannot fail.
"""

from cpython.dict cimport PyDict_Next, PyDict_Size
from cpython.exc cimport PyErr_Clear
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject, PyTypeObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport UINTPTR_MAX, int64_t, uint64_t
from libc.stdlib cimport calloc, free, qsort
from cylora.kernels._dlpack cimport DLTensor, Exchange
from cylora.kernels._fetch cimport LINE, fetch
from cylora.kernels._fpenv cimport fp_enter, fp_leave
from cylora.kernels._loops cimport BFLOAT16, BLOCK, FLOAT16, FLOAT32, AdamRule, Moments
from cylora.kernels.task cimport Part, Task, carry_out, lay_out

from cylora.errors import TrainerBusyError

cdef extern from "Python.h":
    bint is_exactly "Py_IS_TYPE"(object instance, PyTypeObject* kind) noexcept

cdef extern from *:
    """
    #define cylora_reraise() (-1)
    #define cylora_keys(dict) ((const char *) ((PyDictObject *) (dict))->ma_keys)
    """
    int reraise "cylora_reraise"() except -1
    const char* keys_of "cylora_keys"(PyObject* dict) noexcept

cdef enum:                  # of DLPack
    MAJOR = 1
    CPU = 1
    FLOAT = 2
    BFLOAT = 4

cdef enum:
    GIL_SIZE = 8192         # elements up to which the GIL stays held, as in adam.pyx
    LAST_COUNT = 1 << 24    # a float32 counts no further: one more is rounded back
    AHEAD = 8               # tensors between asking for the objects that belong to one and looking at them

cdef struct Slot:           # a tensor
    PyObject* tensor
    PyObject* entry         # its state: a dict of three tensors
    PyObject* state[3]      # these: count of steps, both moments
    char* places[3]         # where they lie
    char* p
    Py_ssize_t n
    Py_ssize_t group
    bint has_state          # in the optimizer's
    const char* gap         # memory that its gradient lay in last time, of which nothing is written
    const char* gap_end
    const char* keys        # where the entry's own keys and values were, to be fetched and not read: it may have moved
    const char* descriptions[4]     # likewise, what the library keeps of the state's tensors and of the tensor itself

cdef struct Region:         # memory that a step writes
    const char* start
    Py_ssize_t n_bytes

cdef struct Rule:           # of a group
    AdamRule adam
    double rate
    bint ascends


cdef int _by_start(const void* a, const void* b) noexcept nogil:
    cdef size_t x = <size_t> (<const Region*> a).start, y = <size_t> (<const Region*> b).start
    return (x > y) - (x < y)


cdef inline char* _start(const DLTensor* look) noexcept:
    return <char*> look.data + look.byte_offset


cdef inline Py_ssize_t _size(const DLTensor* look) noexcept:
    """Number of elements, or -1 if they do not lie one after the other in C's order."""
    cdef int64_t size = 1
    cdef bint has_gaps = False
    cdef int d
    for d in range(look.ndim - 1, -1, -1):
        has_gaps |= look.shape[d] != 1 and look.strides[d] != size
        size *= look.shape[d]
    return -1 if has_gaps and size != 0 else size


cdef inline bint _same_shape(const DLTensor* a, const DLTensor* b) noexcept:
    cdef int d
    if a.ndim != b.ndim:
        return False
    for d in range(a.ndim):
        if a.shape[d] != b.shape[d]:
            return False
    return True


cdef inline int _kind(const DLTensor* look) noexcept:
    """How the elements are stored if they are a CPU's floats at aligned addresses, else -1."""
    cdef int kind = -1
    if look.code == FLOAT:
        kind = FLOAT32 if look.bits == 32 else FLOAT16 if look.bits == 16 else -1
    elif look.code == BFLOAT:
        kind = BFLOAT16
    if look.device_type != CPU or look.lanes != 1 or kind < 0:
        return -1
    return -1 if <size_t> _start(look) % (4 if kind == FLOAT32 else 2) else kind


cdef inline void _fetch_description(const char* shape) noexcept:
    """It is a few lines around the shape."""
    fetch(shape - LINE)
    fetch(shape)
    fetch(shape + LINE)


cdef class PreparedTensors:
    """Adam over ``tensors`` (written), in groups with a rule each, with their ``entries`` of state (written).

    ``exchange`` is the capsule that their type has as ``__dlpack_c_exchange_api__``, ``plain`` the type their gradients
    have. The tensors are distinct, float32, on the CPU and without gaps; ``groups`` says how many there are in each group.
    ``entries`` are dicts of three such tensors: the count of steps, of one element, and both moments. Nothing of all this
    overlaps. ``linked`` says which of them stand in the optimizer's state now, in that order.

    A subclass answers for what is out of the ordinary: ``packed(i, gradient)`` returns the gradient of tensor i without gaps
    and of type ``plain``, or raises; ``overlapping(i)`` and ``miscounted(i, steps)`` raise; ``refused()`` may.
    """

    cdef Exchange* exchange
    cdef object plain
    cdef tuple tensors, entries
    cdef list kept              # the tensors of the entries: who replaces one must not get its address again
    cdef list held              # the gradients of the step under way
    cdef list stepped_tensors
    cdef bint busy
    cdef bint is_laid_out
    cdef Py_ssize_t count, n_groups, n_regions, n_linked
    cdef Slot* slots
    cdef Rule* rules            # of each group
    cdef Region* regions        # by address
    cdef Py_ssize_t* order      # the linked tensors, as the optimizer's state has them
    cdef Task task              # a part for each tensor

    def __init__(self, exchange, plain not None, tuple tensors not None, tuple groups not None, tuple entries not None, *,
                 linked=(), int threads=1):
        cdef Py_ssize_t i, count = len(tensors), blocks = 0
        cdef DLTensor look
        cdef Slot* slot
        cdef int j
        if self.slots != NULL:
            raise TypeError("PreparedTensors is initialised once")
        if sum(groups) != count or len(entries) != count:
            raise ValueError("groups and entries must be of as many as there are tensors")
        self.exchange = <Exchange*> PyCapsule_GetPointer(exchange, "dlpack_exchange_api")
        if self.exchange.major != MAJOR or self.exchange.look == NULL:
            raise ValueError("the exchange must be DLPack's, of version 1")
        self.plain, self.tensors, self.entries, self.count = plain, tensors, entries, count
        self.kept, self.held = [], []
        self.slots = <Slot*> calloc(count + 1, sizeof(Slot))
        self.order = <Py_ssize_t*> calloc(count + 1, sizeof(Py_ssize_t))
        self.regions = <Region*> calloc(4 * count + 1, sizeof(Region))
        self.task.parts = <Part*> calloc(count + 1, sizeof(Part))
        if not (self.slots and self.order and self.regions and self.task.parts):
            raise MemoryError()
        self.n_groups = len(groups)
        group_of = [g for g in range(len(groups)) for _ in range(groups[g])]
        for i in range(count):
            slot = &self.slots[i]
            slot.tensor, slot.entry, slot.group = <PyObject*> tensors[i], <PyObject*> entries[i], group_of[i]
            self._look(tensors[i], &look)
            slot.p, slot.n = _start(&look), _size(&look)
            slot.keys, slot.descriptions[3] = keys_of(slot.entry), <const char*> look.shape
            if slot.n < 0 or _kind(&look) != FLOAT32:
                raise ValueError("a tensor must be of float32 on the CPU without gaps")
            blocks += (slot.n + BLOCK - 1) // BLOCK
            state = tuple(entries[i].values())
            self.kept.append(state)
            for j in range(3):
                slot.state[j] = <PyObject*> state[j]
                self._look(state[j], &look)
                slot.places[j], slot.descriptions[j] = _start(&look), <const char*> look.shape
                if _kind(&look) != FLOAT32 or _size(&look) != (slot.n if j else 1):
                    raise ValueError("state must be float32 in its tensor's shape, the count of one element")
                self._keep_apart(slot.places[j], 4 if j == 0 else 4 * slot.n)
            self._keep_apart(slot.p, 4 * slot.n)
            part = &self.task.parts[i]
            part.step.p, part.step.n = <float*> slot.p, slot.n
            part.step.moments = Moments(
                kind=FLOAT32, m=slot.places[1], v=slot.places[2], m_exponents=NULL, v_exponents=NULL)
            part.step.gradient.count, part.step.gradient.pieces[0].n = 1, slot.n
        qsort(self.regions, self.n_regions, sizeof(Region), _by_start)
        for i in linked:
            self._link(i)
        self.rules = <Rule*> calloc(self.n_groups + 1, sizeof(Rule))
        self.task.block_sums = <double*> calloc(blocks + 1, sizeof(double))
        if not (self.rules and self.task.block_sums):
            raise MemoryError()
        self.task.count, self.task.threads, self.task.rate, self.task.divisor = count, threads, 1.0, 1.0

    def __dealloc__(self):
        free(self.slots)
        free(self.order)
        free(self.regions)
        free(self.rules)
        free(self.task.parts)
        free(self.task.block_sums)

    @property
    def norm(self):
        """The last gradients' norm before clipping."""
        return self.task.norm

    @property
    def stepped(self):
        """The tensors that the last step had gradients of."""
        cdef Py_ssize_t i
        if self.stepped_tensors is None:
            self.stepped_tensors = [self.tensors[i] for i in range(self.count) if not self.task.parts[i].is_left_out]
        return self.stepped_tensors

    def apply(self, list lists not None, state, list rules not None, double max_norm, double norm_limit):
        """Do one step of all tensors that have a gradient.

        ``lists`` are the groups' tensors, ``state`` the optimizer's dict of them, ``rules`` for each group (rate, beta1,
        beta2, eps, weight_decay, ascends).

        Returns None if tensors or state are not as they were prepared; then nothing was done. Otherwise whether the step
        is done, and state of tensors that had none added. If the norm is not within ``norm_limit``, ``refused()`` is called
        and may raise; then nothing is changed.
        """
        if self.busy:
            raise TrainerBusyError("this optimizer is busy: a step is under way in another thread or further up this call stack")
        self.busy = True
        try:
            if not self._state_is_as_prepared(state) or not self._gather(lists):
                return None
            self._take_rules(rules)
            self.task.max_norm, self.task.norm_limit = max_norm, norm_limit
            self._carry_out(state)
            if not self.task.is_applied:
                self.refused()
            return self.task.is_applied
        finally:
            self.held.clear()
            self.busy = False

    @property
    def nonfinite(self):
        """(tensor, index in it, value) of the first element of the last gradients that was not finite, or None."""
        if self.task.nonfinite_part < 0:
            return None
        return self.task.nonfinite_part, self.task.nonfinite_index, self.task.nonfinite_value

    cdef int _look(self, object tensor, DLTensor* look) except -1:
        if self.exchange.look(<PyObject*> tensor, look) < 0:
            reraise()
        return 0

    cdef void _keep_apart(self, const char* start, Py_ssize_t n_bytes) noexcept:
        if n_bytes > 0:
            self.regions[self.n_regions] = Region(start=start, n_bytes=n_bytes)
            self.n_regions += 1

    cdef void _link(self, Py_ssize_t i) noexcept:
        self.slots[i].has_state = True
        self.order[self.n_linked] = i
        self.n_linked += 1

    # After a backward pass these objects are in memory at best, and each leads to the next: a step would spend as long
    # waiting for them, one after the other, as on its arithmetic.

    cdef void _fetch_state(self, Py_ssize_t i) noexcept:
        cdef Slot* slot = &self.slots[i]
        cdef int j
        fetch(slot.entry)
        fetch(slot.keys)
        fetch(slot.keys + LINE)
        for j in range(3):
            fetch(slot.state[j])
            _fetch_description(slot.descriptions[j])

    cdef void _fetch_tensor(self, Py_ssize_t i) noexcept:
        fetch(self.slots[i].tensor)
        _fetch_description(self.slots[i].descriptions[3])

    cdef bint _state_is_as_prepared(self, object state) except -1:
        """Whether ``state`` holds exactly what was linked, and that lies where it lay."""
        cdef PyObject* key
        cdef PyObject* entry
        cdef PyObject* value
        cdef Py_ssize_t place = 0, inner, k = 0
        cdef DLTensor look
        cdef Slot* slot
        cdef int j
        if PyDict_Size(state) != self.n_linked:
            return False
        for k in range(min(AHEAD, self.n_linked)):
            self._fetch_state(self.order[k])
        k = 0
        while PyDict_Next(state, &place, &key, &entry):
            slot = &self.slots[self.order[k]]
            if k + AHEAD < self.n_linked:
                self._fetch_state(self.order[k + AHEAD])
            k += 1
            if key != slot.tensor or entry != slot.entry or PyDict_Size(<object> entry) != 3:
                return False
            inner = j = 0
            while PyDict_Next(<object> entry, &inner, NULL, &value):
                if value != slot.state[j]:
                    return False
                self._look(<object> value, &look)
                if _start(&look) != slot.places[j]:  # its old memory may be another's by now
                    return False
                j += 1
        return True

    cdef bint _gather(self, list lists) except -1:
        """Take the gradients; False if the tensors are not the prepared ones or have moved."""
        cdef Py_ssize_t g, j, i = 0
        cdef bint is_left_out
        cdef DLTensor look
        cdef Slot* slot
        if len(lists) != self.n_groups:
            return False
        for i in range(min(AHEAD, self.count)):
            self._fetch_tensor(i)
        i = 0
        for g in range(self.n_groups):
            tensors = lists[g]
            for j in range(len(<list?> tensors)):
                slot = &self.slots[i]
                if i >= self.count or j >= PyList_GET_SIZE(tensors):  # looking at a tensor may run code that changes the list
                    return False
                if PyList_GET_ITEM(tensors, j) != slot.tensor or slot.group != g:
                    return False
                if i + AHEAD < self.count:
                    self._fetch_tensor(i + AHEAD)
                self._look(<object> slot.tensor, &look)
                if _start(&look) != slot.p or _size(&look) != slot.n or _kind(&look) != FLOAT32:
                    return False
                gradient = (<object> slot.tensor).grad
                is_left_out = gradient is None
                if not is_left_out:
                    self._borrow(i, &look, gradient)
                if is_left_out != self.task.parts[i].is_left_out:
                    self.task.parts[i].is_left_out = is_left_out
                    self.is_laid_out = False
                i += 1
        if not self.is_laid_out:  # an error may have come before this in an earlier call
            lay_out(&self.task)
            self.is_laid_out, self.stepped_tensors = True, None
        return i == self.count

    cdef int _borrow(self, Py_ssize_t i, const DLTensor* tensor, object gradient) except -1:
        """Make ``gradient`` that of part i."""
        cdef Slot* slot = &self.slots[i]
        cdef DLTensor look
        # Memory of one element is never seen to have gaps, so torch may hold it as the negative of what it means (`is_neg`):
        # the imaginary parts of conjugate numbers, which otherwise have every other place.
        cdef int kind = -1 if slot.n == 1 else self._kind_of_gradient(gradient, tensor, &look)
        if kind < 0:
            gradient = self.packed(i, gradient)
            kind = self._kind_of_gradient(gradient, tensor, &look)
            if kind < 0:
                raise ValueError("packed must return a gradient of the tensor's shape without gaps")
        self.held.append(gradient)
        if _start(&look) < slot.gap or _start(&look) + 4 * slot.n > slot.gap_end:
            self._check_apart(i, _start(&look), slot.n * (4 if kind == FLOAT32 else 2))
        piece = &self.task.parts[i].step.gradient.pieces[0]
        piece.start, piece.kind = _start(&look), kind
        return 0

    cdef int _kind_of_gradient(self, object gradient, const DLTensor* tensor, DLTensor* look) noexcept:
        """How its elements are stored, or -1 if it is not simply memory like the tensor's."""
        if not is_exactly(gradient, <PyTypeObject*> self.plain):
            return -1
        if self.exchange.look(<PyObject*> gradient, look) < 0:  # sparse, say
            PyErr_Clear()
            return -1
        if not _same_shape(look, tensor) or _size(look) < 0 or (look.data == NULL and _size(look) > 0):
            return -1
        return _kind(look)

    cdef int _check_apart(self, Py_ssize_t i, const char* start, Py_ssize_t n_bytes) except -1:
        """Regions do not overlap, so of those that start before the gradient's end only the last can reach its start."""
        cdef Py_ssize_t low = 0, high = self.n_regions, middle
        while low < high:
            middle = (low + high) // 2
            if self.regions[middle].start < start + n_bytes:
                low = middle + 1
            else:
                high = middle
        gap = self.regions[low - 1].start + self.regions[low - 1].n_bytes if low > 0 else NULL
        if gap > start:
            self.overlapping(i)
        self.slots[i].gap = gap
        self.slots[i].gap_end = self.regions[low].start if low < self.n_regions else <const char*> UINTPTR_MAX
        return 0

    cdef int _take_rules(self, list rules) except -1:
        cdef Py_ssize_t g, i
        cdef Slot* slot
        cdef Rule* rule
        cdef Part* part
        cdef float steps
        if len(rules) != self.n_groups:
            raise ValueError("there must be a rule for each group")
        for g in range(self.n_groups):
            rule = &self.rules[g]
            rule.rate, rule.adam.beta1, rule.adam.beta2, rule.adam.eps, rule.adam.weight_decay, rule.ascends = rules[g]
        for i in range(self.count):
            slot, part = &self.slots[i], &self.task.parts[i]
            rule = &self.rules[slot.group]
            part.rule, part.rate_factor, part.ascends = rule.adam, rule.rate, rule.ascends
            steps = (<float*> slot.places[0])[0]
            if not 0.0 <= steps <= LAST_COUNT or steps != <float> <int64_t> steps:
                self.miscounted(i, steps)
            part.t = <int64_t> steps
        return 0

    cdef int _carry_out(self, object state) except -1:
        cdef Py_ssize_t i
        cdef Slot* slot
        cdef uint64_t fp
        cdef list added = [i for i in range(self.count) if not self.slots[i].has_state and not self.task.parts[i].is_left_out]
        self.task.is_applied = False
        try:
            # Before the step: hashing a tensor runs Python code, so it can be interrupted. State of zeros is as good as none.
            for i in added:
                state[self.tensors[i]] = self.entries[i]
            fp = fp_enter()
            if self.task.n <= GIL_SIZE:
                carry_out(&self.task)
            else:
                with nogil:
                    carry_out(&self.task)
            fp_leave(fp)
            if self.task.is_applied:
                for i in range(self.count):
                    slot = &self.slots[i]
                    if not self.task.parts[i].is_left_out:
                        (<float*> slot.places[0])[0] = <float> self.task.parts[i].t
                for i in added:
                    self._link(i)
        finally:
            if not self.task.is_applied:
                for i in added:
                    state.pop(self.tensors[i], None)
        return 0
