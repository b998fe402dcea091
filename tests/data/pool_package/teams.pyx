"""Work for teams that notes what was done, when, by whom and in which floating-point state."""

from libc.stdint cimport int64_t, uint64_t
from posix.unistd cimport usleep
from cylora.kernels._fpenv cimport fp_enter, fp_leave
from cylora.kernels.threads cimport close_team, open_team, report, share

cdef extern from *:
    """
    #include <pthread.h>
    #include <stdint.h>
    static int64_t teams_self(void) { return (int64_t) (intptr_t) pthread_self(); }
    static void teams_increment(int64_t *p) { __atomic_fetch_add(p, 1, __ATOMIC_RELAXED); }
    static int64_t teams_read(int64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static void teams_write(int64_t *p, int64_t x) { __atomic_store_n(p, x, __ATOMIC_SEQ_CST); }
    """
    int64_t self_id "teams_self"() noexcept nogil
    void increment "teams_increment"(int64_t*) noexcept nogil
    int64_t read "teams_read"(int64_t*) noexcept nogil
    void write "teams_write"(int64_t*, int64_t) noexcept nogil

cdef struct Notes:
    int64_t* first          # how often each item was done in phase 1
    int64_t* second         # and in phase 2
    int64_t* threads        # who did it
    uint64_t* states        # the floating-point state then
    Py_ssize_t items
    Py_ssize_t grain
    int64_t wrong           # pieces that are none, and items of phase 1 not done when phase 2 ran
    int64_t caller
    unsigned int pause_us
    unsigned int helper_pause_us
    bint reports            # that all was done by the caller


cdef void note(Notes* notes, int64_t* counts, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef uint64_t state = fp_enter()
    cdef Py_ssize_t i
    fp_leave(state)
    if first % notes.grain != 0 or last != min(first + notes.grain, notes.items):
        increment(&notes.wrong)
    for i in range(first, last):
        increment(&counts[i])
        notes.threads[i] = self_id()
        notes.states[i] = state
    if notes.pause_us:
        usleep(notes.pause_us)
    if notes.helper_pause_us and self_id() != notes.caller:
        usleep(notes.helper_pause_us)
    if notes.reports and self_id() == notes.caller:
        report(last - first)


cdef void phase_1(void* context, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef Notes* notes = <Notes*> context
    note(notes, notes.first, first, last)


cdef void phase_2(void* context, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef Notes* notes = <Notes*> context
    cdef Py_ssize_t i
    for i in range(first, last):
        # What another thread has probably done.
        if notes.first[notes.items - 1 - i] != 1 or notes.first[(i + notes.items // 2) % notes.items] != 1:
            increment(&notes.wrong)
    note(notes, notes.second, first, last)


def work(
    int threads, double work_us, Py_ssize_t grain, int64_t[::1] first not None, int64_t[::1] second not None,
    int64_t[::1] ids not None, uint64_t[::1] states not None, unsigned int pause_us=0, bint second_phase=True,
    unsigned int helper_pause_us=0, bint reports=False,
):
    """Do both phases in one team; return whether there was one, and how much was wrong.

    Without a team nothing is done. Phase 1 counts in ``first``, phase 2 in ``second``; the last to do an item writes
    its thread and its floating-point state. Each piece takes ``pause_us`` longer, a helper's ``helper_pause_us`` more.
    Where it ``reports``, all is done by the caller, by its own account.
    """
    cdef Notes notes
    cdef bint opened
    cdef int64_t nothing = 0
    cdef uint64_t nowhere = 0
    notes.items, notes.grain, notes.wrong = first.shape[0], grain, 0
    notes.caller, notes.pause_us, notes.helper_pause_us = self_id(), pause_us, helper_pause_us
    notes.reports = reports
    notes.first = &first[0] if notes.items else &nothing
    notes.second = &second[0] if notes.items else &nothing
    notes.threads = &ids[0] if notes.items else &nothing
    notes.states = &states[0] if notes.items else &nowhere
    with nogil:
        opened = open_team(threads, work_us)
        if opened:
            share(phase_1, &notes, notes.items, grain)
            if second_phase:
                share(phase_2, &notes, notes.items, grain)
            close_team()
    return opened, notes.wrong


def opens(int threads, double work_us):
    """Return whether there is a team for such work."""
    cdef bint opened
    with nogil:
        opened = open_team(threads, work_us)
        if opened:
            close_team()
    return opened


def occupy(int threads, int64_t[::1] over not None):
    """Keep a team open until ``over`` is 2, which it makes 1 once it has one; return whether it was opened."""
    cdef bint opened
    cdef int64_t* flag = &over[0]
    with nogil:
        opened = open_team(threads, 1e6)
        if opened:
            write(flag, 1)
            while read(flag) != 2:
                usleep(100)
            close_team()
    return opened


def own_thread():
    """Return the name by which ``work`` notes this thread."""
    return self_id()
