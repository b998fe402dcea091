"""Fixtures that every test module may use: the instruction set under test, and float32 arrays at chosen addresses.

The suite runs once for each instruction set: ``CYLORA_ISA=baseline pytest`` and plain ``pytest``.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from cylora import cli, optimizer

CACHE_LINE = 64

# Every run draws the same examples: a failure on one machine is a failure on all of them.
settings.register_profile("cylora", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("cylora")

FloatsAt = Callable[..., NDArray[np.float32]]


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Return a function that puts numbers into the log and, with ``--junitxml``, into the report."""

    def record(**numbers: object) -> None:
        print(", ".join(f"{name} {number}" for name, number in numbers.items()))
        for name, number in numbers.items():
            record_property(name, number)

    return record


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Return a function that runs the `cylora` command here and returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> SimpleNamespace:
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


def pytest_report_header() -> str:
    """Say in the log which loops were tested."""
    return f"cylora: instruction set {optimizer.isa}, built: {', '.join(optimizer.variants)}"


@pytest.fixture(scope="session")
def isa() -> str:
    """Return the name of the instruction set whose loops this run uses."""
    return optimizer.isa


@pytest.fixture(scope="session")
def floats_at() -> FloatsAt:
    """Return a function that makes a float32 vector at a given address modulo 64: 0 is aligned, 4 is not."""

    def make(values: int | NDArray[np.float32], offset: int = 0) -> NDArray[np.float32]:
        """Return ``values`` (or that many zeros) as float32 at ``offset`` bytes past a multiple of 64."""
        source = np.zeros(values, np.float32) if isinstance(values, int) else np.asarray(values, np.float32)
        raw = np.zeros(source.nbytes + 2 * CACHE_LINE, np.uint8)
        start = -raw.ctypes.data % CACHE_LINE + offset
        placed = raw[start : start + source.nbytes].view(np.float32)
        placed[...] = source
        assert source.size == 0 or placed.ctypes.data % CACHE_LINE == offset
        return placed

    return make
