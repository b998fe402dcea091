"""Lending: memory comes back when nothing that was made from it can be reached, and not before."""

import ctypes
import gc
import sys
import weakref
from typing import Any

import numpy as np
import pytest

from cylora.serving.lending import Lending

SIZE = 96


def lent(lending: Lending, value: float = 1.0) -> np.ndarray:
    memory = lending.take()
    memory.fill(value)
    return lending.lend(memory)


def comes_back(lending: Lending, address: int) -> bool:
    """Return whether the memory at ``address`` is what is taken next."""
    return lending.take().ctypes.data == address


def test_what_is_lent_is_aligned_whole_and_shares_the_memory() -> None:
    lending = Lending(SIZE)
    memory = lending.take()
    memory[...] = np.arange(SIZE)
    array = lending.lend(memory)
    assert type(array) is np.ndarray
    assert array.dtype == np.float32
    assert array.shape == (SIZE,)
    assert array.ctypes.data == memory.ctypes.data
    assert array.ctypes.data % 64 == 0
    assert np.array_equal(array, np.arange(SIZE))


def test_nobody_can_write_to_what_is_lent() -> None:
    array = lent(Lending(SIZE))
    for one in (array, array[3:9], array.reshape(8, 12).T, array.view(np.uint8), np.asarray(array), memoryview(array)):
        with pytest.raises((ValueError, TypeError), match="read-only"):
            one[...] = 0
        if isinstance(one, np.ndarray):
            with pytest.raises(ValueError, match="cannot set WRITEABLE flag to True"):
                one.flags.writeable = True
            with pytest.raises(ValueError, match="cannot set WRITEABLE flag to True"):
                one.setflags(write=True)
    with pytest.raises(TypeError, match=r"read-only|not writable"):
        (ctypes.c_char * 4).from_buffer(array)
    assert (array == 1).all()


def test_memory_is_used_again_after_the_last_reference() -> None:
    lending = Lending(SIZE)
    array = lent(lending)
    address = array.ctypes.data
    other = array
    del array
    assert not comes_back(lending, address)
    del other
    assert comes_back(lending, address)
    assert lending.allocated == 2


class Interface:
    """Somebody else's object that lends a foreign array on, as torch's tensors do."""

    def __init__(self, array: np.ndarray) -> None:
        self.__array_interface__ = array.__array_interface__
        self.kept = array


HOLDERS = {
    "a slice": lambda array: array[5:9],
    "a view of a view of a view": lambda array: array.reshape(8, 12)[2:].T[1:, ::2],
    "another dtype": lambda array: array.view(np.uint16)[3:],
    "one element": lambda array: array[7:8],
    "no element": lambda array: array[:0],
    "a subclass": lambda array: array[2:].view(np.recarray),
    "broadcast": lambda array: np.broadcast_to(array, (3, SIZE)),
    "as_strided": lambda array: np.lib.stride_tricks.as_strided(array, (2, 3), (4, 4)),
    "an iterator": iter,
    "a flat iterator": lambda array: array.reshape(8, 12).flat,
    "nditer": lambda array: np.nditer(array[4:]),
    "frombuffer": lambda array: np.frombuffer(array, np.uint8),
    "memoryview": memoryview,
    "memoryview of a memoryview of a view": lambda array: memoryview(memoryview(array[4:8]).cast("B"))[3:],
    "array's own .data": lambda array: array.data,
    "the array's base": lambda array: array[3:].base,
    "the lease itself": lambda array: array.base,
    "numpy's array of the lease": lambda array: np.asarray(array.base)[2:],
    "a bound method": lambda array: array[3:].sum,
    "a closure": lambda array: lambda view=array[1:]: view,
    "ctypes over its buffer": lambda array: memoryview(array).cast("B"),
    "a foreign interface": lambda array: np.asarray(Interface(array)),
    "an object array": lambda array: np.array([array[2:4], None], object),
    "a generator": lambda array: (x for x in array[2:]),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_whatever_is_made_from_it_keeps_it(name: str) -> None:
    lending = Lending(SIZE)
    array = lent(lending)
    address = array.ctypes.data
    holder: Any = HOLDERS[name](array)
    del array
    gc.collect()
    assert not comes_back(lending, address)
    del holder
    gc.collect()
    assert comes_back(lending, address)


def test_a_copy_keeps_nothing() -> None:
    lending = Lending(SIZE)
    array = lent(lending)
    address = array.ctypes.data
    copies = [array.copy(), array + 0, array[np.arange(4)], bytes(array.data), array.tolist(), float(array[3])]
    del array
    assert comes_back(lending, address)
    assert np.array_equal(copies[0], np.ones(SIZE))


def test_garbage_that_looks_once_more_still_finds_what_it_held() -> None:
    """A reader in a cycle, whose finalizer reads: the collector must not have taken the lease before it."""
    lending = Lending(SIZE)
    seen: list[float] = []

    class Reader:
        def __init__(self, array: np.ndarray) -> None:
            self.array, self.me = array, self

        def __del__(self) -> None:
            lending.take().fill(-1.0)
            seen.append(float(self.array.sum()))

    Reader(lent(lending))
    gc.collect()
    assert seen == [SIZE]
    lending.take()
    assert lending.allocated == 2  # one for the first reader, one that its finalizer took; that of the reader is back


def test_a_reader_that_comes_back_from_the_dead_keeps_what_it_held() -> None:
    lending = Lending(SIZE)
    alive: list[Any] = []

    class Reader:
        def __init__(self, array: np.ndarray) -> None:
            self.array, self.me = array, self

        def __del__(self) -> None:
            alive.append(self)

    Reader(lent(lending))
    gc.collect()
    lending.take().fill(-1.0)
    assert alive[0].array.sum() == SIZE
    alive[0].me = None


def test_of_what_came_back_one_vector_is_kept() -> None:
    lending = Lending(SIZE)
    arrays = [lent(lending) for _ in range(5)]
    watched = [weakref.ref(array.base._memory) for array in arrays]
    assert lending.allocated == 5
    arrays.clear()
    taken = lending.take()
    assert [one() is taken for one in watched].count(True) == 1
    assert [one() is None for one in watched].count(True) == 4
    assert lending._loans == {}


def test_what_is_lent_outlives_the_lender() -> None:
    lending = Lending(SIZE)
    array = lent(lending)
    memory = weakref.ref(array.base._memory)
    del lending
    gc.collect()
    assert (array == 1).all()
    del array
    assert memory() is None


def test_no_python_code_runs_when_a_reader_lets_go() -> None:
    """Where it runs, a signal's exception could be raised, and of a finalizer's nobody hears."""
    lending = Lending(SIZE)
    array = lent(lending)
    view = array[3:]
    events: list[str] = []
    del array
    sys.setprofile(lambda frame, event, argument: events.append(event))
    view = None  # noqa: F841
    sys.setprofile(None)
    assert set(events) <= {"c_call", "c_return", "c_exception"}  # setprofile's own
    assert len(lending._ended) == 1


def test_what_was_taken_and_not_lent_can_be_given_back() -> None:
    lending = Lending(SIZE)
    memory = lending.take()
    lending.give_back(memory)
    assert lending.take() is memory
    assert lending.allocated == 1
