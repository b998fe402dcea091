"""The compact forms of Adam's moments, read off their description: bfloat16; 8-bit codes of c (2^e (1 + f/8) - 1).

In float64, from a table of every code, so that it shares neither a shift nor a rounding with what it judges.
"""

from typing import Any, NamedTuple

import kernel_calls
import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Codes = NDArray[Any]

CHUNK = 256
LAST_M, LAST_V = 127, 255  # 16 octaves, and m has the code's sign; 32 octaves
LEVELS = np.array([2.0**e * (1.0 + f / 8.0) - 1.0 for e in range(32) for f in range(8)])  # in units of c
KINDS = {"float32": 0, "bfloat16": 2, "8bit": 3}


class State(NamedTuple):
    """Moments as they are stored, exponents only for 8 bits."""

    form: str
    m: Codes
    v: Codes
    m_exponents: NDArray[np.uint8]
    v_exponents: NDArray[np.uint8]

    def copy(self) -> "State":
        return State(self.form, *(x.copy() for x in self[1:]))

    def stored(self) -> kernel_calls.Stored:
        return kernel_calls.Stored(KINDS[self.form], *self[1:])

    def decoded(self) -> tuple[Doubles, Doubles]:
        """Return m and v as they are meant."""
        if self.form == "float32":
            return self.m.astype(np.float64), self.v.astype(np.float64)
        if self.form == "bfloat16":
            m, v = ((x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for x in (self.m, self.v))
            return m, v
        codes = self.m.astype(np.int64)
        m = np.sign(codes) * LEVELS[np.abs(codes)] * unit(self.m_exponents, self.m.size)
        return m, LEVELS[self.v] * unit(self.v_exponents, self.v.size)


def unit(exponents: NDArray[np.uint8], n: int) -> Doubles:
    """Return c of each of n elements."""
    return np.ldexp(1.0, exponents.astype(np.int64) - 127).repeat(CHUNK)[:n]


def zero(form: str, n: int) -> State:
    m, v = {"float32": "ff", "bfloat16": "HH", "8bit": "bB"}[form]
    exponents = -(-n // CHUNK) if form == "8bit" else 0
    empty = [np.zeros(exponents, np.uint8) for _ in "mv"]
    return State(form, np.zeros(n, m), np.zeros(n, v), *empty)


class Neighbours(NamedTuple):
    """The stored numbers next to exact magnitudes, below and above; the share of the gap that lies below each."""

    below: Doubles
    above: Doubles
    share: Doubles


def neighbours_of_bfloat16(x: Doubles) -> Neighbours:
    """Of magnitudes: bfloat16 has 8 significant bits down to 2^-126 and multiples of 2^-133 below."""
    gap = np.ldexp(1.0, np.maximum(np.frexp(x)[1], -125) - 8)
    below = np.floor(x / gap) * gap
    return Neighbours(below, below + gap, (x - below) / gap)


def neighbours_of_codes(x: Doubles, c: Doubles, last: int) -> Neighbours:
    """Of magnitudes not above the last level."""
    place = np.clip(np.searchsorted(LEVELS, x / c, side="right") - 1, 0, last)
    below, above = LEVELS[place] * c, LEVELS[np.minimum(place + 1, last)] * c
    return Neighbours(below, above, (x - below) / np.where(above > below, above - below, 1.0))
