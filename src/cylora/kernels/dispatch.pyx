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

cdef int _find(void** function, dict capi, str name) except -1:
    capsule = capi[name]
    function[0] = PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule))
    return 0


cdef int _load(Loops* table, dict capi) except -1:
    _find(<void**> &table.norm_begin, capi, "norm_begin")
    _find(<void**> &table.norm_add, capi, "norm_add")
    _find(<void**> &table.norm_finish, capi, "norm_finish")
    _find(<void**> &table.square_blocks, capi, "square_blocks")
    _find(<void**> &table.norm_of_blocks, capi, "norm_of_blocks")
    _find(<void**> &table.first_nonfinite, capi, "first_nonfinite")
    _find(<void**> &table.value_at, capi, "value_at")
    _find(<void**> &table.clip_scale, capi, "clip_scale")
    _find(<void**> &table.scale, capi, "scale")
    _find(<void**> &table.accumulate, capi, "accumulate")
    _find(<void**> &table.adam_scalars, capi, "adam_scalars")
    _find(<void**> &table.draw_noise, capi, "draw_noise")
    _find(<void**> &table.update_blocks, capi, "update_blocks")
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
    step.noise, step.first_chunk, step.next, step.average = NULL, 0, NULL, NULL
    fp = fp_enter()
    loops.adam_scalars(&step.scalars, rule, rate, clip, t)
    loops.update_blocks(&step, 0, (n + BLOCK - 1) // BLOCK)
    fp_leave(fp)
