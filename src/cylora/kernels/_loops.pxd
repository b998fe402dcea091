"""C types that the loops, their callers and foreign packages share. Types only: importing this runs nothing."""

from libc.stdint cimport int64_t

cdef enum:
    LANES = 16      # float64 sums kept side by side; element i of a vector always belongs to lane i % LANES
    BLOCK = 8192    # elements whose lanes are folded into one block sum; block sums are added in index order

cdef struct NormState:
    double lanes[16]
    double total            # sum over the finished blocks
    Py_ssize_t filled       # elements in the unfinished block, 0 <= filled < BLOCK

cdef struct AdamRule:       # what stays the same from step to step
    double beta1
    double beta2
    double eps
    double weight_decay
    bint l2                 # decay enters the gradient (True) or the parameter directly (False)

cdef struct AdamScalars:    # what one step needs, each rounded once from float64
    float clip_scale
    float one_minus_beta1
    float one_minus_beta2
    float root_scale        # (1 - beta1^t) / (rate * sqrt(1 - beta2^t))
    float offset            # eps * (1 - beta1^t) / rate
    float decay             # decoupled: rate * weight_decay; l2: weight_decay
    bint l2

cdef struct Loops:          # one instruction set's loops
    void (*norm_begin)(NormState*) noexcept nogil
    void (*norm_add)(NormState*, const float*, Py_ssize_t) noexcept nogil
    double (*norm_finish)(const NormState*) noexcept nogil
    Py_ssize_t (*first_nonfinite)(const float*, Py_ssize_t) noexcept nogil
    double (*clip_scale)(double, double) noexcept nogil
    void (*scale)(float*, Py_ssize_t, double) noexcept nogil
    void (*accumulate)(float*, const float*, Py_ssize_t, double) noexcept nogil
    void (*adam_scalars)(AdamScalars*, const AdamRule*, double, double, int64_t) noexcept nogil
    void (*adam_update)(float*, const float*, float*, float*, Py_ssize_t, const AdamScalars*) noexcept nogil
