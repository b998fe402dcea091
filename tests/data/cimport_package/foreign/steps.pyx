"""Every C function of cylora.kernels.dispatch, and its raw table, called from a foreign package without the GIL."""

from libc.stdint cimport int64_t, uint64_t
from cylora.kernels cimport dispatch
from cylora.kernels._fpenv cimport fp_enter, fp_leave
from cylora.kernels._loops cimport FLOAT32, AdamRule, NormState

# Flush-to-zero (and on x86-64 denormals-are-zero) in the control word that fp_leave writes.
cdef extern from *:
    """
    #if defined(__x86_64__)
    #define FOREIGN_FLUSH 0x8040u
    #else
    #define FOREIGN_FLUSH (1u << 24)
    #endif
    """
    uint64_t FOREIGN_FLUSH


def norm(const float[::1] g not None, bint flush=False):
    """The norm; with ``flush`` in a thread that flushes denormals to zero, as some hosts leave it."""
    cdef double result
    cdef uint64_t host
    with nogil:
        host = fp_enter()
        if flush:
            fp_leave(host | FOREIGN_FLUSH)
        result = dispatch.norm(&g[0], g.shape[0])
        fp_leave(host)
    return result


def norm_in_pieces(const float[::1] g not None, Py_ssize_t piece):
    """The norm through the raw table, ``piece`` elements at a time."""
    cdef NormState state
    cdef Py_ssize_t start = 0
    cdef double result
    cdef uint64_t fp
    with nogil:
        fp = fp_enter()
        dispatch.loops.norm_begin(&state)
        while start < g.shape[0]:
            dispatch.loops.norm_add(&state, &g[start], min(piece, g.shape[0] - start), FLOAT32)
            start += piece
        result = dispatch.loops.norm_finish(&state)
        fp_leave(fp)
    return result


def clip(float[::1] g not None, double max_norm):
    """Clip in place; return the norm before."""
    cdef double before
    with nogil:
        before = dispatch.norm(&g[0], g.shape[0])
        dispatch.scale(&g[0], g.shape[0], dispatch.loops.clip_scale(before, max_norm, 1.0))
    return before


def accumulate(float[::1] total not None, const float[::1] g not None, double weight):
    with nogil:
        dispatch.accumulate(&total[0], &g[0], total.shape[0], weight)


def adam_step(
    float[::1] p not None, const float[::1] g not None, float[::1] m not None, float[::1] v not None, int64_t t,
    *, double beta1, double beta2, double eps, double weight_decay, bint l2, double rate, double max_norm,
    double divisor=1.0,
):
    """One clipped step of Adam on ``g / divisor``."""
    cdef AdamRule rule = AdamRule(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, l2=l2)
    cdef double before
    with nogil:
        before = dispatch.norm(&g[0], g.shape[0]) / divisor
        dispatch.adam_step(
            &p[0], &g[0], &m[0], &v[0], p.shape[0], &rule, rate,
            dispatch.loops.clip_scale(before, max_norm, 1.0) / divisor, t)
    return before
