"""RunningMedian: the median of the last so many numbers of a sequence."""

from bisect import bisect_left, insort
from collections.abc import Iterable

__all__ = ["RunningMedian"]


class RunningMedian:
    """The median of a sequence's last ``window`` numbers, in memory for those alone.

    A number is put at its place in the sequence, so that an interrupted `put` can be done again: it changes nothing
    twice.

    Parameters
    ----------
    window : int >= 1
    values : the sequence so far, oldest first, finite; only the last ``window`` of them count.
    """

    __slots__ = ("_ordered", "_ring", "window")

    def __init__(self, window: int, values: Iterable[float] = ()) -> None:
        self.window = window
        self._ring = list(values)[-window:]  # number i of the sequence is at i % window
        self._ordered: list[float] | None = sorted(self._ring)  # None: to be made anew

    def __len__(self) -> int:
        return len(self._ring)

    def put(self, index: int, value: float) -> None:
        """Take ``value`` as number ``index`` of the sequence, which has that many so far, or this one as its last."""
        place, ordered = index % self.window, self._ordered
        self._ordered = None
        if place == len(self._ring):
            self._ring.append(value)
        else:
            if ordered is not None:
                del ordered[bisect_left(ordered, self._ring[place])]
            self._ring[place] = value
        if ordered is not None:
            insort(ordered, value)
            self._ordered = ordered

    def value(self) -> float | None:
        """Return the median (of an even number the mean of the middle two); None with fewer than ``window``."""
        if len(self._ring) < self.window:
            return None
        if self._ordered is None:
            self._ordered = sorted(self._ring)
        middle = self.window // 2
        if self.window % 2:
            return self._ordered[middle]
        return 0.5 * self._ordered[middle - 1] + 0.5 * self._ordered[middle]

    def values(self, count: int) -> list[float]:
        """Return the kept numbers of a sequence of ``count``, oldest first."""
        first = count % self.window if count > self.window else 0
        return self._ring[first:] + self._ring[:first]
