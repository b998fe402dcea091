"""Thousands of trainers that threads take, step and give back by name: a round of steps without a line of Python.

For one step of a small adapter more time goes into looking at cold objects than into arithmetic. So everything here is done
for a group at a time, in passes: each asks the memory early for what the next one will look at.
"""

from cpython.dict cimport PyDict_GetItemWithError
from cpython.list cimport PyList_GET_ITEM
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_CheckExact, PyTuple_GET_ITEM
from cpython.unicode cimport PyUnicode_CheckExact
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free
from cylora.kernels._fetch cimport LINE, fetch
from cylora.kernels._fpenv cimport fp_enter, fp_leave
from cylora.kernels._loops cimport AdamStep
from cylora.kernels.adam cimport PreparedAdam
from cylora.kernels.buffers cimport fetch_shape
from cylora.kernels.task cimport Task, carry_out, expected_us
from cylora.kernels.threads cimport close_team, finish, hand_out, open_team, report

cdef extern from *:
    """
    #define cylora_claim(next, count) __atomic_fetch_add((next), (count), __ATOMIC_RELAXED)
    """
    int64_t claim "cylora_claim"(int64_t* next, int64_t count) noexcept nogil

cdef extern from "Python.h":
    unsigned long this_thread "PyThread_get_thread_ident"()
    bint is_tracked "PyObject_GC_IsTracked"(PyObject* one) noexcept
    void track "PyObject_GC_Track"(PyObject* one) noexcept
    void untrack "PyObject_GC_UnTrack"(PyObject* one) noexcept

cdef enum:
    GROUP = 64              # looked at together, carried out together, recorded together
    MAX_AHEAD = 1 << 16     # parameters of a step during which another one's memory is fetched: a longer one would displace it
    APART = 128             # bytes between what different threads write

cdef struct Group:          # of steps that several threads may share
    Task** tasks
    int64_t count
    int threads             # that do: 1, or the team
    char before[APART]
    int64_t claimed         # atomic: the next that nobody has claimed; may run past ``count``
    char after[APART]

cdef long long clock = 0    # of uses


cdef class Owned:
    """A trainer by its name, one thread's at a time.

    Attributes
    ----------
    name : str
    trainer : LoraTrainer, or None while it is on disk only.
    adam : the optimizer of ``trainer``, once that is known for good, or None.
    owner, depth : the thread that has it, or 0, and how often it has taken it.
    used, queued : when it was taken last, counted in uses of all, and when it had been as whoever looks for the least
        recently used last looked.
    is_dirty : whether memory holds something that the file does not.
    """

    def __init__(self, str name not None):
        self.name = name

    def touch(self):
        """Note that it is used now."""
        global clock
        clock += 1
        self.used = clock


def release(lock, notify, list held not None):
    """Give back what this thread has taken, and call ``notify()`` for those who wait; all under the lock.

    An interrupt may come in either; it is raised once nothing is held any more. In compiled code because one that comes as
    a function of Python begins would leave everything as it is.
    """
    cdef object interrupt = None
    if not held:
        return
    while True:
        try:
            lock.acquire()
            break
        except BaseException as error:  # out of the wait for it
            interrupt = error
    try:
        try:
            notify()
        except BaseException as error:
            interrupt = error
            notify()
        _give_back(held)
    finally:
        lock.release()
    if interrupt is not None:
        raise interrupt


cdef void _give_back(list held):
    cdef Owned one
    cdef Py_ssize_t i, n = len(held)
    for i in range(n):
        if i + 8 < n:
            fetch(PyList_GET_ITEM(held, i + 8))
        one = <Owned> PyList_GET_ITEM(held, i)
        one.depth -= 1
        if one.depth == 0:
            one.owner = 0
    held.clear()


cdef void hide(tuple lists) noexcept:
    """Keep the garbage collector from lists of thousands: a round's records have it begin a dozen times (up to CPython 3.11),
    and it would look at each object in them."""
    for one in lists:
        if is_tracked(<PyObject*> one):
            untrack(<PyObject*> one)


cdef void show(tuple lists) noexcept:
    for one in lists:
        if not is_tracked(<PyObject*> one):
            track(<PyObject*> one)


cdef inline bint is_job(object job):
    return PyTuple_CheckExact(job) and 3 <= len(<tuple> job) <= 4 and PyUnicode_CheckExact(<object> PyTuple_GET_ITEM(job, 0))


cdef inline Py_ssize_t place_at(list places, Py_ssize_t i):
    return <Py_ssize_t> <object> PyList_GET_ITEM(places, i)


cdef void carry_out_some(void* context, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Carry out one step after the other, as long as one is left that nobody has claimed; one call for each thread.

    While more are left than there are threads, each claims the one after, too, and has its memory fetched meanwhile (that of
    its first part). For compact moments, which take longer to compute than to fetch: float32 ones do not, and two at once
    would only wait longer.
    """
    cdef Group* group = <Group*> context
    cdef Task** tasks = group.tasks
    cdef int64_t count = group.count, threads = group.threads, done = 0, after, i = claim(&group.claimed, 1)
    cdef AdamStep* step
    while i < count:
        after = count
        step = &tasks[i].parts[0].step
        if tasks[i].needs_noise and i + threads < count and tasks[i].n <= MAX_AHEAD:
            after = claim(&group.claimed, 1)
            if after < count:
                step.next = &tasks[after].parts[0].step
        carry_out(tasks[i])
        step.next = NULL
        done += 1
        i = after if after < count else claim(&group.claimed, 1)
    report(done)


cdef class Round:
    """Of each name the first of its jobs, (name, loss, grad_a, grad_b) or (name, loss, gradients).

    Attributes
    ----------
    held : list of Owned, taken by this thread.
    mine : list of int, the places of their jobs in ``jobs``.
    later : list of int, the places of jobs whose names have come before.
    at : int, how many of ``places`` have been looked at.
    """

    cdef list jobs, places
    cdef readonly list held, mine, later
    cdef readonly Py_ssize_t at
    cdef set late               # names in `later`
    cdef long long since        # `clock` before any of ``held`` was taken
    cdef list adams             # of the steps that are prepared, in their order
    cdef Task** tasks
    cdef Group group            # that is being carried out
    cdef Py_ssize_t* of_held    # their indices in ``held``
    cdef Py_ssize_t prepared, looked_at

    def __init__(self, list jobs not None, list places not None):
        self.jobs, self.places = jobs, places
        self.held, self.mine, self.later, self.late = [], [], [], set()

    def begin(self):
        """Begin a batch; what was held has been given back."""
        self.since = clock
        self.mine.clear()

    @property
    def is_over(self):
        """Whether all jobs have been looked at."""
        return self.at == len(self.places)

    @property
    def place(self):
        """The place of the next job."""
        return self.places[self.at]

    def take(self, dict tenants not None):
        """Take one after the other, up to the first that cannot be had at once or whose job is none; under the lock."""
        global clock
        cdef long long me = <long long> this_thread()
        cdef PyObject* found[GROUP]
        cdef Py_ssize_t last, i
        cdef Owned one
        while self.at < len(self.places):
            last = min(self.at + GROUP, len(self.places))
            for i in range(self.at, last):
                fetch(PyList_GET_ITEM(self.jobs, place_at(self.places, i)))
            for i in range(self.at, last):
                job = <object> PyList_GET_ITEM(self.jobs, place_at(self.places, i))
                if is_job(job):
                    fetch(PyTuple_GET_ITEM(job, 0))
            for i in range(self.at, last):
                job = <object> PyList_GET_ITEM(self.jobs, place_at(self.places, i))
                found[i - self.at] = NULL
                if is_job(job):
                    found[i - self.at] = PyDict_GetItemWithError(tenants, <object> PyTuple_GET_ITEM(job, 0))
                if found[i - self.at] != NULL:
                    fetch(found[i - self.at])
                    fetch(<const char*> found[i - self.at] + LINE)
            for i in range(last - self.at):
                if found[i] == NULL:
                    return
                one = <Owned> found[i]
                if self._has_come(one, me):
                    self.postpone(one)
                    continue
                if one.trainer is None or (one.owner != 0 and one.owner != me):
                    return
                self.mine.append(<object> PyList_GET_ITEM(self.places, self.at))
                self.held.append(one)
                clock += 1
                one.owner, one.depth, one.used = me, one.depth + 1, clock
                self.at += 1

    cdef bint _has_come(self, Owned one, long long me) except -1:
        return (one.owner == me and one.used > self.since) or (len(self.late) > 0 and one.name in self.late)

    def has_come(self, Owned one not None):
        """Whether an earlier job of this round has its name."""
        return self._has_come(one, <long long> this_thread())

    cpdef postpone(self, Owned one):
        """Leave the next job to a later round."""
        self.later.append(self.places[self.at])
        self.late.add(one.name)
        self.at += 1

    def added(self):
        """Note that the last of ``held`` was taken otherwise, for the next job."""
        self.mine.append(self.places[self.at])
        self.at += 1

    def skip(self):
        """Leave the next job out."""
        self.at += 1

    def step(self, list results not None, int threads):
        """Do the steps that run no Python code, in any order; put records and errors into ``results``, by place.

        Return the indices in ``held`` of the others, for which nothing was done.
        """
        cdef Py_ssize_t n = len(self.held), i
        cdef tuple lists
        cdef int team = 0
        cdef double work = 0.0
        cdef uint64_t fp
        cdef Owned one
        self.prepared = self.looked_at = 0
        self.adams = [None] * n
        lists = (self.jobs, self.places, self.held, self.mine, self.adams, results)
        self.tasks = <Task**> calloc(n + 1, sizeof(Task*))
        self.of_held = <Py_ssize_t*> calloc(n + 1, sizeof(Py_ssize_t))
        try:
            if self.tasks == NULL or self.of_held == NULL:
                raise MemoryError()
            for i in range(min(n, GROUP)):
                one = <Owned> PyList_GET_ITEM(self.held, i)
                work += expected_us(0 if one.adam is None else one.adam.n)
            if n > GROUP:
                work *= <double> n / GROUP
            fp = fp_enter()
            with nogil:
                if threads > 1:
                    team = open_team(threads, work)
            self.group.threads = max(team, 1)
            if n > GROUP:
                hide(lists)
            self._step_all(results, team > 0)
            if n > GROUP:
                show(lists)
            if team > 0:
                close_team()
            fp_leave(fp)
            return self._end(results)
        except BaseException:
            self._leave(results)
            raise
        finally:
            free(self.tasks)
            free(self.of_held)
            self.tasks, self.of_held, self.adams = NULL, NULL, None

    cdef void _step_all(self, list results, bint has_team) noexcept:
        """While one group is carried out by others, the one before is recorded and the one after prepared."""
        cdef Py_ssize_t done = 0, begun
        self._prepare()
        begun = self.prepared
        self._hand_out(0, begun, has_team)
        while done < begun:
            self._prepare()
            with nogil:
                if has_team:
                    finish()
                else:
                    carry_out_some(&self.group, 0, 1)
                self._hand_out(begun, self.prepared, has_team)
            self._record(results, done, begun)
            done, begun = begun, self.prepared
        if has_team:
            finish()

    cdef void _hand_out(self, Py_ssize_t first, Py_ssize_t last, bint has_team) noexcept nogil:
        self.group.tasks, self.group.count, self.group.claimed = self.tasks + first, last - first, 0
        if has_team:
            hand_out(carry_out_some, &self.group, min(self.group.count, self.group.threads), 1)

    cdef void _prepare(self) noexcept:
        """Prepare groups until at least one step more is, or all have been looked at."""
        cdef Py_ssize_t before = self.prepared, i, k, last
        cdef PreparedAdam adam
        while self.prepared == before and self.looked_at < len(self.held):
            last = min(self.looked_at + GROUP, len(self.held))
            for i in range(self.looked_at, last):
                adam = (<Owned> PyList_GET_ITEM(self.held, i)).adam
                job = <object> PyList_GET_ITEM(self.jobs, place_at(self.mine, i))
                if adam is not None:
                    adam.fetch_object()
                for k in range(1, len(<tuple> job)):
                    fetch(PyTuple_GET_ITEM(job, k))
                    fetch(<const char*> PyTuple_GET_ITEM(job, k) + LINE)
            for i in range(self.looked_at, last):
                adam = (<Owned> PyList_GET_ITEM(self.held, i)).adam
                job = <object> PyList_GET_ITEM(self.jobs, place_at(self.mine, i))
                if adam is not None:
                    adam.fetch_records()
                for k in range(2, len(<tuple> job)):
                    fetch_shape(<object> PyTuple_GET_ITEM(job, k))
            for i in range(self.looked_at, last):
                self._prepare_one(i)
            self.looked_at = last

    cdef void _prepare_one(self, Py_ssize_t i) noexcept:
        cdef object job = <object> PyList_GET_ITEM(self.jobs, place_at(self.mine, i)), grad_b
        cdef Owned one = <Owned> PyList_GET_ITEM(self.held, i)
        one.is_dirty = True  # whatever comes of it: at worst a file is written again
        if one.adam is None or not PyTuple_CheckExact(job):  # what a subclass says of its length need not be so
            return
        grad_b = <object> PyTuple_GET_ITEM(job, 3) if len(<tuple> job) > 3 else None
        try:
            if not one.adam.begin_quickly(<object> PyTuple_GET_ITEM(job, 1), <object> PyTuple_GET_ITEM(job, 2), grad_b):
                return
        except MemoryError:
            return
        self.adams[self.prepared] = one.adam
        self.tasks[self.prepared] = &one.adam.task
        self.of_held[self.prepared] = i
        self.prepared += 1

    cdef void _record(self, list results, Py_ssize_t first, Py_ssize_t last) noexcept:
        cdef PreparedAdam adam
        cdef Py_ssize_t i
        for i in range(first, last):
            adam = <PreparedAdam> PyList_GET_ITEM(self.adams, i)
            record = adam.commit()
            if record is not None:
                results[place_at(self.mine, self.of_held[i])] = record
                adam.leave()

    cdef list _end(self, list results):
        """Put the errors of refused steps into ``results``; return the indices of those that were not prepared."""
        cdef list others = [], refused = []
        cdef Py_ssize_t i = 0, k
        for k in range(len(self.held)):
            if i == self.prepared or self.of_held[i] != k:
                others.append(k)
                continue
            if results[place_at(self.mine, k)] is None:
                refused.append((self.mine[k], self.adams[i]))
            i += 1
        for place, adam in refused:
            results[place] = (<PreparedAdam> adam).refused()
            (<PreparedAdam> adam).leave()
        return others

    cdef void _leave(self, list results) noexcept:
        """Leave those that were prepared and have no result."""
        cdef Py_ssize_t i
        for i in range(self.prepared):
            if results[place_at(self.mine, self.of_held[i])] is None:
                (<PreparedAdam> PyList_GET_ITEM(self.adams, i)).leave()
