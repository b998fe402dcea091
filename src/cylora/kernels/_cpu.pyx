"""Ask the CPU and the operating system which instruction sets may run."""

cdef extern from *:
    """
    #if defined(__x86_64__) || defined(_M_X64)
    #include <cpuid.h>
    static int cylora_has_x86_64_v3(void) {
        /* The bits of the x86-64 psABI's level v3 (which contains v2), by CPUID leaf, and XCR0: the OS saves the ymm registers. */
        const unsigned v2_v3_ecx1 = (1u << 0) | (1u << 9) | (1u << 12) | (1u << 13) | (1u << 19) | (1u << 20)
                                  | (1u << 22) | (1u << 23) | (1u << 27) | (1u << 28) | (1u << 29);
        const unsigned v3_ebx7 = (1u << 3) | (1u << 5) | (1u << 8);       /* BMI1, AVX2, BMI2 */
        const unsigned v3_ecx81 = (1u << 0) | (1u << 5);                  /* LAHF, LZCNT */
        unsigned a, b, c, d, low, high;
        if (!__get_cpuid(1, &a, &b, &c, &d) || (c & v2_v3_ecx1) != v2_v3_ecx1) return 0;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & v3_ebx7) != v3_ebx7) return 0;
        if (!__get_cpuid(0x80000001u, &a, &b, &c, &d) || (c & v3_ecx81) != v3_ecx81) return 0;
        __asm__ volatile ("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        return (low & 6u) == 6u;
    }
    #else
    static int cylora_has_x86_64_v3(void) { return 0; }
    #endif
    """
    int cylora_has_x86_64_v3() noexcept


def supports_x86_64_v3():
    """Return whether this CPU and operating system run x86-64-v3 code."""
    return cylora_has_x86_64_v3() != 0
