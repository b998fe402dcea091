"""What is measured on: the sizes and their inputs."""

import math
from dataclasses import dataclass

import numpy as np

# Gradients are normal numbers times one of these over sqrt(size), so the norms are about 5 (clipped, as the timed
# steps are), 0.5 (not clipped) and 20.
CHECK_NORMS = (5.0, 0.5, 20.0)


@dataclass(frozen=True, slots=True)
class Case:
    """Adapters by (d_in, d_out, rank); their A and B matrices hold all parameters."""

    name: str
    adapters: tuple[tuple[int, int, int], ...]

    @property
    def matrix_shapes(self) -> list[tuple[int, int]]:
        """A (rank, d_in) then B (d_out, rank) of each adapter."""
        return [shape for d_in, d_out, rank in self.adapters for shape in ((rank, d_in), (d_out, rank))]

    @property
    def parameters(self) -> int:
        """Number of elements of all matrices."""
        return sum(rows * columns for rows, columns in self.matrix_shapes)

    @property
    def is_model(self) -> bool:
        """More than one adapter."""
        return len(self.adapters) > 1


CASES = (
    Case("192", ((16, 8, 8),)),
    Case("8,192", ((512, 512, 8),)),
    Case("131,072", ((4096, 4096, 16),)),
    Case("1,048,576", ((8192, 8192, 64),)),
    Case("448 x 4,096", ((512, 512, 8),) * 224),
    Case("10,485,760", ((8192, 32768, 256),)),
    Case("448 x 65,536", ((4096, 4096, 16),) * 224),
    Case("41,943,040", ((32768, 131072, 256),)),
)
ONE = CASES[1]  # what each of many adapters with a trainer of its own is
MANY = Case("10,000 adapters", ONE.adapters * 10_000)
SOME = Case("500 adapters", ONE.adapters * 500)


def case_named(name: str) -> Case:
    """Find a case by its name; thousands separators may be left out."""
    known = (*CASES, SOME, MANY)
    for case in known:
        if name.replace(",", "") == case.name.replace(",", ""):
            return case
    raise ValueError(f"case must be one of {', '.join(repr(case.name) for case in known)}, got {name!r}")


def split(flat: np.ndarray, case: Case) -> list[np.ndarray]:
    """Return views of a flat vector in the shapes of the case's matrices."""
    views, start = [], 0
    for rows, columns in case.matrix_shapes:
        views.append(flat[start : start + rows * columns].reshape(rows, columns))
        start += rows * columns
    return views


def initial_parameters(case: Case) -> np.ndarray:
    """Make flat float32 parameters, of the size that trained adapters have."""
    rng = np.random.default_rng(1)
    return rng.standard_normal(case.parameters, dtype=np.float32) * np.float32(0.05)


def gradient(case: Case, index: int = 0, dtype: str = "float32") -> np.ndarray:
    """Make a flat float32 gradient of values that ``dtype`` can hold; number 0 is the one that is timed."""
    rng = np.random.default_rng(10 + index)
    values = rng.standard_normal(case.parameters, dtype=np.float32)
    values *= np.float32(CHECK_NORMS[index] / math.sqrt(case.parameters))
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        bits += 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
        bits &= 0xFFFF0000
    return values
