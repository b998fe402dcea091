"""Every entry point against every kind of memory: the exact result, or an error that names the argument and no write.

The verdict on each combination comes from NumPy's own flags, by a rule written here anew; the result of an accepted one
is compared with that of a plain float32 copy.
"""

import array
import ctypes
import mmap
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from dlpack import FastTensor, NumpyTensor, OldTensor, Tensor
from numpy.lib.stride_tricks import as_strided
from training import D_IN, D_OUT, RANK, fingerprint, make_adapter, make_pair, make_trainer, same_bits

from cylora import (
    Adam,
    AdapterSet,
    Gradients,
    InputError,
    LoraAdapter,
    LoraConfig,
    NonFiniteGradientError,
    clip_grad_norm_,
    grad_norm,
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (
    "<f4", ">f4", "<f8", "<f2", ">f2", "<u2", ">u2", BFLOAT16, BFLOAT16.newbyteorder(">"), "<i2", "<i4", "<u4", "<c8",
    "?", "S4", "O", "V4", "V2", "i1,3i1",
)  # fmt: skip
HALVES = (np.dtype("<f2"), np.dtype("<u2"), BFLOAT16)  # which of them a gradient may have besides float32
LAYOUTS = ("C", "F", "every second", "backwards", "stride 0", "one column of wider rows")
SHAPES = ("matrix", "vector", "with an axis more", "transposed", "a row short", "empty")


class Memory(NamedTuple):
    """One array to hand over, the memory behind it, and what it is called."""

    name: str
    value: np.ndarray
    base: np.ndarray


def _shape(kind: str, rows: int, columns: int) -> tuple[int, ...]:
    return {
        "matrix": (rows, columns), "vector": (rows * columns,), "with an axis more": (1, rows, columns),
        "transposed": (columns, rows), "a row short": (rows - 1, columns), "empty": (0, columns),
    }[kind]  # fmt: skip


def memories(rows: int, columns: int) -> Iterator[Memory]:
    """Yield arrays of each dtype, layout, shape, alignment and writability."""
    for dtype in map(np.dtype, DTYPES):
        for shape_kind in SHAPES:
            shape = _shape(shape_kind, rows, columns)
            size = int(np.prod(shape))
            for layout in LAYOUTS:
                for misaligned in (False, True) if dtype.hasobject is False else (False,):
                    raw = np.zeros((2 * size + 4) * dtype.itemsize + 64, np.uint8)
                    start = -raw.ctypes.data % 64 + (1 if misaligned else 0)
                    if dtype.hasobject:
                        base = whole = np.full(2 * size + 4, 0.5, object)
                    else:
                        base, whole = raw, raw[start : start + (2 * size + 4) * dtype.itemsize].view(dtype)
                    if dtype.str in ("<u2", ">u2"):  # bfloat16 numbers, bit by bit
                        whole[...] = bfloat16_bits(np.arange(whole.size) % 7 + 1)
                    elif dtype.kind in "fiuc?" or dtype == BFLOAT16:
                        whole[...] = (np.arange(whole.size) % 7 + 1).astype(dtype)
                    steps = np.array(np.empty(shape, dtype).strides, int)
                    if layout == "C":
                        value = whole[:size].reshape(shape)
                    elif layout == "F":
                        value = whole[:size].reshape(shape[::-1]).T
                    elif layout == "every second":
                        value = (
                            whole[: 2 * size : 2].reshape(shape)
                            if len(shape) == 1
                            else as_strided(whole, shape, 2 * steps)
                        )
                    elif layout == "backwards":
                        value = whole[:size].reshape(shape)[(slice(None, None, -1),) * len(shape)]
                    elif layout == "stride 0":
                        value = as_strided(whole, shape, (0,) * len(shape))
                    else:
                        value = as_strided(whole, shape, (*(steps[:-1] + dtype.itemsize), steps[-1]))
                    for read_only in (False, True):
                        handed = value.view()
                        handed.flags.writeable = not read_only
                        name = f"{dtype} {shape_kind} {layout} {'misaligned' * misaligned} {'read-only' * read_only}"
                        yield Memory(name, handed, base)


def is_plain(value: np.ndarray) -> bool:
    aligned = value.size == 0 or value.ctypes.data % 4 == 0
    return value.dtype == np.float32 and value.dtype.isnative and value.flags.c_contiguous and aligned


def is_gradient(value: np.ndarray) -> bool:
    aligned = value.size == 0 or value.ctypes.data % 2 == 0
    return is_plain(value) or (value.dtype in HALVES and value.flags.c_contiguous and aligned)


def bfloat16_bits(values: Any) -> np.ndarray:
    """Return the upper halves of float32 numbers, which must be all there is to them."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def repeats(value: np.ndarray) -> bool:
    """Return whether two elements share a byte, by marking each byte."""
    offsets = np.zeros(value.shape, int)
    for axis, stride in enumerate(value.strides):
        offsets = offsets + stride * np.arange(value.shape[axis]).reshape([-1] + [1] * (value.ndim - axis - 1))
    places = (offsets.ravel()[:, None] + np.arange(value.itemsize)).ravel()
    return len(set(places.tolist())) < places.size


def plain(value: np.ndarray) -> np.ndarray:
    """Return the same numbers as a plain float32 array: NumPy widens float16, ml_dtypes bfloat16."""
    if value.dtype == np.uint16:
        value = value.view(BFLOAT16)
    return np.array(value, np.float32, order="C")


class Entry:
    """One argument of one call: who judges it, how it is called, and everything that must not change on an error."""

    def __init__(self, name: str, shape: tuple[int, int], accepts: Callable[[np.ndarray], bool]) -> None:
        self.name, self.shape, self.accepts = name, shape, accepts
        self.adapters = [make_adapter(), make_adapter()]
        self.trainers = [make_trainer(), make_trainer()]
        self.pairs = [make_pair(), make_pair()]
        for trainer, adapter, pair in zip(self.trainers, self.adapters, self.pairs, strict=True):
            trainer.step(1.0, adapter, *pair)

    def call(self, index: int, value: Any) -> Any:
        """Make the call on one of the two equal sides and return its result."""
        trainer, adapter, (a, b) = self.trainers[index], self.adapters[index], self.pairs[index]
        match self.name:
            case "step grad_a":
                return trainer.step(1.0, adapter, value, b)
            case "step grad_b":
                return trainer.step(1.0, adapter, a, value)
            case "step flat":
                return trainer.step(1.0, adapter, value)
            case "accumulate grad_a":
                return trainer.accumulate(1.0, adapter, value, b)
            case "accumulate grad_b":
                return trainer.accumulate(1.0, adapter, a, value)
            case "Adam.step":
                return trainer._adam.apply(value, 0.01)
            case "Adam":
                adam = Adam(value)
                return adam.step(np.ones(value.size, np.float32)), value.tobytes()
            case "grad_norm":
                return grad_norm([a, value])
            case "clip_grad_norm_":
                return clip_grad_norm_([value], 0.25), value.tobytes()
            case "merge_into":
                return adapter.merge_into(value), value.tobytes()
            case "unmerge_from":
                return adapter.unmerge_from(value), value.tobytes()
        raise AssertionError(self.name)

    def side(self, index: int) -> tuple:
        trainer, adapter = self.trainers[index], self.adapters[index]
        pending = trainer._accumulation.state_dict()
        return (
            adapter.flat.vector.tobytes(), trainer._adam.m.tobytes(), trainer._adam.v.tobytes(), trainer._adam.t,
            trainer.total_steps(), trainer.average_loss(),
            pending and (pending["count"], pending["gradient"].tobytes()),
            [part.tobytes() for part in self.pairs[index]],
        )  # fmt: skip

    @property
    def argument(self) -> str:
        return {
            "step grad_a": "grad_a must", "accumulate grad_a": "grad_a must", "step grad_b": "grad_b must",
            "accumulate grad_b": "grad_b must", "step flat": "gradient must", "Adam.step": "gradient must",
            "Adam": "parameters must", "grad_norm": r"grads\[1\] must", "clip_grad_norm_": r"grads\[0\] must",
            "merge_into": "weight must", "unmerge_from": "weight must",
        }[self.name]  # fmt: skip


def _matrix_or_vector(rows: int, columns: int) -> Callable[[np.ndarray], bool]:
    return lambda value: is_gradient(value) and value.shape in ((rows, columns), (rows * columns,))


SIZE = RANK * (D_IN + D_OUT)
A, B, FLAT, WEIGHT = (RANK, D_IN), (D_OUT, RANK), (1, SIZE), (D_OUT, D_IN)


def _weight(value: np.ndarray) -> bool:
    return value.dtype == np.float32 and value.shape == WEIGHT and value.flags.writeable and not repeats(value)


ENTRIES: dict[str, tuple[tuple[int, int], Callable[[np.ndarray], bool]]] = {
    "step grad_a": (A, _matrix_or_vector(*A)),
    "step grad_b": (B, _matrix_or_vector(*B)),
    "step flat": (FLAT, lambda value: is_gradient(value) and value.shape == (SIZE,)),
    "accumulate grad_a": (A, _matrix_or_vector(*A)),
    "accumulate grad_b": (B, _matrix_or_vector(*B)),
    "Adam.step": (FLAT, lambda value: is_gradient(value) and value.shape == (SIZE,)),
    "Adam": (A, lambda value: is_plain(value) and value.ndim == 1 and value.flags.writeable),
    "grad_norm": (A, is_gradient),
    "clip_grad_norm_": (A, lambda value: is_plain(value) and value.flags.writeable),
    "merge_into": (WEIGHT, _weight),
    "unmerge_from": (WEIGHT, _weight),
}


def test_there_are_enough_combinations() -> None:
    assert sum(1 for shape, _ in ENTRIES.values() for _ in memories(*shape)) >= 3000


@pytest.mark.parametrize("name", ENTRIES)
def test_every_memory_gives_the_exact_result_or_a_clear_error(name: str) -> None:
    entry = Entry(name, *ENTRIES[name])
    accepted = refused = 0
    for memory in memories(*entry.shape):
        bytes_before, side_before = memory.base.tobytes(), entry.side(0)
        if entry.accepts(memory.value):
            copy = plain(memory.value)
            assert entry.call(0, memory.value) == entry.call(1, copy), memory.name
            assert entry.side(0) == entry.side(1), memory.name
            if entry.name.startswith(("step", "accumulate", "Adam.", "grad_norm")):
                assert memory.base.tobytes() == bytes_before, memory.name
            accepted += 1
        else:
            with pytest.raises(InputError, match=entry.argument) as caught:
                entry.call(0, memory.value)
            assert "got" in str(caught.value), memory.name
            assert memory.base.tobytes() == bytes_before, memory.name
            assert entry.side(0) == side_before, memory.name
            refused += 1
    assert accepted >= 1
    assert refused >= 300


# ---------------------------------------------------------------- providers other than ndarray

VALUES = np.arange(1, RANK * D_IN + 1, dtype=np.float32)
HALF_BITS = bfloat16_bits(VALUES)


def _mmap() -> memoryview:
    shared = mmap.mmap(-1, VALUES.nbytes)
    shared[:] = VALUES.tobytes()
    return memoryview(shared).cast("f")


def _mmap_of_halves() -> memoryview:
    shared = mmap.mmap(-1, HALF_BITS.nbytes)
    shared[:] = HALF_BITS.tobytes()
    return memoryview(shared).cast("H")


def _closed_mmap() -> mmap.mmap:
    shared = mmap.mmap(-1, 4096)
    shared.close()
    return shared


def _odd(values: np.ndarray) -> np.ndarray:
    """Return a copy at an odd address."""
    memory = np.zeros(values.nbytes + 65, np.uint8)
    start = -memory.ctypes.data % 64 + 1
    copy = memory[start : start + values.nbytes].view(values.dtype)
    copy[...] = values
    return copy


def _released() -> memoryview:
    view = memoryview(VALUES.copy())
    view.release()
    return view


class OnlyArray:
    """What NumPy would convert, but nobody can borrow memory from."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return VALUES.copy()


class Lying:
    """An object whose `flags` raises when an error message asks for it."""

    @property
    def flags(self) -> None:
        raise RuntimeError("no flags")


class Subclass(np.ndarray):
    """An array by another name."""


def _ctypes_matrix() -> Any:
    matrix = ((ctypes.c_float * D_IN) * RANK)()
    for row in range(RANK):
        for column in range(D_IN):
            matrix[row][column] = VALUES[row * D_IN + column]
    return matrix


# name -> (provider, accepted where memory is only read, accepted where it is written too)
PROVIDERS: dict[str, tuple[Callable[[], Any], bool, bool]] = {
    "array.array of floats": (lambda: array.array("f", VALUES), True, True),
    "bytearray as floats": (lambda: memoryview(bytearray(VALUES.tobytes())).cast("f"), True, True),
    "bytes as floats": (lambda: memoryview(VALUES.tobytes()).cast("f"), True, False),
    "mmap as floats": (_mmap, True, True),
    "memoryview of an ndarray": (lambda: memoryview(VALUES.copy()), True, True),
    "memoryview of a matrix": (lambda: memoryview(VALUES.copy().reshape(A)), True, True),
    "memoryview cast to a matrix": (lambda: memoryview(bytearray(VALUES.tobytes())).cast("f", A), True, True),
    "read-only memoryview": (lambda: memoryview(VALUES.copy()).toreadonly(), True, False),
    "ctypes vector": (lambda: (ctypes.c_float * VALUES.size)(*VALUES), True, True),
    "ctypes matrix": (_ctypes_matrix, True, True),
    "subclass of ndarray": (lambda: VALUES.copy().view(Subclass), True, True),
    "pickle.PickleBuffer": (lambda: pickle.PickleBuffer(VALUES.copy()), True, True),
    "array.array of bfloat16 bits": (lambda: array.array("H", HALF_BITS), True, False),
    "bytearray as bfloat16 bits": (lambda: memoryview(bytearray(HALF_BITS.tobytes())).cast("H"), True, False),
    "bytes as bfloat16 bits, a matrix": (lambda: memoryview(HALF_BITS.tobytes()).cast("H", A), True, False),
    "mmap as bfloat16 bits": (_mmap_of_halves, True, False),
    "ctypes vector of bfloat16 bits": (lambda: (ctypes.c_uint16 * VALUES.size)(*HALF_BITS.tolist()), True, False),
    "memoryview of bfloat16 bits": (lambda: memoryview(HALF_BITS.copy().reshape(A)), True, False),
    "float16 at an even address": (lambda: np.append(VALUES, 1).astype("f2")[:-1], True, False),
    "memoryview of float16": (lambda: memoryview(VALUES.astype("f2").reshape(A)).toreadonly(), True, False),
    "subclass of ndarray, float16": (lambda: VALUES.astype("f2").view(Subclass), True, False),
    "subclass of ndarray, bfloat16": (lambda: VALUES.astype(BFLOAT16).view(Subclass), True, False),
    "pickle.PickleBuffer of float16": (lambda: pickle.PickleBuffer(VALUES.astype("f2")), True, False),
    "DLPack": (lambda: Tensor(VALUES.copy()), True, True),
    "DLPack by C functions": (lambda: FastTensor(VALUES.copy().reshape(A)), True, True),
    "DLPack from before versions": (lambda: OldTensor(VALUES.copy()), True, False),
    "DLPack of NumPy": (lambda: NumpyTensor(VALUES.copy()), True, True),
    "DLPack of NumPy, read-only": (lambda: NumpyTensor(np.frombuffer(VALUES.tobytes(), "f4")), True, False),
    "DLPack of NumPy, float16": (lambda: NumpyTensor(VALUES.astype("f2")), True, False),
    "DLPack of bfloat16": (lambda: Tensor(VALUES.astype(BFLOAT16)), True, False),
    "DLPack of NumPy, doubles": (lambda: NumpyTensor(VALUES.astype("f8")), False, False),
    "DLPack of NumPy, every second": (lambda: NumpyTensor(np.repeat(VALUES, 2)[::2]), False, False),
    "DLPack on a GPU": (lambda: Tensor(VALUES, device=(2, 0)), False, False),
    "memoryview of float16 misaligned": (lambda: memoryview(_odd(VALUES.astype("f2"))), False, False),
    "bfloat16 misaligned": (lambda: _odd(VALUES.astype(BFLOAT16)), False, False),
    "every second of a memoryview of halves": (lambda: memoryview(np.repeat(HALF_BITS, 2))[::2], False, False),
    "every second of bfloat16": (lambda: np.repeat(VALUES.astype(BFLOAT16), 2)[::2], False, False),
    "array.array of short ints": (lambda: array.array("h", range(18)), False, False),
    "big-endian ctypes of halves": (ctypes.c_uint16.__ctype_be__ * VALUES.size, False, False),
    "ctypes int16": (ctypes.c_int16 * VALUES.size, False, False),
    "array.array of doubles": (lambda: array.array("d", VALUES), False, False),
    "array.array of ints": (lambda: array.array("i", range(18)), False, False),
    "bytes": (VALUES.tobytes, False, False),
    "bytearray": (lambda: bytearray(VALUES.tobytes()), False, False),
    "mmap": (lambda: mmap.mmap(-1, 72), False, False),
    "closed mmap": (_closed_mmap, False, False),
    "released memoryview": (_released, False, False),
    "every second of a memoryview": (lambda: memoryview(np.repeat(VALUES, 2))[::2], False, False),
    "memoryview backwards": (lambda: memoryview(VALUES.copy())[::-1], False, False),
    "big-endian ctypes": (ctypes.c_float.__ctype_be__ * VALUES.size, False, False),
    "ctypes pointer": (lambda: ctypes.pointer(ctypes.c_float(1)), False, False),
    "ctypes structure": (type("S", (ctypes.Structure,), {"_fields_": [("x", ctypes.c_float)]}), False, False),
    "record array": (lambda: np.zeros(VALUES.size, [("x", "f4")]), False, False),
    "dates": (lambda: np.zeros(VALUES.size, "M8[s]"), False, False),
    "only __array__": (OnlyArray, True, False),
    "flags that raise": (Lying, False, False),
    "list": (VALUES.tolist, False, False),
    "string": (lambda: "1.0" * 18, False, False),
    "generator": (lambda: (x for x in VALUES), False, False),
    "float": (lambda: 1.0, False, False),
    "class": (lambda: np.ndarray, False, False),
}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_providers_of_memory_are_taken_for_what_they_are(provider: str) -> None:
    make, readable, writable = PROVIDERS[provider]
    for name in ("step grad_a", "accumulate grad_a", "grad_norm", "clip_grad_norm_"):
        entry, value = Entry(name, *ENTRIES[name]), make()
        before = entry.side(0)
        if writable if name == "clip_grad_norm_" else readable:
            if name == "clip_grad_norm_":
                expected = VALUES.copy()
                assert clip_grad_norm_([value], 0.25) == clip_grad_norm_([expected], 0.25)
                memory = getattr(value, "values", value)  # of a tensor, the array behind it
                assert (
                    bytes(memoryview(memory).cast("B") if provider != "pickle.PickleBuffer" else memory)
                    == expected.tobytes()
                )
            else:
                assert entry.call(0, value) == entry.call(1, VALUES)
                assert entry.side(0) == entry.side(1)
        else:
            with pytest.raises(InputError, match=entry.argument):
                entry.call(0, value)
            assert entry.side(0) == before


@pytest.mark.parametrize("provider", PROVIDERS)
def test_parameters_and_weights_must_be_arrays(provider: str) -> None:
    """They are kept, or written through NumPy, so another provider is refused rather than copied."""
    make, _, writable = PROVIDERS[provider]
    value = make()
    is_array = isinstance(value, np.ndarray) and writable and value.ndim == 1
    if is_array:
        Adam(value).step(VALUES)
        assert not np.array_equal(value, VALUES)
    else:
        with pytest.raises(InputError, match="parameters must be"):
            Adam(value)
    with pytest.raises(InputError, match="weight must be a writable float32 array of shape"):
        make_adapter().merge_into(value)


# ---------------------------------------------------------------- halves


def halves_of(dtype: Any, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers of ``dtype`` close to ``values``, as a gradient of it, and the very same numbers as float32."""
    if np.dtype(dtype) == np.uint16:
        bits = values.astype(BFLOAT16).view(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32)
    given = values.astype(dtype)
    return given, given.astype(np.float32)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("dtype_a", [np.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype_b", [np.float32, *HALVES], ids=str)
def test_any_mix_of_types_gives_the_bits_of_the_same_numbers_in_float32(
    state_dtype: str, dtype_a: Any, dtype_b: Any
) -> None:
    """A and B meet inside a chunk and a block; a chunk of zeros lies in each, one with negative zeros."""
    rng = np.random.default_rng(3)
    sides = []
    for _ in range(2):
        adapter = LoraAdapter(1999, 611, LoraConfig(rank=5), seed=1)
        sides.append((adapter, make_trainer(state_dtype=state_dtype, max_grad_norm=1.0, weight_decay=0.1)))
    for step in range(4):
        a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 1999), (611, 5)))
        a.ravel()[256:1024] = 0.0
        a.ravel()[-900:] = -0.0
        b.ravel()[:-700] *= step % 2
        (given_a, wide_a), (given_b, wide_b) = halves_of(dtype_a, a), halves_of(dtype_b, b)
        records = []
        for (adapter, trainer), pair in zip(sides, ((given_a, given_b), (wide_a, wide_b)), strict=True):
            records.append(trainer.step(1.0, adapter, *pair))
            trainer.accumulate(1.0, adapter, *pair, weight=0.3)
            trainer.accumulate(2.0, adapter, pair[0].ravel(), pair[1], weight=2.0)
            records.append(trainer.step_accumulated())
        assert records[:2] == records[2:]
        assert grad_norm([given_a, given_b]) == grad_norm([wide_a, wide_b])
        assert fingerprint(*sides[0]) == fingerprint(*sides[1])
    assert same_bits(given_b, halves_of(dtype_b, b)[0]), "gradients are only read"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_finite_half_is_read_exactly(dtype: Any) -> None:
    """All of them, subnormal ones too: alone, so that none hides behind a larger one, and together."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    exponent = 0x7C00 if dtype == np.float16 else 0x7F80
    bits = bits[bits & exponent != exponent]
    given = bits.view(dtype)
    wide = (bits.view(BFLOAT16) if dtype == np.uint16 else given).astype(np.float32)
    for each, same in zip(given.reshape(-1, 64), wide.reshape(-1, 64), strict=True):
        assert grad_norm([each]) == grad_norm([same])
    parameters = [np.zeros(bits.size, np.float32) for _ in range(2)]
    adams = [Adam(p, learning_rate=1.0, eps=1e-30, max_grad_norm=1e9) for p in parameters]
    norms = [adam.step(gradient) for adam, gradient in zip(adams, (given, wide), strict=True)]
    assert norms[0] == norms[1] == pytest.approx(float(np.linalg.norm(wide.astype(np.float64))), rel=1e-12)
    assert same_bits(parameters[0], parameters[1])
    assert same_bits(adams[0].m, adams[1].m)
    total = [np.zeros(bits.size, np.float32) for _ in range(2)]
    for sum_of, gradient in zip(total, (given, wide), strict=True):
        adam = Adam(np.zeros(bits.size, np.float32))
        adam.attach_pending(np.zeros(2), np.zeros(1, np.int64))
        for part in (slice(0, bits.size // 2), slice(bits.size // 2, None)):  # the half with, and that without, a sign
            small = np.zeros_like(gradient)
            small[part] = gradient[part]
            small[np.abs(wide) > 2.0**50] = 0
            adam.accumulate(sum_of, 0.0, small, None, 0.7)
    assert same_bits(total[0], total[1])
    assert total[0].any()


def test_gradients_in_halves_that_are_not_finite_name_the_element() -> None:
    for dtype in HALVES:
        for value in (np.nan, np.inf, -np.inf):
            a, b = make_pair()
            given = b.astype(BFLOAT16 if dtype == np.uint16 else dtype)
            given[4, 1] = value
            with pytest.raises(NonFiniteGradientError, match=rf"gradient of B must be finite, got {value} at \[4, 1\]"):
                make_trainer().step(1.0, make_adapter(), a, given.view(dtype))
            assert not np.isfinite(grad_norm([a, given]))


# ---------------------------------------------------------------- overlap


def test_gradients_may_touch_the_parameters_but_not_overlap_them() -> None:
    """Every position of a gradient against parameters in the middle of the same memory."""
    memory = np.random.default_rng(0).normal(size=250).astype(np.float32)
    for start in range(0, 250 - SIZE + 1):
        around = memory.copy()
        adam = Adam(around[100 : 100 + SIZE], learning_rate=0.1)
        before = around.tobytes()
        if abs(start - 100) < SIZE:
            with pytest.raises(
                InputError, match="gradient must not overlap the parameters or the optimizer's state in memory"
            ):
                adam.step(around[start : start + SIZE])
            assert around.tobytes() == before
            assert adam.t == 0
        else:
            plain_parameters = memory[100 : 100 + SIZE].copy()
            Adam(plain_parameters, learning_rate=0.1).step(memory[start : start + SIZE].copy())
            adam.step(around[start : start + SIZE])
            assert around[100 : 100 + SIZE].tobytes() == plain_parameters.tobytes()
            assert (
                np.delete(around, range(100, 100 + SIZE)).tobytes()
                == np.delete(memory, range(100, 100 + SIZE)).tobytes()
            )


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_gradients_may_not_overlap_compact_moments_or_their_exponents(state_dtype: str) -> None:
    """Not even a part of the bytes of one of them, whatever the type of the gradient."""
    size = 1024
    parameters = np.ones(size, np.float32)
    adam = Adam(parameters, state_dtype=state_dtype)
    moments = adam._moments
    kept = [moments.stored_m, moments.stored_v] + ([moments.m_exponents, moments.v_exponents] * (state_dtype == "8bit"))
    for stored in kept:
        # A view of the memory around it, wide enough for a gradient: only its address counts, it is never read.
        room = as_strided(stored.view(np.uint8), (2 * size,), writeable=False)
        before = fingerprint(parameters, moments.to_dict())
        with pytest.raises(InputError, match="gradient must not overlap the parameters or the optimizer's state"):
            adam.step(room.view(np.uint16))
        assert fingerprint(parameters, moments.to_dict()) == before
        assert adam.t == 0


@pytest.mark.parametrize("which", ["grad_a", "grad_b"])
def test_either_of_a_pair_may_not_overlap_parameters_or_moments(which: str) -> None:
    adapter, trainer = make_adapter(), make_trainer()
    pair = dict(zip(("grad_a", "grad_b"), make_pair(), strict=True))
    trainer.step(1.0, adapter, *pair.values())
    size = pair[which].size
    for memory in (adapter.flat.vector, trainer._adam.m, trainer._adam.v):
        for start in range(SIZE - size + 1):
            before = adapter.flat.vector.tobytes(), trainer.total_steps()
            for call in (trainer.step, trainer.accumulate):
                with pytest.raises(
                    InputError, match=f"{which} must not overlap the parameters or the optimizer's state"
                ):
                    call(1.0, adapter, **pair | {which: memory[start : start + size]})
            assert (adapter.flat.vector.tobytes(), trainer.total_steps()) == before


def test_gradients_may_lie_in_another_adapters_parameters() -> None:
    """Members of a set lie next to each other: a neighbour's memory is not one's own."""
    adapters = AdapterSet({"a": (D_IN, D_OUT), "b": (D_IN, D_OUT)}, LoraConfig(rank=RANK), seed=0)
    gradient = adapters["b"].flat.vector.copy()
    twin = adapters["a"].flat.vector.copy()
    Adam(twin).step(gradient)
    Adam(adapters["a"].flat).step(adapters["b"].flat.vector)
    assert adapters["a"].flat.vector.tobytes() == twin.tobytes()
    assert adapters["b"].flat.vector.tobytes() == gradient.tobytes()


def test_both_gradients_may_be_the_same_memory() -> None:
    """They are read only. A square adapter whose A and B have one shape can be given one array twice."""
    adapters = [make_adapter(), make_adapter()]
    shared = np.random.default_rng(1).normal(size=18).astype(np.float32)
    make_trainer().step(1.0, adapters[0], shared, shared[:15])
    make_trainer().step(1.0, adapters[1], shared.copy(), shared[:15].copy())
    assert adapters[0].flat.vector.tobytes() == adapters[1].flat.vector.tobytes()


def test_clipping_judges_every_pair_of_windows() -> None:
    memory = np.arange(1, 41, dtype=np.float32)
    for length in (1, 4, 9):
        for first in range(0, 41 - length, 3):
            for second in range(41 - length):
                around = memory.copy()
                grads = [around[first : first + length], around[second : second + length]]
                if abs(first - second) < length:
                    with pytest.raises(InputError, match="grads must not overlap in memory"):
                        clip_grad_norm_(grads, 0.5)
                    assert around.tobytes() == memory.tobytes()
                else:
                    copies = [grad.copy() for grad in grads]
                    assert clip_grad_norm_(grads, 0.5) == clip_grad_norm_(copies, 0.5)
                    assert [grad.tobytes() for grad in grads] == [copy.tobytes() for copy in copies]


def test_gradients_buffers_of_the_caller_are_never_written() -> None:
    adapters = AdapterSet({"a": (D_IN, D_OUT), "b": (3, 3)}, LoraConfig(rank=RANK), seed=0)
    gradients = Gradients(adapters)
    gradients.vector[...] = 100.0
    trainer = make_trainer(max_grad_norm=1e-3, weight_decay=0.5, weight_decay_mode="l2")
    trainer.step(1.0, adapters, gradients)
    trainer.accumulate(1.0, adapters, gradients, weight=3.0)
    trainer.step_accumulated()
    assert set(gradients.vector.tolist()) == {100.0}
