"""Borrow the memory of a DLPack producer, such as a torch tensor. No producer's package is imported: the protocol is enough.

The rules are those of the Python array API standard 2024.12. What a producer hands out is ours until its deleter is called,
which `Tensor` does exactly once. The fast way to it is the table of C functions that a type may offer.
"""

cimport cython
from cpython.exc cimport PyErr_Clear, PyErr_ExceptionMatches, PyErr_Occurred
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_SetName
from libc.stdint cimport int64_t
from cylora.kernels._dlpack cimport DLTensor, Exchange, Managed, Versioned
from cylora.kernels._loops cimport BFLOAT16, FLOAT16, FLOAT32

cdef extern from *:
    """
    _Static_assert(sizeof(Py_ssize_t) == sizeof(int64_t), "shapes are read as Py_ssize_t");
    #define cylora_raised() (-1)
    """
    int raised "cylora_raised"() except -1

cdef enum:
    MAJOR = 1                       # of the versions understood
    CPU = 1                         # kDLCPU
    CUDA_HOST = 3                   # memory of the CPU that is pinned for a GPU
    ROCM_HOST = 11
    READ_ONLY = 1
    IS_COPIED = 2
    MAX_NDIM = 64                   # NumPy's own limit

cdef int64_t MAX_SIZE = <int64_t> 1 << 60
cdef dict TYPES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
cdef dict DEVICES = {1: "CPU", 2: "CUDA", 3: "CUDA host", 8: "Metal", 10: "ROCm", 11: "ROCm host", 13: "CUDA managed", 14: "oneAPI"}


@cython.final
cdef class Tensor:
    """A tensor that was handed out, and what it is; given back when this object goes."""

    def __dealloc__(self):
        if self.managed != NULL and self.managed.deleter != NULL:
            self.managed.deleter(self.managed)
        if self.versioned != NULL and self.versioned.deleter != NULL:
            self.versioned.deleter(self.versioned)

    cdef int own(self, object capsule) except -1:
        """Take what is in a capsule, so that nobody else does. Its destructor leaves one with the new name alone."""
        if PyCapsule_IsValid(capsule, "dltensor_versioned"):
            pointer = PyCapsule_GetPointer(capsule, "dltensor_versioned")
            PyCapsule_SetName(capsule, "used_dltensor_versioned")
            self.versioned = <Versioned*> pointer
        elif PyCapsule_IsValid(capsule, "dltensor"):
            pointer = PyCapsule_GetPointer(capsule, "dltensor")
            PyCapsule_SetName(capsule, "used_dltensor")
            self.managed = <Managed*> pointer
        elif PyCapsule_IsValid(capsule, "used_dltensor_versioned") or PyCapsule_IsValid(capsule, "used_dltensor"):
            raise BufferError("its __dlpack__ gave a capsule that is used up")
        else:
            raise BufferError(f"its __dlpack__ gave {type(capsule).__name__}, not a capsule of DLPack")
        return 0

    cdef int measure(self) except -1:
        """Find out what was handed out; refuse what cannot even be described."""
        cdef const DLTensor* tensor
        cdef int64_t size = 1, step = 1
        cdef int i
        if self.versioned != NULL and self.versioned.major != MAJOR:
            raise BufferError(f"DLPack {self.versioned.major}.{self.versioned.minor}, of which only 1.x is understood")
        if self.versioned != NULL:
            self.flags = self.versioned.flags
            tensor = &self.versioned.tensor
            self.is_writable = not self.flags & (READ_ONLY | IS_COPIED)
        else:  # such a tensor does not tell whether it may be written
            tensor = &self.managed.tensor
        if not 0 <= tensor.ndim <= MAX_NDIM or (tensor.ndim > 0 and tensor.shape == NULL):
            raise BufferError(f"a DLPack tensor without a shape, of {tensor.ndim} dimensions")
        self.tensor, self.ndim, self.shape, self.kind = tensor, tensor.ndim, tensor.shape, -1
        self.is_contiguous = True
        for i in range(tensor.ndim):
            if tensor.shape[i] < 0 or (tensor.shape[i] > 0 and size > MAX_SIZE // tensor.shape[i]):
                return 0
            size *= tensor.shape[i]
        if tensor.strides != NULL and size > 0:
            for i in range(tensor.ndim - 1, -1, -1):
                self.is_contiguous = self.is_contiguous and (tensor.shape[i] == 1 or tensor.strides[i] == step)
                step *= tensor.shape[i]
        # An empty tensor has no memory; an address of no bytes it is given all the same.
        self.start = <char*> tensor.data + tensor.byte_offset if size > 0 else <void*> tensor
        if tensor.device_type not in (CPU, CUDA_HOST, ROCM_HOST) or not self.is_contiguous or (size > 0 and tensor.data == NULL):
            return 0
        self.kind = _kind_of(tensor)
        if self.kind >= 0 and <size_t> self.start % (tensor.bits // 8) != 0:
            self.kind = -1
        if self.kind >= 0:  # else an element may have any number of bytes, and all together more than fit
            self.n_bytes = size * (tensor.bits // 8)
        return 0

    cdef str traits(self, bint writable):
        """Say what was handed out, and what is unusual about it."""
        cdef const DLTensor* tensor = self.tensor
        bits = f"{tensor.bits}x{tensor.lanes}" if tensor.lanes != 1 else f"{tensor.bits}"
        kind = f"{TYPES.get(tensor.code, f'type {tensor.code} of bits ')}{bits}"
        shape = tuple([tensor.shape[i] for i in range(tensor.ndim)])
        parts = [f"dtype {kind}", f"shape {shape}"]
        if not self.is_contiguous:
            parts.append(f"strides {tuple([tensor.strides[i] for i in range(tensor.ndim)])} in elements")
        if tensor.device_type != CPU:
            parts.append(f"on {DEVICES.get(tensor.device_type, f'device type {tensor.device_type}')} device {tensor.device_id}")
        elif tensor.data == NULL and 0 not in shape:
            parts.append("without memory")
        elif self.start != NULL and <size_t> self.start % max(tensor.bits // 8, 1) != 0:
            parts.append("misaligned")
        if writable and self.versioned == NULL:
            parts.append("by a version of DLPack that does not tell whether it may be written")
        elif writable and not self.is_writable:
            parts.append("read-only" if self.flags & READ_ONLY else "a copy")
        return ", ".join(parts)


cdef int _kind_of(const DLTensor* tensor) noexcept nogil:
    if tensor.lanes != 1:
        return -1
    if tensor.code == 2 and tensor.bits == 32:
        return FLOAT32
    if tensor.code == 2 and tensor.bits == 16:
        return FLOAT16
    if tensor.bits == 16 and (tensor.code == 4 or tensor.code == 1):  # bfloat16; uint16 holding its bits
        return BFLOAT16
    return -1


cdef Exchange* _exchange_of(type kind) except? NULL:
    """Return the newest table of C functions understood that a type offers, or NULL."""
    cdef Exchange* table
    capsule = getattr(kind, "__dlpack_c_exchange_api__", None)
    if not PyCapsule_IsValid(capsule, "dlpack_exchange_api"):
        return NULL
    table = <Exchange*> PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
    while table != NULL and table.major != MAJOR:
        table = table.older
    return table


cdef int _export(object producer, Tensor tensor) except -1:
    """Have ``tensor`` own what the producer hands out. Raises what the producer raises."""
    cdef Exchange* table = _exchange_of(type(producer))
    if table != NULL:
        if table.lend(<PyObject*> producer, &tensor.versioned) == 0 and tensor.versioned != NULL:
            return 0
        tensor.versioned = NULL
        if PyErr_Occurred() != NULL and (PyErr_ExceptionMatches(MemoryError) or not PyErr_ExceptionMatches(Exception)):
            raised()
        PyErr_Clear()  # the long way fails too, with an error that says more
    # DLPack cannot say that a tensor is part of a graph of gradients, so torch hands out none that is.
    if getattr(producer, "requires_grad", False):
        producer = producer.detach()
    try:
        capsule = producer.__dlpack__(max_version=(MAJOR, 0), copy=False)
    except TypeError:  # from before there were versions
        capsule = producer.__dlpack__()
    return tensor.own(capsule)


cdef Tensor borrow_tensor(object producer, bint writable):
    """Return what a DLPack producer hands out, None if the object is no such producer, or raise BufferError.

    What DLPack does not carry is asked by torch's names for it: a view whose elements count with the other sign, and whether
    a write would go unnoticed by a graph of gradients. The memory stays the producer's: nothing here can keep another
    thread from resizing it.
    """
    cdef Tensor tensor
    kind = type(producer)
    if getattr(kind, "__dlpack__", None) is None:
        return None
    tensor = Tensor.__new__(Tensor)
    try:
        if getattr(kind, "is_neg", None) is not None and producer.is_neg():
            raise BufferError("its elements count with the other sign: pass its .resolve_neg()")
        if writable and getattr(producer, "requires_grad", False):
            raise BufferError("it requires grad, and would not notice that it is written: pass its .detach()")
        _export(producer, tensor)
        tensor.measure()
    except MemoryError:
        raise
    except Exception as error:  # torch's messages end in a stack of C++ calls
        which = "" if type(error) is BufferError else f"{type(error).__name__}: "
        raise BufferError(f"{which}{str(error).partition(chr(10))[0]}") from None
    return tensor
