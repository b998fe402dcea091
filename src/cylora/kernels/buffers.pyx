"""Borrow memory, checked before it is used: float32, and for gradients half precision too.

An object is taken by the first it has of: the buffer protocol, DLPack, ``__array__``. What is written is taken by the first
alone, and never by ``__array__``: that may be a copy. What would have to be converted or copied here is refused.

A step borrows its gradients anew each time, so this path is raw ``Py_buffer``: acquiring a typed memoryview costs about
twice as much and its errors name neither the argument nor what was got. State that lives longer uses typed memoryviews.
"""

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, Py_buffer,
)
from cpython.exc cimport PyErr_Clear, PyErr_ExceptionMatches
from cpython.object cimport PyObject, PyTypeObject
from cylora.kernels._fetch cimport fetch
from cylora.kernels._loops cimport BFLOAT16, FLOAT16, FLOAT32, Piece
from cylora.kernels.dlpack cimport Tensor, borrow_tensor

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

cdef enum:          # where a kind was to be
    UNFIT = -1
    NOT_LENT = -3   # -2 says that an exception is set

cdef object _ndarray = np.ndarray
cdef object _float32 = np.dtype(np.float32)
cdef object _float16 = np.dtype(np.float16)
cdef object _uint16 = np.dtype(np.uint16)
cdef object _bfloat16 = None  # that of ml_dtypes, once seen: NumPy itself has none

cdef dict RULES = {False: "float32 array", True: "array of float32, float16, bfloat16 or (bfloat16's bits) uint16"}


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


cdef inline int _kind_of_descr(PyObject* descr) noexcept:
    """Return how the elements of an array of this dtype are stored, or -1."""
    if descr == <PyObject*> _float32:
        return FLOAT32
    if descr == <PyObject*> _float16:
        return FLOAT16
    if descr == <PyObject*> _uint16 or (_bfloat16 is not None and descr == <PyObject*> _bfloat16):
        return BFLOAT16
    return -1


cdef inline int _take_ndarray(
    object provider, Py_buffer* view, Py_ssize_t rows, Py_ssize_t columns, bint writable, bint halves
) noexcept:
    """Fill ``view`` from an ordinary array that satisfies every rule, and return its kind; -1: it goes the long way."""
    cdef NdArray* head
    cdef int wanted = CONTIGUOUS | ALIGNED | (WRITEABLE if writable else 0)
    cdef Py_ssize_t size = 1
    cdef int i, kind
    if not _reads_ndarray or not is_exactly(provider, <PyTypeObject*> _ndarray):
        return -1
    head = ndarray_of(provider)
    kind = _kind_of_descr(head.descr)
    if (kind != FLOAT32 and not halves) or kind < 0 or head.flags & wanted != wanted:
        return -1
    for i in range(head.nd):
        size *= head.dimensions[i]
    if rows >= 0:
        if columns < 0:
            if head.nd != 1 or size != rows:
                return -1
        elif head.nd == 2:
            if head.dimensions[0] != rows or head.dimensions[1] != columns:
                return -1
        elif head.nd != 1 or size != rows * columns:
            return -1
    lend(view, provider, head.data, (4 if kind == FLOAT32 else 2) * size)
    return kind


cdef inline int _kind_of(const Py_buffer* view) noexcept nogil:
    cdef const char* code = view.format
    if code == NULL:
        return -1
    # Both supported architectures are little-endian: '<' and '=' are the native order.
    if code[0] == c'<' or code[0] == c'=' or code[0] == c'@':
        code += 1
    if code[0] == 0 or code[1] != 0:
        return -1
    if code[0] == c'f' and view.itemsize == 4:
        return FLOAT32
    if code[0] == c'e' and view.itemsize == 2:
        return FLOAT16
    if code[0] == c'H' and view.itemsize == 2:
        return BFLOAT16
    return -1


cdef inline bint _has_shape(int ndim, const Py_ssize_t* shape, Py_ssize_t rows, Py_ssize_t columns) noexcept nogil:
    """Any shape if rows < 0; a vector of rows elements if columns < 0; else that matrix or its flat vector."""
    if rows < 0:
        return True
    if columns < 0:
        return ndim == 1 and shape[0] == rows
    if ndim == 2:
        return shape[0] == rows and shape[1] == columns
    return ndim == 1 and shape[0] == rows * columns


cdef bint _is_masked(object array) except -1:
    """Return whether some elements, which lie in memory like others, are not to be read, as numpy.ma has it."""
    mask = None if is_exactly(array, <PyTypeObject*> _ndarray) else getattr(array, "mask", None)
    return mask is not None and bool(np.any(mask))


cdef object _bits_of_bfloat16(object array):
    """Return the uint16 view of an array of ml_dtypes' bfloat16, which offers no buffer of its own; else the array."""
    global _bfloat16
    dtype = array.dtype
    if dtype.name != "bfloat16" or dtype.itemsize != 2 or not dtype.isnative:
        return array
    if _bfloat16 is None:
        _bfloat16 = dtype
    return array.view(np.uint16)


cdef int _take_memory(
    object provider, Py_buffer* view, Py_ssize_t rows, Py_ssize_t columns, bint writable, bint halves
) except -2:
    """Fill ``view`` from an array or other buffer and return its kind, or UNFIT or NOT_LENT."""
    cdef int kind = _take_ndarray(provider, view, rows, columns, writable, halves)
    if kind >= 0:
        return kind
    offered = provider
    if isinstance(provider, _ndarray):
        if _is_masked(provider):
            return UNFIT
        if halves:
            offered = _bits_of_bfloat16(provider)
    elif not PyObject_CheckBuffer(provider):
        return NOT_LENT
    if borrow(offered, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (PyBUF_WRITABLE if writable else 0)) != 0:
        if not (
            PyErr_ExceptionMatches(BufferError) or PyErr_ExceptionMatches(TypeError) or PyErr_ExceptionMatches(ValueError)
        ):
            reraise()  # KeyboardInterrupt, MemoryError: not about the buffer
        PyErr_Clear()
        return UNFIT if writable or isinstance(provider, _ndarray) else NOT_LENT
    kind = _kind_of(view)
    if (
        kind < 0 or (kind != FLOAT32 and not halves) or not _has_shape(view.ndim, view.shape, rows, columns)
        or <size_t> view.buf % <size_t> view.itemsize != 0
    ):
        PyBuffer_Release(view)
        return UNFIT
    return kind


cdef int _take_otherwise(
    object provider, Py_buffer* view, str name, Py_ssize_t rows, Py_ssize_t columns, bint writable, bint halves
) except -2:
    """Fill ``view`` by DLPack or ``__array__`` and return its kind; NOT_LENT if the object has neither."""
    cdef Tensor tensor
    cdef int kind
    trouble = None
    try:
        tensor = borrow_tensor(provider, writable)
    except BufferError as error:
        trouble = str(error)
    if trouble is not None:
        _refuse(f"{_type_name(provider)} ({trouble})", name, rows, columns, writable, halves)
    if tensor is not None:
        if (
            tensor.kind < 0 or (tensor.kind != FLOAT32 and not halves) or (writable and not tensor.is_writable)
            or not _has_shape(tensor.ndim, <const Py_ssize_t*> tensor.shape, rows, columns)
        ):
            _refuse(f"{_type_name(provider)} with {tensor.traits(writable)}", name, rows, columns, writable, halves)
        lend(view, tensor, tensor.start, tensor.n_bytes)
        return tensor.kind
    if writable or getattr(type(provider), "__array__", None) is None:
        return NOT_LENT
    try:
        array = provider.__array__()
    except MemoryError:
        raise
    except Exception as error:
        trouble = f"__array__ raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if trouble is None and not isinstance(array, _ndarray):
        trouble = f"__array__ gives {_type_name(array)}"
    kind = UNFIT if trouble is not None else _take_memory(array, view, rows, columns, False, halves)
    if kind < 0:
        trouble = trouble or f"__array__ gives {describe(array)}"
        _refuse(f"{_type_name(provider)}, whose {trouble}", name, rows, columns, writable, halves)
    return kind


cdef int _acquire(
    object provider, Py_buffer* view, str name, Py_ssize_t rows, Py_ssize_t columns, bint writable, bint halves
) except -1:
    """Fill ``view``, which the caller releases, and return its kind, or raise InputError and hold nothing."""
    cdef int kind = _take_ndarray(provider, view, rows, columns, writable, halves)
    if kind >= 0:
        return kind
    kind = _take_memory(provider, view, rows, columns, writable, halves)
    if kind == NOT_LENT:
        kind = _take_otherwise(provider, view, name, rows, columns, writable, halves)
    if kind < 0:
        _refuse(describe(provider), name, rows, columns, writable, halves)
    return kind


cdef int acquire_float32(
    object provider, Py_buffer* view, str name, Py_ssize_t rows, Py_ssize_t columns, bint writable
) except -1:
    """Fill ``view``, which the caller releases, or raise InputError and hold nothing."""
    _acquire(provider, view, name, rows, columns, writable, False)
    return 0


cdef int acquire_gradient(
    object provider, Py_buffer* view, Piece* piece, str name, Py_ssize_t rows, Py_ssize_t columns
) except -1:
    """Fill ``view``, which the caller releases, and ``piece``, or raise InputError and hold nothing."""
    _describe(piece, view, _acquire(provider, view, name, rows, columns, False, True))
    return 0


cdef bint takes_gradient(object provider, Py_buffer* view, Piece* piece, Py_ssize_t rows, Py_ssize_t columns) noexcept:
    cdef int kind = _take_ndarray(provider, view, rows, columns, False, True)
    if kind < 0:
        return False
    _describe(piece, view, kind)
    return True


cdef void fetch_shape(object provider) noexcept:
    if _reads_ndarray and is_exactly(provider, <PyTypeObject*> _ndarray):
        fetch(ndarray_of(provider).dimensions)
        fetch(ndarray_of(provider).data)


cdef inline void _describe(Piece* piece, const Py_buffer* view, int kind) noexcept:
    piece.kind, piece.start, piece.n = kind, view.buf, view.len // (4 if kind == FLOAT32 else 2)


def check_gradient(provider, str name not None, Py_ssize_t rows, Py_ssize_t columns):
    """Raise the InputError that a step would if this is no gradient of that shape (``columns`` -1: a vector)."""
    cdef Py_buffer view
    cdef Piece piece
    acquire_gradient(provider, &view, &piece, name, rows, columns)
    PyBuffer_Release(&view)


cdef bint overlap(const void* a, Py_ssize_t a_bytes, const void* b, Py_ssize_t b_bytes) noexcept nogil:
    return <const char*> a < <const char*> b + b_bytes and <const char*> b < <const char*> a + a_bytes


cdef int _refuse(str got, str name, Py_ssize_t rows, Py_ssize_t columns, bint writable, bint halves) except -1:
    shape = "" if rows < 0 else f" of shape ({rows},)" if columns < 0 else f" of shape ({rows}, {columns})"
    rule = f"a {'writable, ' if writable else ''}C-contiguous, aligned {RULES[halves]}{shape}"
    raise InputError(f"{name} must be {rule}, got {got}")


cdef str _type_name(object provider):
    return f"{type(provider).__module__}.{type(provider).__qualname__}".removeprefix("builtins.")


def describe(provider):
    """Say in a few words what an object offers as a buffer: type, format, shape, what is unusual about it."""
    kind = _type_name(provider)
    if not PyObject_CheckBuffer(provider):
        has_array = getattr(type(provider), "__array__", None) is not None
        return f"{kind}, which offers {'only __array__, which may be a copy' if has_array else 'no buffer'}"
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
        if isinstance(provider, _ndarray) and _is_masked(provider):
            traits.append("masked elements")
    return f"{kind} with {', '.join(traits)}"
