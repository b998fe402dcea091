"""FlatBuffer: one vector, named views, the place of an element, and copies that stay whole."""

import copy
import pickle

import numpy as np
import pytest
from training import same_bits

from cylora import ConfigError, FlatBuffer, InputError

LAYOUT = (("x", (2, 3)), ("y", (5,)), ("z", ()), ("empty", (0, 4)), ("w", (1, 2, 2)))
SIZE = 6 + 5 + 1 + 0 + 4


def test_views_lie_one_after_the_other_in_the_vector() -> None:
    flat = FlatBuffer(LAYOUT)
    assert flat.vector.shape == (SIZE,)
    assert flat.vector.dtype == np.float32
    assert not flat.vector.any()
    flat.vector[...] = np.arange(SIZE)
    assert flat["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert flat["y"].tolist() == [6, 7, 8, 9, 10]
    assert flat["z"].tolist() == 11
    assert flat["empty"].shape == (0, 4)
    flat["w"][0, 1, 1] = 99
    assert flat.vector[-1] == 99
    assert list(flat) == ["x", "y", "z", "empty", "w"]
    assert len(flat) == 5
    assert flat.layout == LAYOUT


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000, 4095, 4096, 5000, 100_000])
def test_vector_is_aligned_to_a_cache_line(size: int) -> None:
    for phase in range(4):
        assert FlatBuffer([("x", (size,))], phase=phase).vector.ctypes.data % 64 == 0


def test_large_vectors_of_different_phases_start_a_quarter_page_apart() -> None:
    starts = [FlatBuffer([("x", (1 << 16,))], phase=phase).vector.ctypes.data % 4096 for phase in range(4)]
    assert starts == [0, 1024, 2048, 3072]


def test_over_uses_the_given_memory() -> None:
    memory = np.arange(SIZE, dtype=np.float32)
    flat = FlatBuffer(LAYOUT, over=memory)
    flat["z"][...] = -1
    assert memory[11] == -1


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (
            np.zeros(5, np.float32),
            r"over must be a writable float32 array of shape \(16,\), got float32 of shape \(5,\)",
        ),
        (np.zeros(16), "got float64"),
        ([0.0] * 16, "got list"),
        (np.zeros(32, np.float32)[::2], "over must be C-contiguous and aligned"),
    ],
)
def test_over_is_checked(over: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FlatBuffer(LAYOUT, over=over)


@pytest.mark.parametrize("is_writable", [True, False])
def test_the_method_over_lays_the_same_views_over_other_memory(is_writable: bool) -> None:
    flat, memory = FlatBuffer(LAYOUT), np.arange(SIZE, dtype=np.float32)
    memory.flags.writeable = is_writable
    other = flat.over(memory)
    assert other.layout is flat.layout
    assert list(other) == list(flat)
    assert other.vector.ctypes.data == memory.ctypes.data
    for name, shape in LAYOUT:
        assert other[name].shape == shape
        assert other[name].flags.writeable == is_writable
    assert other["w"].tolist() == [[[12, 13], [14, 15]]]
    assert not flat.vector.any()
    copied = copy.deepcopy(other)  # a copy is new memory
    copied.vector[0] = 99
    assert other["x"][0, 0] == 0


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (np.zeros(5, np.float32), r"vector must be a float32 array of shape \(16,\), got float32 of shape \(5,\)"),
        (
            np.zeros((16, 1), np.float32),
            r"vector must be a float32 array of shape \(16,\), got float32 of shape \(16, 1\)",
        ),
        (np.zeros(16), r"vector must be a float32 array of shape \(16,\), got float64 of shape \(16,\)"),
        (np.zeros(16, ">f4"), r"vector must be a float32 array of shape \(16,\), got >f4 of shape \(16,\)"),
        ([0.0] * 16, r"vector must be a float32 array of shape \(16,\), got list"),
        (
            np.zeros(32, np.float32)[::2],
            r"vector must be C-contiguous and aligned, got aligned memory with strides \(8,\)",
        ),
        (np.zeros(65, np.uint8)[1:].view(np.float32), "vector must be C-contiguous and aligned, got misaligned memory"),
    ],
)
def test_the_method_over_checks_the_memory(over: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FlatBuffer(LAYOUT).over(over)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([("a", (2,)), ("b", (1,)), ("a", (2,))], "layout must not repeat a name, got a, b, a"),
        ([("a", 5)], r"layout must be \(name, shape\) pairs with sizes >= 0, got"),
        ([("a", (-1,))], "pairs with sizes >= 0.*got -1"),
        ([("a", (1.5,))], "pairs with sizes >= 0"),
        (["abc"], "pairs with sizes >= 0"),
        (7, "pairs with sizes >= 0"),
        ([("a", (2**40, 2**40))], f"layout must have at most {2**60} elements, got {2**80}"),
    ],
)
def test_layout_is_checked(layout: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlatBuffer(layout)


def test_phase_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"phase must be an integer in \[0, 3\], got 4"):
        FlatBuffer(LAYOUT, phase=4)


def test_nothing_at_all_is_a_layout() -> None:
    assert FlatBuffer([]).vector.shape == (0,)


def test_part_shares_the_memory_under_another_layout() -> None:
    flat = FlatBuffer(LAYOUT)
    part = flat.part(6, iter([("left", (2,)), ("right", (3,))]))
    part["right"][...] = 4
    assert flat["y"].tolist() == [0, 0, 4, 4, 4]


def test_like_is_zeroed_and_of_the_same_layout_object() -> None:
    flat = FlatBuffer(LAYOUT)
    flat.vector[...] = 1
    other = flat.like()
    assert other.layout is flat.layout
    assert not other.vector.any()
    assert not np.shares_memory(other.vector, flat.vector)


def test_locate_finds_every_element() -> None:
    flat = FlatBuffer(LAYOUT)
    for index in range(SIZE):
        name, place = flat.locate(index)
        flat.vector[...] = 0
        flat[name][place] = 1
        assert np.flatnonzero(flat.vector).tolist() == [index]
        assert all(type(i) is int for i in place)
    with pytest.raises(IndexError, match="index is past the end of the buffer"):
        flat.locate(SIZE)


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, lambda flat: pickle.loads(pickle.dumps(flat))])
@pytest.mark.parametrize("size", [3, 1 << 16])
def test_copies_keep_views_and_vector_together(copy_of, size: int) -> None:
    """Copied attribute by attribute, the views would be arrays of their own: writing to one would miss the vector."""
    flat = FlatBuffer([("a", (size,)), ("b", (2,))], phase=1)
    flat.vector[...] = np.random.default_rng(0).normal(size=size + 2)
    twin = copy_of(flat)
    assert same_bits(twin.vector, flat.vector)
    assert twin.vector.ctypes.data % 64 == 0
    assert twin.vector.ctypes.data % 4096 == flat.vector.ctypes.data % 4096 or size == 3
    twin["b"][...] = 7
    assert twin.vector[-2:].tolist() == [7, 7]
    assert not np.shares_memory(twin.vector, flat.vector)
    assert same_bits(twin["a"], flat["a"])
