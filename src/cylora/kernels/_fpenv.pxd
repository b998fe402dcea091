"""Floating-point state around the loops: round to nearest, gradual underflow, no traps, whatever the host left behind.

Per thread; ``enter`` returns the old state for ``leave``. Exception flags raised in between are dropped with the rest.
"""

from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    #if defined(__x86_64__)
    #include <xmmintrin.h>
    static inline uint64_t cylora_fp_enter(void) {
        uint64_t old = _mm_getcsr();
        _mm_setcsr(0x1f80u);                  /* all exceptions masked, nearest, no FTZ, no DAZ */
        return old;
    }
    static inline void cylora_fp_leave(uint64_t old) { _mm_setcsr((unsigned) old); }
    #elif defined(__aarch64__)
    static inline uint64_t cylora_fp_enter(void) {
        uint64_t old;
        __asm__ volatile ("mrs %0, fpcr" : "=r"(old));
        __asm__ volatile ("msr fpcr, %0" : : "r"((uint64_t) 0));
        return old;
    }
    static inline void cylora_fp_leave(uint64_t old) { __asm__ volatile ("msr fpcr, %0" : : "r"(old)); }
    #else
    #error "cylora does not know how to set the floating-point state of this architecture (x86-64 and AArch64 are supported)"
    #endif
    """
    uint64_t fp_enter "cylora_fp_enter"() noexcept nogil
    void fp_leave "cylora_fp_leave"(uint64_t old) noexcept nogil
