"""Many independent steps in one call: each prepared under the GIL, all carried out without it, each recorded under it."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort
from cylora.kernels._fpenv cimport fp_enter, fp_leave
from cylora.kernels.adam cimport PreparedAdam
from cylora.kernels.task cimport Task, carry_out, expected_us
from cylora.kernels.threads cimport close_team, open_team, share

from cylora.errors import InputError, StateError

cdef enum:
    WAVE = 32   # steps carried out, then recorded, while what they touched is still in the cache


cdef void _carry_out_some(void* context, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef Task** tasks = <Task**> context
    cdef Py_ssize_t i
    for i in range(first, last):
        carry_out(tasks[i])


cdef inline const float* _begin(const Task* task) noexcept nogil:
    return task.parts[0].step.p


cdef inline const float* _end(const Task* task) noexcept nogil:
    return task.parts[task.count - 1].step.p + task.parts[task.count - 1].step.n


cdef int _by_parameters(const void* a, const void* b) noexcept nogil:
    cdef size_t x = <size_t> _begin((<const Task* const*> a)[0]), y = <size_t> _begin((<const Task* const*> b)[0])
    return (x > y) - (x < y)


cdef bint _overlap(Task** tasks, Py_ssize_t count) noexcept nogil:
    """Whether two tasks write the same parameters. If that cannot be found out, they may."""
    cdef Task** ordered = <Task**> malloc(max(count, 1) * sizeof(Task*))
    cdef bint found = False
    cdef Py_ssize_t i
    if ordered == NULL:
        return True
    for i in range(count):
        ordered[i] = tasks[i]
    qsort(ordered, count, sizeof(Task*), _by_parameters)
    for i in range(1, count):
        if _end(ordered[i - 1]) > _begin(ordered[i]):
            found = True
    free(ordered)
    return found


cdef bint _share_out(Task** tasks, Py_ssize_t count, int threads) noexcept nogil:
    """Carry all out by several threads, or do nothing and return False if that is not possible or not worth it."""
    cdef double work = 0.0
    cdef Py_ssize_t i
    if threads < 2:
        return False
    for i in range(count):
        work += expected_us(tasks[i].n)
    # Two trainers of one adapter go one after the other, in the order given.
    if _overlap(tasks, count) or not open_team(threads, work):
        return False
    share(_carry_out_some, tasks, count, 1 if count < 64 else count // 64)
    close_team()
    return True


cdef str _shown(object job):
    return f"a tuple of {len(job)}" if isinstance(job, tuple) else type(job).__name__


def step_many(jobs, prepared, int threads):
    """Do one step for each job; return a list of records and errors in their order.

    ``prepared(*job)`` returns (PreparedAdam, loss, grad_a, grad_b), or raises that job's error. An error of one step (an
    Exception) touches no other. An interrupt (any other BaseException) leaves everything as it was, unless it comes after
    all steps are done, out of a report or the making of an error.
    """
    cdef list results = list(jobs)
    cdef Py_ssize_t count = 0, done = 0, wave, i, n = len(results)
    cdef list adams = [None] * n
    cdef Py_ssize_t* places = <Py_ssize_t*> calloc(n + 1, sizeof(Py_ssize_t))
    cdef Task** tasks = <Task**> calloc(n + 1, sizeof(Task*))
    cdef PreparedAdam adam
    cdef bint is_shared
    cdef uint64_t fp = fp_enter()
    try:
        if places == NULL or tasks == NULL:
            raise MemoryError()
        try:
            for i in range(n):
                try:
                    job = results[i]
                    if not isinstance(job, tuple) or not 4 <= len(job) <= 5:
                        raise InputError(f"a job must be (trainer, loss, adapter, grad_a, grad_b), got {_shown(job)}")
                    adam, loss, grad_a, grad_b = prepared(*job)
                    adam.begin(loss, grad_a, grad_b, False)
                except Exception as error:
                    results[i] = error
                    continue
                adams[count], places[count], tasks[count] = adam, i, &adam.task
                count += 1
            while done < count:  # a later job's schedule or loss may have written to the history of an earlier one
                adam = adams[done]
                if adam.is_recordable():
                    done += 1
                    continue
                results[places[done]] = StateError("the history changed during the step: another job wrote to it")
                adam.leave()
                count -= 1
                adams[done], places[done], tasks[done] = adams[count], places[count], tasks[count]
                adams[count] = None
            done = 0
            with nogil:
                is_shared = _share_out(tasks, count, threads)
            # From here on no Python code runs until every step is done, so nothing can come between.
            while done < count:
                wave = min(count - done, WAVE)
                if not is_shared:
                    with nogil:
                        _carry_out_some(tasks, done, done + wave)
                for i in range(done, done + wave):
                    results[places[i]] = (<PreparedAdam> adams[i]).commit()
                done += wave
            for i in range(count):
                if results[places[i]] is None:
                    results[places[i]] = (<PreparedAdam> adams[i]).refused()
        finally:
            fp_leave(fp)
            for i in range(count):
                (<PreparedAdam> adams[i]).leave()
        for i in range(count):
            record = results[places[i]]
            if not isinstance(record, BaseException):
                try:
                    (<PreparedAdam> adams[i]).announce(record)
                except Exception as error:
                    results[places[i]] = error
    finally:
        free(places)
        free(tasks)
    return results
