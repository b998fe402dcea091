"""Several threads on one piece of work, for cylora's own kernels and for any Cython package that cimports them.

    if open_team(threads, work_us):
        share(phase_1, &context, blocks, 1)
        share(phase_2, &context, blocks, 1)
        close_team()
    else:
        phase_1(&context, 0, blocks)
        phase_2(&context, 0, blocks)

Nothing here needs the GIL. A ``Work`` must not take it either, nor open a team, nor set the floating-point state: that
of a helper is the standard one (see _fpenv.pxd), and the caller sets its own before.
"""

from libc.stdint cimport int64_t

ctypedef void (*Work)(void* context, Py_ssize_t first, Py_ssize_t last) noexcept nogil  # do items first <= i < last

# Gather up to ``threads`` threads, the caller included, for what one thread does in about ``work_us`` microseconds.
# 0: do it alone. Else so many are gathered, and ``close_team`` must follow, in the same thread.
cdef int open_team(int threads, double work_us) noexcept nogil

# Do items 0 <= i < items in pieces of ``grain`` on all threads of the team. On return all are done and their writes seen.
cdef void share(Work work, void* context, Py_ssize_t items, Py_ssize_t grain) noexcept nogil

# The two halves of ``share``: between them the caller does something else. One job at a time is handed out.
cdef void hand_out(Work work, void* context, Py_ssize_t items, Py_ssize_t grain) noexcept nogil
cdef void finish() noexcept nogil

# From within a ``Work`` whose pieces are not alike: how much of the whole this call has done, in any unit.
cdef void report(int64_t units) noexcept nogil

cdef void close_team() noexcept nogil
