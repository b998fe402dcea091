"""What adapters become for files that every server loads: one rank and one alpha for all of them.

Loaders read rank and alpha once for a file and scale by alpha / rank; few know rsLoRA, fewer a rank of its own for some
modules. B @ A times its scale can stay what it is all the same: a smaller rank is filled up with zeros, and where the
scale differs from the common one, B is multiplied by the ratio. A set that is uniform already is not touched.
"""

import math
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from cylora.adapter import LoraAdapter
from cylora.config import LoraConfig
from cylora.flat import FloatArray
from cylora.formats.weights import require_finite

__all__ = ["Folded", "fold"]


class Folded(NamedTuple):
    """Adapters of one rank and one alpha, without rsLoRA: each is worth alpha / rank * B @ A.

    ``tensors`` maps each name to A (rank, d_in) and B (d_out, rank), float32: views of the adapter's own memory where
    nothing had to change.
    """

    rank: int
    alpha: float
    tensors: dict[str, tuple[FloatArray, FloatArray]]


def fold(adapters: Mapping[str, LoraAdapter]) -> Folded:
    """Return the adapters with one rank (the largest) and one alpha, each B @ A times its scale unchanged.

    The alpha is the one that leaves the most B as they are; of several such, the one that multiplies the most others by
    powers of two, which is exact; then the largest, so that the rest shrink. A product is rounded once. What falls
    below 1.2e-38 in magnitude loses bits, and below 7e-46 becomes zero.

    Parameters
    ----------
    adapters : at least one, finite, read only.

    Raises
    ------
    InputError   If a multiplied B does not fit float32: the alphas are too far apart.
    """
    rank = max(adapter.rank for adapter in adapters.values())
    configs = {_squared_scale(adapter.config): adapter.config for adapter in adapters.values()}
    counts = Counter(_squared_scale(adapter.config) for adapter in adapters.values())

    alike: Counter[Fraction] = Counter()  # how many differ from one another by powers of four only
    for scale, count in counts.items():
        alike[_without_fours(scale)] += count

    def merit(scale: Fraction) -> tuple[int, int, Fraction]:
        return counts[scale], alike[_without_fours(scale)], scale

    common = max(counts, key=merit)
    alpha = _alpha_at(configs[common], rank)
    tensors = {}
    for name, adapter in adapters.items():
        a_matrix, b_matrix = adapter.a_matrix, adapter.b_matrix
        if _squared_scale(adapter.config) != common:
            b_matrix = _multiplied(name, b_matrix, _alpha_at(adapter.config, rank) / alpha)
        missing = rank - adapter.rank
        if missing:
            a_matrix, b_matrix = np.pad(a_matrix, ((0, missing), (0, 0))), np.pad(b_matrix, ((0, 0), (0, missing)))
        tensors[name] = (a_matrix, b_matrix)
    return Folded(rank, alpha, tensors)


# ------------------------------------------------------------------ parts


def _squared_scale(config: LoraConfig) -> Fraction:
    """Return alpha^2 / rank^2, or alpha^2 / rank with rsLoRA: squared, every scale is rational and compared exactly."""
    return Fraction(config.alpha) ** 2 / (config.rank if config.use_rslora else config.rank**2)


def _alpha_at(config: LoraConfig, rank: int) -> float:
    """Return the alpha that gives this config's scale at another rank, without rsLoRA."""
    return config.alpha * (rank / config.rank) * (math.sqrt(config.rank) if config.use_rslora else 1.0)


def _without_fours(ratio: Fraction) -> Fraction:
    """Return the ratio times the power of four that leaves two to the power of 0 or 1 in it."""
    numerator, denominator = ratio.as_integer_ratio()
    above, below = ((number & -number).bit_length() - 1 for number in (numerator, denominator))
    return Fraction((numerator >> above) << ((above - below) % 2), denominator >> below)


def _multiplied(name: str, b_matrix: FloatArray, factor: float) -> FloatArray:
    # In float64 and back, so that there is one rounding, and none where the factor is a power of two.
    with np.errstate(over="ignore", invalid="ignore"):
        product: FloatArray = (b_matrix * np.float64(factor)).astype(np.float32)
    require_finite(product, b_matrix, f"{name}.b_matrix times {factor:g}, for the common alpha, must fit float32")
    return product
