"""FlatBuffer: one aligned float32 vector with named, shaped views into it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cylora import checks
from cylora.errors import ConfigError, InputError

__all__ = ["FlatBuffer", "FloatArray", "Layout", "aligned_together", "aligned_zeros", "locate"]

FloatArray = NDArray[np.float32]
Layout = tuple[tuple[str, tuple[int, ...]], ...]

# A cache line: elsewhere, where NumPy's arrays start, loads straddle lines.
ALIGNMENT = 64
# A CPU tells a load from an earlier store by the low 12 bits of their addresses first. Vectors that are walked together
# and start at the same place in their pages look alike to it, which costs up to a quarter of a step; a quarter page
# apart they do not. NumPy's large arrays start at the beginning of a page, so phase 0 is the gradients'.
PAGE = 4096
PHASED_SIZE = 2**15  # elements; below, NumPy's arrays start anywhere, and a page for each vector would count
# Of fewer elements, down to so many, only vectors in one block are kept apart, by so much: it saves up to a tenth.
APART_SIZE, APART = 4096, 512
MAX_SIZE = 2**60  # elements: more bytes than that NumPy cannot count


def _checked(layout: Iterable[tuple[str, tuple[int, ...]]]) -> Layout:
    try:
        checked = tuple((name, tuple(checks.integer("a size", n, 0) for n in shape)) for name, shape in layout)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"layout must be (name, shape) pairs with sizes >= 0, got {layout!r} ({error})") from None
    names = [name for name, _ in checked]
    if len(set(names)) != len(names):
        raise ConfigError(f"layout must not repeat a name, got {', '.join(map(str, names))}")
    return checked


def aligned_zeros(size: int, dtype: DTypeLike, *, phase: int) -> NDArray[Any]:
    """Return a zeroed vector at a 64-byte boundary, a large one in the given quarter of a memory page."""
    (vector,) = aligned_together(size, ((dtype, phase),))
    return vector


def aligned_together(size: int, forms: Sequence[tuple[DTypeLike, int]]) -> list[NDArray[Any]]:
    """Return zeroed vectors of ``size`` elements as `aligned_zeros` does, (dtype, phase) of each, in one block.

    That leaves less memory unused than a block for each.
    """
    period, first = (PAGE, forms[0][1] * PAGE // 4) if size >= PHASED_SIZE else (ALIGNMENT, 0)
    # As if another vector, such as the parameters, lay just before: that is where an allocator mostly puts it.
    starts, end = [first - 4 * size], first
    places: list[tuple[int, int, DTypeLike]] = []
    for dtype, phase in forms:
        start = end + -end % ALIGNMENT
        if size >= PHASED_SIZE:
            start = end + (phase * PAGE // 4 - end) % PAGE
        elif size >= APART_SIZE and len(forms) > 1:
            while any((start - other + APART) % PAGE < 2 * APART for other in starts):
                start += ALIGNMENT
        end = start + size * np.dtype(dtype).itemsize
        starts.append(start)
        places.append((start - first, end - first, dtype))
    raw = np.zeros(end - first + period, np.uint8)
    begin = (first - raw.ctypes.data) % period
    return [raw[begin + start : begin + stop].view(dtype) for start, stop, dtype in places]


class FlatBuffer:
    """A zeroed float32 vector, 64-byte aligned, holding arrays one after the other without gaps.

    Parameters
    ----------
    layout : iterable of (name, shape)
        In memory order. Names are unique.
    phase : int in 0..3
        Which quarter of a memory page a large vector starts in: 0 for gradients, 1 parameters, 2 and 3 the moments.
    over : float32 array (sum of sizes,), C-contiguous, optional
        Memory to use instead of new zeros.

    Attributes
    ----------
    vector : float32 array, shape (sum of sizes,), written through every view
    layout : tuple of (name, shape)

    Raises
    ------
    ConfigError, InputError
        If the layout or ``over`` breaks its rule.
    """

    __slots__ = ("_views", "layout", "vector")

    def __init__(
        self, layout: Iterable[tuple[str, tuple[int, ...]]], *, phase: int = 0, over: FloatArray | None = None
    ) -> None:
        self.layout: Layout = _checked(layout)
        phase = checks.integer("phase", phase, 0, 3)
        size = sum(math.prod(shape) for _, shape in self.layout)
        if size > MAX_SIZE:
            raise ConfigError(f"layout must have at most {MAX_SIZE} elements, got {size}")
        self.vector: FloatArray
        if over is None:
            self.vector = aligned_zeros(size, np.float32, phase=phase)
        else:
            self.vector = checks.vector("over", over, size, InputError)
        self._lay_views()

    def _lay_views(self) -> None:
        self._views: dict[str, FloatArray] = {}
        start = 0
        for name, shape in self.layout:
            stop = start + math.prod(shape)
            self._views[name] = self.vector[start:stop].reshape(shape)
            start = stop

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle with views into the new vector, not beside it."""
        return _restored, (self.layout, self.vector.ctypes.data % PAGE * 4 // PAGE, self.vector.copy())

    def __getitem__(self, name: str) -> FloatArray:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def part(self, start: int, layout: Iterable[tuple[str, tuple[int, ...]]]) -> "FlatBuffer":
        """Return a FlatBuffer over this one's memory from element ``start`` on, under another layout."""
        layout = tuple(layout)
        size = sum(math.prod(shape) for _, shape in layout)
        return FlatBuffer(layout, over=self.vector[start : start + size])

    def like(self) -> "FlatBuffer":
        """Return a zeroed FlatBuffer of the same layout."""
        new = FlatBuffer(self.layout)
        new.layout = self.layout  # the same object, so that comparing layouts is one comparison of addresses
        return new

    def over(self, vector: FloatArray) -> "FlatBuffer":
        """Return a FlatBuffer of the same layout whose memory is ``vector``.

        Parameters
        ----------
        vector : float32 array (sum of sizes,), C-contiguous. Where it is read-only, so are all views.

        Raises
        ------
        InputError   If ``vector`` breaks its rule.
        """
        new = FlatBuffer.__new__(FlatBuffer)  # the layout is checked: doing it again would take most of the time
        new.layout = self.layout
        new.vector = checks.readable_vector("vector", vector, self.vector.size, InputError)
        new._lay_views()
        return new

    def locate(self, index: int) -> tuple[str, tuple[int, ...]]:
        """Return the name of the array that holds element ``index`` of the vector, and the place in it."""
        return locate(self.layout, index)


def locate(layout: Layout, index: int) -> tuple[str, tuple[int, ...]]:
    """Return the name of the array that holds element ``index`` of a vector of this layout, and the place in it."""
    for name, shape in layout:
        size = math.prod(shape)
        if index < size:
            return name, tuple(int(i) for i in np.unravel_index(index, shape))
        index -= size
    raise IndexError("index is past the end of the buffer")


def _restored(layout: Layout, phase: int, values: FloatArray) -> FlatBuffer:
    buffer = FlatBuffer(layout, phase=phase)
    buffer.vector[...] = values
    return buffer
