"""Choose the instruction set once, at import, and hand out its loops.

``CYLORA_ISA`` forces one. A forced or detected variant that was not built is an ImportError, never a silent slow path.
"""

import os
from importlib import import_module
from importlib.util import find_spec

from cpython.pycapsule cimport PyCapsule_GetName, PyCapsule_GetPointer
from libc.stdint cimport int64_t, uint64_t
from cylora.kernels._fpenv cimport fp_enter, fp_leave
from cylora.kernels._loops cimport BLOCK, FLOAT32, AdamRule, AdamStep, Loops, Moments, NormState, Piece

from cylora.kernels._cpu import supports_x86_64_v3

MODULES = {"baseline": "_baseline", "x86-64-v3": "_x86_64_v3"}


def _choose():
    built = tuple(name for name, module in MODULES.items() if find_spec(f"cylora.kernels.{module}") is not None)
    usable = {"baseline": True, "x86-64-v3": supports_x86_64_v3()}
    forced = os.environ.get("CYLORA_ISA", "")
    if forced and forced not in MODULES:
        raise ImportError(f"CYLORA_ISA must be one of {', '.join(MODULES)}, got {forced!r}")
    chosen = forced or ("x86-64-v3" if usable["x86-64-v3"] else "baseline")
    if not usable[chosen]:
        raise ImportError(f"CYLORA_ISA is {chosen!r}, but this CPU or operating system cannot run it")
    if chosen not in built:
        raise ImportError(f"the kernels for {chosen} were not built; built are: {', '.join(built) or 'none'}")
    return chosen, built


isa, variants = _choose()

cdef void* _pointer(dict capi, str name) except NULL:
    capsule = capi[name]
    return PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule))


cdef int _load(Loops* table, dict capi) except -1:
    table.norm_begin = <void (*)(NormState*) noexcept nogil> _pointer(capi, "norm_begin")
    table.norm_add = <void (*)(NormState*, const void*, Py_ssize_t, int) noexcept nogil> _pointer(capi, "norm_add")
    table.norm_finish = <double (*)(const NormState*) noexcept nogil> _pointer(capi, "norm_finish")
    table.square_blocks = <void (*)(const AdamStep*, Py_ssize_t, Py_ssize_t) noexcept nogil> _pointer(capi, "square_blocks")
    table.norm_of_blocks = <double (*)(const AdamStep*, double) noexcept nogil> _pointer(capi, "norm_of_blocks")
    table.first_nonfinite = <Py_ssize_t (*)(const void*, Py_ssize_t, int) noexcept nogil> _pointer(capi, "first_nonfinite")
    table.value_at = <double (*)(const void*, Py_ssize_t, int) noexcept nogil> _pointer(capi, "value_at")
    table.clip_scale = <double (*)(double, double, double) noexcept nogil> _pointer(capi, "clip_scale")
    table.scale = <void (*)(float*, Py_ssize_t, double) noexcept nogil> _pointer(capi, "scale")
    table.accumulate = <void (*)(float*, const void*, Py_ssize_t, int, double) noexcept nogil> _pointer(capi, "accumulate")
    table.adam_scalars = <void (*)(AdamStep*, const AdamRule*, double, double, int64_t) noexcept nogil> _pointer(
        capi, "adam_scalars")
    table.update_blocks = <void (*)(const AdamStep*, Py_ssize_t, Py_ssize_t) noexcept nogil> _pointer(capi, "update_blocks")
    return 0


_load(&loops, import_module(f"cylora.kernels.{MODULES[isa]}").__pyx_capi__)


cdef double norm(const float* g, Py_ssize_t n) noexcept nogil:
    cdef NormState state
    cdef uint64_t fp = fp_enter()
    loops.norm_begin(&state)
    loops.norm_add(&state, g, n, FLOAT32)
    cdef double result = loops.norm_finish(&state)
    fp_leave(fp)
    return result


cdef void scale(float* g, Py_ssize_t n, double factor) noexcept nogil:
    cdef uint64_t fp = fp_enter()
    loops.scale(g, n, factor)
    fp_leave(fp)


cdef void accumulate(float* total, const float* g, Py_ssize_t n, double weight) noexcept nogil:
    cdef uint64_t fp = fp_enter()
    loops.accumulate(total, g, n, FLOAT32, weight)
    fp_leave(fp)


cdef void adam_step(
    float* p, const float* g, float* m, float* v, Py_ssize_t n,
    const AdamRule* rule, double rate, double clip, int64_t t
) noexcept nogil:
    cdef AdamStep step
    cdef uint64_t fp
    step.p, step.n = p, n
    step.gradient.pieces[0] = Piece(start=g, n=n, kind=FLOAT32)
    step.gradient.count = 1
    step.moments = Moments(kind=FLOAT32, m=m, v=v, m_exponents=NULL, v_exponents=NULL)
    fp = fp_enter()
    loops.adam_scalars(&step, rule, rate, clip, t)
    loops.update_blocks(&step, 0, (n + BLOCK - 1) // BLOCK)
    fp_leave(fp)
