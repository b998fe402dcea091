"""The structs of dlpack.h 1.3 (github.com/dmlc/dlpack). Types only: importing this runs nothing."""

from cpython.object cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef struct DLTensor:
    void* data
    int32_t device_type
    int32_t device_id
    int32_t ndim
    uint8_t code                    # of the elements' type, with bits and lanes
    uint8_t bits
    uint16_t lanes
    int64_t* shape
    int64_t* strides                # in elements; before DLPack 1.2 NULL if C-contiguous
    uint64_t byte_offset

cdef struct Managed:
    DLTensor tensor
    void* context
    void (*deleter)(Managed*) noexcept

cdef struct Versioned:              # up to flags the same in every version
    uint32_t major
    uint32_t minor
    void* context
    void (*deleter)(Versioned*) noexcept
    uint64_t flags
    DLTensor tensor

# The table of C functions that a tensor type may offer (torch from 2.10 on), in a capsule. To lend or to look at takes some
# 50 ns; the type's __dlpack__ takes 10 us, each of a tensor's attributes 50 to 70 ns.
cdef struct Exchange:
    uint32_t major
    uint32_t minor
    Exchange* older
    void* allocate
    int (*lend)(PyObject*, Versioned**) noexcept
    void* take_back
    int (*look)(PyObject*, DLTensor*) noexcept  # borrows nothing, allocates nothing; may be NULL
