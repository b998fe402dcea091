"""The floating-point control register of the calling thread, read and set by a few bytes of machine code.

ctypes calls the code directly, so nothing but the test changes the state, and no compiler is needed.
"""

import ctypes
import mmap
import platform

# Control bits only: exception flags (x86-64: bits 0 to 5) are sticky and say nothing about the mode.
CODE = {
    "x86_64": {
        "get": "0fae5c24fc8b4424fcc3",  # stmxcsr [rsp-4]; mov eax, [rsp-4]; ret
        "set": "897c24fc0fae5424fcc3",  # mov [rsp-4], edi; ldmxcsr [rsp-4]; ret
        "control": 0xFFC0,
        "states": {
            "clean": 0x1F80,
            "flush": 0x1F80 | 0x8040,  # FTZ and DAZ
            "down": 0x1F80 | 0x2000,
            "up": 0x1F80 | 0x4000,
            "zero": 0x1F80 | 0x6000,
        },
    },
    "aarch64": {
        "get": "00443bd5c0035fd6",  # mrs x0, fpcr; ret
        "set": "00441bd5c0035fd6",  # msr fpcr, x0; ret
        "control": 0x07F7FFFF,
        "states": {"clean": 0, "flush": 1 << 24, "down": 2 << 22, "up": 1 << 22, "zero": 3 << 22},
    },
}
MACHINE = CODE[platform.machine().lower().replace("amd64", "x86_64")]
STATES: dict[str, int] = MACHINE["states"]

_get_code, _set_code = bytes.fromhex(MACHINE["get"]), bytes.fromhex(MACHINE["set"])
_memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
_memory[0 : len(_get_code)] = _get_code
_memory[64 : 64 + len(_set_code)] = _set_code
_address = ctypes.addressof(ctypes.c_char.from_buffer(_memory))
_get = ctypes.PYFUNCTYPE(ctypes.c_uint64)(_address)
_set = ctypes.PYFUNCTYPE(None, ctypes.c_uint64)(_address + 64)


def control() -> int:
    """Return the control bits now in force in this thread."""
    return _get() & 0xFFFFFFFF & MACHINE["control"]


def enter(state: str) -> int:
    """Set a state by name and return the control bits it must show."""
    _set(STATES[state])
    return STATES[state] & MACHINE["control"]
