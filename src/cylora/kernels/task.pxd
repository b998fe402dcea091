"""One clipped step of Adam over one or more parts of a model, as its computation sees it: no Python object, no GIL."""

from libc.stdint cimport int64_t
from cylora.kernels._loops cimport AdamRule, AdamStep

cdef struct Part:               # parameters that lie together and follow one rule
    AdamStep step
    AdamRule rule
    double rate_factor          # times the step's rate
    int64_t t                   # steps applied
    Py_ssize_t start            # where its gradient begins in what the caller gave as one vector
    Py_ssize_t first_block      # where its blocks begin among those of all parts; `lay_out` sets it
    bint is_left_out            # of this step
    bint ascends                # along the gradient, not against it

cdef struct Task:
    Part* parts
    Py_ssize_t count
    double* block_sums          # (blocks,)
    Py_ssize_t blocks
    Py_ssize_t n                # elements of all parts
    bint needs_noise            # not all moments are float32: one table for all parts, so these share their t
    double max_norm             # of the gradients of all parts together
    double norm_limit           # above it nothing is applied
    int threads
    double rate
    double divisor              # of the gradient, before anything else
    double average_weight       # of the new parameters in their running averages
    double norm                 # OUT, from here on
    bint is_applied
    Py_ssize_t nonfinite_part   # index of the part with the first element that is not finite, or -1
    Py_ssize_t nonfinite_index  # of that element in the part
    double nonfinite_value

# Number the blocks of the parts that are not left out. ``block_sums`` must have room for those of all.
cdef void lay_out(Task* task) noexcept nogil

# The steps below come between ``fp_enter`` and ``fp_leave``.
cdef void measure(Task* task) noexcept nogil    # norm, and what is not finite
cdef void carry_out(Task* task) noexcept nogil  # norm, and if it is within the limit the update of all parts

# What one thread takes for a step over n elements, in microseconds: as a rule, to judge what sharing many is worth.
cdef double expected_us(Py_ssize_t n) noexcept nogil
