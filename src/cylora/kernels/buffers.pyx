"""Borrow float32 memory from any buffer provider, checked before it is used.

A step borrows its gradients anew each time, so this path is raw ``Py_buffer``: acquiring a typed memoryview costs about
twice as much and its errors name neither the argument nor what was got. State that lives longer uses typed memoryviews.
"""

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, Py_buffer,
)
from cpython.exc cimport PyErr_Clear, PyErr_ExceptionMatches
from cpython.object cimport PyObject, PyTypeObject

import numpy as np

from cylora.errors import InputError

cdef extern from *:
    """
    /* The head of NumPy 2's array object, as its headers lay it open to every extension. Reading it spares a third of a
       small step: NumPy composes shape, strides and a format string anew for each buffer it hands out. */
    typedef struct {
        PyObject_HEAD
        char *data;
        int nd;
        Py_ssize_t *dimensions;
        Py_ssize_t *strides;
        PyObject *base;
        PyObject *descr;
        int flags;
    } cylora_ndarray;
    #define CYLORA_NDARRAY(object) ((cylora_ndarray *) (object))
    static int cylora_has_release(PyTypeObject *type) {
        return type->tp_as_buffer == NULL || type->tp_as_buffer->bf_releasebuffer != NULL;
    }
    static inline void cylora_lend(Py_buffer *view, PyObject *owner, void *memory, Py_ssize_t bytes) {
        Py_INCREF(owner);
        view->obj = owner;                    /* PyBuffer_Release lets go of it */
        view->internal = NULL;
        view->buf = memory;
        view->len = bytes;
    }
    """
    void lend "cylora_lend"(Py_buffer* view, object owner, void* memory, Py_ssize_t n_bytes) noexcept
    ctypedef struct NdArray "cylora_ndarray":
        char* data
        int nd
        Py_ssize_t* dimensions
        PyObject* descr
        int flags
    NdArray* ndarray_of "CYLORA_NDARRAY"(object array) noexcept nogil
    bint has_release "cylora_has_release"(PyTypeObject* kind) noexcept

cdef extern from *:
    """
    #define cylora_reraise() (-1)
    """
    int reraise "cylora_reraise"() except -1

cdef extern from "Python.h":
    bint is_exactly "Py_IS_TYPE"(object instance, PyTypeObject* kind) noexcept
    int borrow "PyObject_GetBuffer"(object provider, Py_buffer* view, int flags) noexcept

cdef enum:
    CONTIGUOUS = 0x0001
    ALIGNED = 0x0100
    WRITEABLE = 0x0400

cdef object _ndarray = np.ndarray
cdef object _float32 = np.dtype(np.float32)


cdef bint _knows_ndarray() except -1:
    """Check on a specimen that the fields are where they are expected; if not, arrays go by the buffer protocol too."""
    specimen = np.zeros((3, 5), np.float32)[1:]
    specimen.flags.writeable = False
    cdef NdArray* head = ndarray_of(specimen)
    return (
        specimen.__array_interface__["data"][0] == <size_t> head.data
        and head.nd == 2 and head.dimensions[0] == 2 and head.dimensions[1] == 5
        and head.descr == <PyObject*> _float32 and specimen.dtype is _float32
        and head.flags & (CONTIGUOUS | ALIGNED | WRITEABLE) == CONTIGUOUS | ALIGNED
        and not has_release(<PyTypeObject*> _ndarray)
    )


cdef bint _reads_ndarray = _knows_ndarray()


cdef inline bint _take_ndarray(
    object provider, Py_buffer* view, Py_ssize_t rows, Py_ssize_t columns, bint writable
) noexcept:
    """Fill ``view`` from an ordinary array that satisfies every rule; any other goes the long way."""
    cdef NdArray* head
    cdef int wanted = CONTIGUOUS | ALIGNED | (WRITEABLE if writable else 0)
    cdef Py_ssize_t size = 1
    cdef int i
    if not _reads_ndarray or not is_exactly(provider, <PyTypeObject*> _ndarray):
        return False
    head = ndarray_of(provider)
    if head.descr != <PyObject*> _float32 or head.flags & wanted != wanted:
        return False
    for i in range(head.nd):
        size *= head.dimensions[i]
    if rows >= 0:
        if columns < 0:
            if head.nd != 1 or size != rows:
                return False
        elif head.nd == 2:
            if head.dimensions[0] != rows or head.dimensions[1] != columns:
                return False
        elif head.nd != 1 or size != rows * columns:
            return False
    lend(view, provider, head.data, 4 * size)
    return True


cdef inline bint _is_float32(const Py_buffer* view) noexcept nogil:
    cdef const char* code = view.format
    if view.itemsize != 4 or code == NULL:
        return False
    # Both supported architectures are little-endian: '<' and '=' are the native order.
    if code[0] == c'<' or code[0] == c'=' or code[0] == c'@':
        code += 1
    return code[0] == c'f' and code[1] == 0


cdef inline bint _has_shape(const Py_buffer* view, Py_ssize_t rows, Py_ssize_t columns) noexcept nogil:
    """Any shape if rows < 0; a vector of rows elements if columns < 0; else that matrix or its flat vector."""
    if rows < 0:
        return True
    if columns < 0:
        return view.ndim == 1 and view.shape[0] == rows
    if view.ndim == 2:
        return view.shape[0] == rows and view.shape[1] == columns
    return view.ndim == 1 and view.shape[0] == rows * columns


cdef int acquire(object provider, Py_buffer* view, str name, Py_ssize_t rows, Py_ssize_t columns, bint writable) except -1:
    """Fill ``view``, which the caller releases, or raise InputError and hold nothing."""
    if _take_ndarray(provider, view, rows, columns, writable):
        return 0
    if borrow(provider, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (PyBUF_WRITABLE if writable else 0)) != 0:
        if not (
            PyErr_ExceptionMatches(BufferError) or PyErr_ExceptionMatches(TypeError) or PyErr_ExceptionMatches(ValueError)
        ):
            reraise()  # KeyboardInterrupt, MemoryError: not about the buffer
        PyErr_Clear()
        _refuse(provider, name, rows, columns, writable)
    if not _is_float32(view) or not _has_shape(view, rows, columns) or <size_t> view.buf % 4 != 0:
        PyBuffer_Release(view)
        _refuse(provider, name, rows, columns, writable)
    return 0


cdef bint overlap(const void* a, Py_ssize_t a_bytes, const void* b, Py_ssize_t b_bytes) noexcept nogil:
    return <const char*> a < <const char*> b + b_bytes and <const char*> b < <const char*> a + a_bytes


cdef int _refuse(object provider, str name, Py_ssize_t rows, Py_ssize_t columns, bint writable) except -1:
    shape = "" if rows < 0 else f" of shape ({rows},)" if columns < 0 else f" of shape ({rows}, {columns})"
    rule = f"a {'writable, ' if writable else ''}C-contiguous, aligned float32 array{shape}"
    raise InputError(f"{name} must be {rule}, got {describe(provider)}")


def describe(provider):
    """Say in a few words what an object offers as a buffer: type, format, shape, what is unusual about it."""
    kind = f"{type(provider).__module__}.{type(provider).__qualname__}".removeprefix("builtins.")
    if not PyObject_CheckBuffer(provider):
        hint = ": pass its .numpy(), which shares memory" if kind.startswith("torch.") else ""
        return f"{kind}, which offers no buffer{hint}"
    try:
        view = memoryview(provider)
    except (BufferError, ValueError, TypeError) as error:
        return f"{kind} ({error})"
    with view:
        traits = [f"format {view.format!r}", f"shape {view.shape}"]
        if not view.c_contiguous:
            traits.append(f"strides {view.strides}")
        if view.readonly:
            traits.append("read-only")
        flags = getattr(provider, "flags", None)
        if getattr(flags, "aligned", True) is False:
            traits.append("misaligned")
    return f"{kind} with {', '.join(traits)}"
