"""What is measured on: the sizes, their inputs, and the float64 oracle that every result must match.

The oracle is written like the papers: clipping after Pascanu, Mikolov & Bengio 2013 (scale = max_norm / norm, only
above max_norm), Adam after Kingma & Ba 2015 (algorithm 1), weight decay after Loshchilov & Hutter 2019 (decoupled).
It shares no code with what it judges.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LEARNING_RATE = 3e-4
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
BETA1 = 0.9
BETA2 = 0.999
EPS = 1e-8

# Gradients are normal numbers times one of these over sqrt(size), so the norms are about 5 (clipped, as the timed
# steps are), 0.5 (not clipped) and 20.
CHECK_NORMS = (5.0, 0.5, 20.0)

# A step moves a parameter by at most about one learning rate. Float32 moments err by some 1e-7 of that; the
# parameter itself is rounded once or twice a step.
STEP_TOLERANCE = 1e-5
# NumPy's float32 dot product is off by up to 2e-5 at 10 million elements; cylora's own tests ask for 0.5 ulp.
NORM_TOLERANCE = 1e-4
# The state after the timed loops, where rounding has piled up over 100,000 steps: did all of that work happen?
DRIFT_TOLERANCE = 0.05


class WrongResultError(AssertionError):
    """A peer's result is further from the oracle than the tolerance."""


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
)


def case_named(name: str) -> Case:
    """Find a case by its name; thousands separators may be left out."""
    for case in CASES:
        if name.replace(",", "") == case.name.replace(",", ""):
            return case
    raise ValueError(f"case must be one of {', '.join(repr(case.name) for case in CASES)}, got {name!r}")


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


def gradient(case: Case, index: int = 0) -> np.ndarray:
    """Make a flat float32 gradient; number 0 is the one that is timed."""
    rng = np.random.default_rng(10 + index)
    values = rng.standard_normal(case.parameters, dtype=np.float32)
    values *= np.float32(CHECK_NORMS[index] / math.sqrt(case.parameters))
    return values


def gradient_array(shape: int | tuple[int, ...]) -> np.ndarray:
    """Allocate 16 bytes past a 64-byte boundary: where ``np.empty`` puts large arrays, and the same for every peer.

    Left to chance, the start of an array changes a norm's time by a half.
    """
    size = math.prod(shape) if isinstance(shape, tuple) else shape
    raw = np.empty(size * 4 + 64, np.uint8)
    start = (16 - raw.ctypes.data) % 64
    return raw[start : start + size * 4].view(np.float32).reshape(shape)


def true_norm(flat: np.ndarray) -> float:
    """L2 norm with every square and sum in float64."""
    return math.sqrt(math.fsum(float(np.sum(np.square(flat[w], dtype=np.float64))) for w in _parts(flat.size)))


@lru_cache(maxsize=2)
def true_steps(case: Case, *, clips: bool) -> np.ndarray:
    """Parameters in float64 after one step with each check gradient, moments starting at zero."""
    gradients = [gradient(case, i) for i in range(len(CHECK_NORMS))]
    scales = [min(1.0, MAX_GRAD_NORM / true_norm(g)) if clips else 1.0 for g in gradients]
    result = initial_parameters(case).astype(np.float64)
    for where in _parts(case.parameters):
        theta = result[where]
        m = np.zeros_like(theta)
        v = np.zeros_like(theta)
        for t, (g32, scale) in enumerate(zip(gradients, scales, strict=True), start=1):
            g = scale * g32[where].astype(np.float64)
            m = BETA1 * m + (1 - BETA1) * g
            v = BETA2 * v + (1 - BETA2) * g**2
            m_hat = m / (1 - BETA1**t)
            v_hat = v / (1 - BETA2**t)
            theta = theta - LEARNING_RATE * (m_hat / (np.sqrt(v_hat) + EPS) + WEIGHT_DECAY * theta)
        result[where] = theta
    return result


def check_norm(found: float, flat: np.ndarray) -> float:
    """Relative error of a norm; WrongResultError above NORM_TOLERANCE."""
    truth = true_norm(flat)
    error = abs(found - truth) / truth
    if not error <= NORM_TOLERANCE:
        raise WrongResultError(f"norm must be {truth!r} within {NORM_TOLERANCE:g} relative, got {found!r}")
    return error


def check_clipped(found: np.ndarray, flat: np.ndarray, max_norm: float) -> float:
    """Largest error of clipped gradients over the largest element; WrongResultError above NORM_TOLERANCE."""
    scale = min(1.0, max_norm / true_norm(flat))
    worst = max(float(np.abs(found[w] - scale * flat[w].astype(np.float64)).max()) for w in _parts(flat.size))
    error = worst / (scale * float(np.abs(flat).max()))
    if not error <= NORM_TOLERANCE:
        raise WrongResultError(f"clipped gradients are off by {error:.3g} relative, more than {NORM_TOLERANCE:g}")
    return error


def check_steps(found: np.ndarray, case: Case, *, clips: bool) -> float:
    """Largest error of the parameters after the check gradients, in learning rates.

    WrongResultError where it exceeds STEP_TOLERANCE learning rates a step plus two roundings of the parameter a step.
    """
    truth = true_steps(case, clips=clips)
    steps = len(CHECK_NORMS)
    worst = 0.0
    for where in _parts(case.parameters):
        error = np.abs(found[where] - truth[where])
        allowed = steps * (STEP_TOLERANCE * LEARNING_RATE + 2 * 2.0**-24 * np.abs(truth[where]))
        if not np.all(error <= allowed):
            excess = float(np.max(error / allowed))
            raise WrongResultError(f"parameters are off by {excess:.3g} times the tolerance after {steps} steps")
        worst = max(worst, float(error.max()))
    return worst / LEARNING_RATE


def check_drift(found: np.ndarray, case: Case, steps: int, *, clips: bool) -> float:
    """Where ``steps`` equal gradients must have led; the largest error as a share of the longest way.

    With one constant gradient both bias-corrected moments are constant, so every step subtracts the same c and
    multiplies by d = 1 - learning_rate * weight_decay: theta_n = d**n * theta_0 - c * (1 - d**n) / (1 - d).
    """
    g = gradient(case)
    scale = min(1.0, MAX_GRAD_NORM / true_norm(g)) if clips else 1.0
    start = initial_parameters(case)
    d = 1.0 - LEARNING_RATE * WEIGHT_DECAY
    terms = (1 - d**steps) / (1 - d)
    worst = longest = 0.0
    for where in _parts(case.parameters):
        clipped = scale * g[where].astype(np.float64)
        c = LEARNING_RATE * clipped / (np.abs(clipped) + EPS)
        truth = d**steps * start[where] - c * terms
        worst = max(worst, float(np.abs(found[where] - truth).max()))
        longest = max(longest, float(np.abs(truth - start[where]).max()))
    error = worst / longest
    if not error <= DRIFT_TOLERANCE:
        raise WrongResultError(f"after {steps} timed steps the parameters are off by {error:.3g} of the way they went")
    return error


def _parts(size: int) -> list[slice]:
    """Slices small enough that float64 temporaries stay in cache."""
    return [slice(i, min(i + 65_536, size)) for i in range(0, size, 65_536)]
