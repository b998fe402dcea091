"""Ask the memory early for what is looked at soon. Without effect otherwise, whatever the address is.

GCC leaves out the calls of a function that does nothing else: such a one is called through an object's table of methods, or
inlined into one that does more.
"""

cdef extern from *:
    """
    #define cylora_fetch(memory) __builtin_prefetch((memory), 0, 3)
    """
    void fetch "cylora_fetch"(const void* memory) noexcept nogil

cdef enum:
    LINE = 64   # bytes that a cache holds together
