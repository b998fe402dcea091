"""The loops for x86-64-v3 (AVX2). Import only after _cpu.supports_x86_64_v3(): the module init itself contains AVX."""
include "_loops.pxi"
