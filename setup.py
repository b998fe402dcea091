"""Compile the kernels: which sources, instruction sets and flags. Everything else is static, in pyproject.toml."""

import os
import platform

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, PlatformError

# -fno-math-errno lets the square root vectorise; -ffp-contract=off keeps a*b+c two roundings on every instruction set;
# -fno-fast-math undoes what CFLAGS may have brought, at the link too, where GCC would add code that flushes denormals.
IEEE = ["-fno-fast-math"]
FLAGS = [*IEEE, "-O3", "-ffp-contract=off", "-fno-math-errno"]
X86_64 = platform.machine().lower() in ("x86_64", "amd64")
# One source of the loops, one module for each instruction set: (module, flags).
# The loops are written once and specialised by inlining with constant arguments: that must not be left to a size limit.
INLINE = ["-DCYTHON_INLINE=inline __attribute__((always_inline))"]
VARIANTS = [("_baseline", INLINE)] + ([("_x86_64_v3", [*INLINE, "-march=x86-64-v3"])] if X86_64 else [])
STEPS = ["task", "kept", "adam", "many", "owned", "tensors"]
MODULES = ["_cpu", "dispatch", "dlpack", "buffers", "arrays", "threads", *STEPS]

DEBUG = os.environ.get("CYLORA_DEBUG") == "1"
BUILD = "build/debug" if DEBUG else "build"  # apart, because neither Cython nor setuptools would see that they differ
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": DEBUG,
    "initializedcheck": DEBUG,
    "overflowcheck": DEBUG,
    "cdivision": not DEBUG,
    "embedsignature": False,
    "auto_pickle": False,  # Python's own refusal is clearer, and helper functions less to declare in the stubs
    "autotestdict": False,
    "binding": True,
}

NO_COMPILER = """
cylora is a C extension and its compilation failed: {reason}
It needs a C compiler (GCC 11+ or Clang 12+) and the headers of this Python. Install them with
  Debian, Ubuntu:  apt install gcc python3-dev
  Fedora, RHEL:    dnf install gcc python3-devel
  Alpine:          apk add gcc musl-dev python3-dev
  macOS:           xcode-select --install
and run the same command again. CC=... chooses a compiler that is not called cc or gcc.
"""


class BuildKernels(build_ext):
    """build_ext that says what to install when there is no working compiler."""

    def run(self) -> None:
        """Build, or say what is missing."""
        try:
            super().run()
        except (CCompilerError, CompileError, ExecError, PlatformError, OSError) as error:
            raise SystemExit(NO_COMPILER.format(reason=error)) from error


def extension(module: str, flags: list[str]) -> Extension:
    """Return one kernel module."""
    return Extension(
        f"cylora.kernels.{module}",
        [f"src/cylora/kernels/{module}.pyx"],
        extra_compile_args=FLAGS + flags,
        extra_link_args=IEEE,
        depends=["setup.py"],
    )


setup(
    ext_modules=cythonize(
        [extension(module, flags) for module, flags in [(name, []) for name in MODULES] + VARIANTS],
        compiler_directives=DIRECTIVES,
        build_dir=f"{BUILD}/cython",
        include_path=["src"],
    ),
    cmdclass={"build_ext": BuildKernels},
    options={"build": {"build_base": BUILD}},
)
