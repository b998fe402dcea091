"""Moments: Adam's running means m and v of all parameters, in one of three forms."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cylora import checks
from cylora.config import STATE_DTYPES
from cylora.errors import StateError
from cylora.flat import FloatArray, aligned_together

__all__ = ["Moments", "checked_sizes"]

CHUNK = 256  # elements of 8-bit state that share an exponent
PART = 2**18  # elements that are decoded at a time, a multiple of CHUNK
# What the kernels call each form, and the types in which m and v are stored.
KINDS = {"float32": 0, "bfloat16": 2, "8bit": 3}
STORED = {"float32": (np.float32, np.float32), "bfloat16": (np.uint16, np.uint16), "8bit": (np.int8, np.uint8)}
assert tuple(KINDS) == STATE_DTYPES


def _from_bfloat16(bits: NDArray[np.uint16]) -> FloatArray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _from_codes(codes: NDArray[Any], exponents: NDArray[np.uint8]) -> FloatArray:
    """Decode (|code| * 2^20 + c) - c, all as bits of float32; c = 2^(exponent - 127) of the chunk."""
    base = np.repeat(exponents, CHUNK)[: codes.size].astype(np.uint32) << 23
    magnitude = (np.abs(codes.astype(np.int32)).astype(np.uint32) << 20) + base
    values: FloatArray = magnitude.view(np.float32) - base.view(np.float32)
    return np.where(codes < 0, -values, values)


def checked_sizes(name: str, sizes: Any) -> tuple[int, ...]:
    """Return the sizes of parts that a saved state lists, or raise StateError."""
    if not isinstance(sizes, list | tuple) or not sizes:
        raise StateError(f"{name} must be a list of at least one size, got {sizes!r:.80}")
    return tuple(checks.integer(name, size, 1, error=StateError) for size in sizes)


def _as_sizes(sizes: int | Sequence[int]) -> tuple[int, ...]:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)


def _chunks(sizes: tuple[int, ...]) -> int:
    return sum(-(-size // CHUNK) for size in sizes)


class Moments:
    """First and second raw moments, not bias-corrected, zero at first.

    Parameters
    ----------
    sizes : int or sequence of int
        How many parameters; in parts that follow rules of their own, how many each has. Chunks begin anew in each part.
    dtype : "float32", "bfloat16" or "8bit"
        8, 4 or 2.01 bytes for each parameter. What the compact forms do is in `LoraTrainingConfig.state_dtype`.
    """

    __slots__ = ("dtype", "m_exponents", "size", "sizes", "stored_m", "stored_v", "v_exponents")

    def __init__(self, sizes: int | Sequence[int], dtype: str = "float32") -> None:
        self.sizes, self.dtype = _as_sizes(sizes), dtype
        self.size = size = sum(self.sizes)
        self.stored_m: NDArray[Any]
        self.stored_v: NDArray[Any]
        self.stored_m, self.stored_v = aligned_together(size, tuple(zip(STORED[dtype], (2, 3), strict=True)))
        chunks = _chunks(self.sizes) if dtype == "8bit" else 0
        self.m_exponents: NDArray[np.uint8] = np.zeros(chunks, np.uint8)
        self.v_exponents: NDArray[np.uint8] = np.zeros(chunks, np.uint8)

    def buffers(self) -> tuple[Any, ...]:
        """Return the storage kind's number and the live arrays' bytes, for a kernel that updates them."""
        arrays = (self.stored_m, self.stored_v, self.m_exponents, self.v_exponents)
        return (KINDS[self.dtype], *(array.view(np.uint8) for array in arrays))

    @property
    def m(self) -> FloatArray:
        """First moments, float32, read-only: a live view, or of compact state a decoded copy."""
        return self._shown(self.stored_m, self.m_exponents)

    @property
    def v(self) -> FloatArray:
        """Second moments, likewise."""
        return self._shown(self.stored_v, self.v_exponents)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    def to_dict(self) -> dict[str, Any]:
        """Return the form's name and copies of the arrays as they are stored."""
        return {"dtype": self.dtype} | {name: array.copy() for name, array in self.arrays().items()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], sizes: int | Sequence[int]) -> Self:
        """Return the moments of parts of these sizes that made ``state``, or raise StateError."""
        dtype = state.get("dtype")
        if not isinstance(dtype, str) or dtype not in STATE_DTYPES:
            raise StateError(f"adam dtype must be one of {', '.join(map(repr, STATE_DTYPES))}, got {dtype!r}")
        forms = cls.forms(sizes, dtype)
        checks.items("adam moments", state, ("dtype", *forms), StateError)
        # Before memory is taken: the size is only what a layout claims.
        given = [checks.array(f"adam {name}", state[name], *form, StateError) for name, form in forms.items()]
        moments = cls(sizes, dtype)
        for mine, array in zip(moments.arrays().values(), given, strict=True):
            mine[...] = array
        moments.check()
        return moments

    def copy(self) -> Self:
        """Return moments of their own with the same numbers."""
        new = type(self)(self.sizes, self.dtype)
        for mine, theirs in zip(new.arrays().values(), self.arrays().values(), strict=True):
            mine[...] = theirs
        return new

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the live arrays by name, as they are stored."""
        stored = {"m": self.stored_m, "v": self.stored_v}
        exponents = {"m_exponents": self.m_exponents, "v_exponents": self.v_exponents}
        return stored | exponents if self.dtype == "8bit" else stored

    @staticmethod
    def forms(sizes: int | Sequence[int], dtype: str) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Return name, dtype and shape of the arrays that store the moments of parts of these sizes."""
        sizes = _as_sizes(sizes)
        size = sum(sizes)
        forms: dict[str, tuple[Any, tuple[int, ...]]] = {
            name: (stored, (size,)) for name, stored in zip("mv", STORED[dtype], strict=True)
        }
        chunks = (np.uint8, (_chunks(sizes),))
        return forms | ({"m_exponents": chunks, "v_exponents": chunks} if dtype == "8bit" else {})

    def _shown(self, stored: NDArray[Any], exponents: NDArray[np.uint8]) -> FloatArray:
        values: FloatArray
        if self.dtype == "float32":
            values = stored.view()
        else:
            decoded = [self._decoded(stored, exponents, *where) for where in self._ranges(PART)]
            values = np.concatenate(decoded) if decoded else np.zeros(0, np.float32)
        values.flags.writeable = False
        return values

    def _decoded(self, stored: NDArray[Any], exponents: NDArray[np.uint8], where: slice, chunks: slice) -> FloatArray:
        if self.dtype == "float32":
            plain: FloatArray = stored[where]
            return plain
        if self.dtype == "bfloat16":
            return _from_bfloat16(stored[where])
        return _from_codes(stored[where], exponents[chunks])

    def _ranges(self, most: int) -> Iterator[tuple[slice, slice]]:
        """Yield what lies together, at most ``most`` elements (a multiple of CHUNK): elements, and their chunks."""
        begin = chunk = 0
        for size in self.sizes:
            for start in range(0, size, most):
                stop = min(start + most, size)
                yield slice(begin + start, begin + stop), slice(chunk + start // CHUNK, chunk + -(-stop // CHUNK))
            begin, chunk = begin + size, chunk + _chunks((size,))

    def check(self) -> None:
        """Raise StateError unless every moment is finite and v is not negative."""
        # c times the last code, 2^16 or 2^32, must stay finite with a square to spare.
        for name, limit in (("m_exponents", 254 - 16 - 1), ("v_exponents", 254 - 32 - 1)):
            largest = int(getattr(self, name).max(initial=0))
            if largest > limit:
                raise StateError(f"adam {name} must be at most {limit}, got {largest}")
        for where in self._ranges(PART):  # compact forms, decoded whole, would take more memory than the moments
            m = self._decoded(self.stored_m, self.m_exponents, *where)
            v = self._decoded(self.stored_v, self.v_exponents, *where)
            for name, values in (("m", m), ("v", v)):
                if not np.isfinite(values).all():
                    raise StateError(f"adam {name} must be finite, got {values[~np.isfinite(values)][0]}")
            if (v < 0).any():
                raise StateError(f"adam v must be >= 0, got {v.min()}")
