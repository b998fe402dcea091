"""Gradients by DLPack and by ``__array__``: taken to the bit or refused by name, and given back once, not too early."""

import ctypes
import gc
import mmap
import re
from collections.abc import Iterator
from typing import Any

import dlpack
import ml_dtypes
import numpy as np
import pytest
from dlpack import (
    BFLOAT,
    EXCHANGE,
    FLOAT,
    IS_COPIED,
    OTHER,
    READ_ONLY,
    UINT,
    FastTensor,
    NumpyTensor,
    OldTensor,
    Tensor,
)
from test_buffers import ENTRIES, VALUES, Entry, halves_of
from training import RANK, make_adapter, make_pair, make_set, make_trainer

from cylora import Adam, InputError, LoraAdapter, LoraTrainer, clip_grad_norm_, grad_norm, step_many

TAKING = ("step grad_a", "step grad_b", "step flat", "accumulate grad_a", "accumulate grad_b", "Adam.step", "grad_norm")
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.uint16)
KINDS = (Tensor, OldTensor, FastTensor)
MATRIX = VALUES.reshape(RANK, -1)


@pytest.fixture(autouse=True)
def _nothing_stays_lent() -> Iterator[None]:
    yield
    gc.collect()
    assert not dlpack._handed_out


def refused(provider: Any, *, written: bool = False) -> str:
    """Return what the error says was got, after checking that nothing changed and everything was given back."""
    if written:
        before = provider.values.tobytes() if isinstance(provider, Tensor) else b""
        with pytest.raises(InputError, match=r"grads\[0\] must be a writable, C-contiguous, aligned float32") as caught:
            clip_grad_norm_([provider], 0.25)
        if isinstance(provider, Tensor):
            assert provider.values.tobytes() == before
    for name in () if written else TAKING:
        entry = Entry(name, *ENTRIES[name])
        before_side = entry.side(0)
        with pytest.raises(InputError, match=entry.argument) as caught:
            entry.call(0, provider)
        assert entry.side(0) == before_side
        # Not held on to either: the next step is that of a twin which never saw the bad one.
        good = np.ones(entry.shape, np.float32).reshape(-1 if "flat" in name or "Adam" in name else entry.shape)
        assert entry.call(0, good) == entry.call(1, good)
        assert entry.side(0) == entry.side(1)
    if isinstance(provider, Tensor):
        assert not provider.is_lent
    rule, _, got = str(caught.value).partition(", got ")
    assert " must be a " in rule
    return got


# ---------------------------------------------------------------- what is taken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("name", TAKING)
def test_tensors_of_every_type_give_the_bits_of_the_same_numbers_in_float32(name: str, dtype: Any, kind: type) -> None:
    rows, columns = ENTRIES[name][0]
    values = np.random.default_rng(5).normal(size=rows * columns).astype(np.float32)
    shapes = [(rows * columns,)] + ([(rows, columns)] if rows > 1 else [])
    for shape in shapes:
        given, wide = (array.reshape(shape) for array in halves_of(dtype, values))
        for strides in ("given", None):
            entry = Entry(name, *ENTRIES[name])
            tensor = kind(given, **({} if strides else {"strides": None}))
            before = given.tobytes()
            assert entry.call(0, tensor) == entry.call(1, wide)
            assert entry.side(0) == entry.side(1)
            assert given.tobytes() == before
            assert (tensor.handed_out, tensor.deleted) == (1, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"flags": READ_ONLY},
        {"flags": IS_COPIED},
        {"flags": 1 << 40},
        {"version": (1, 99)},
        {"device": (3, 0)},  # memory of the CPU that is pinned for a GPU
        {"device": (11, 2)},
        {"deleter": False},
        {"versioned": False},
        {"versioned": False, "deleter": False},
        {"data": VALUES.ctypes.data - 4096, "byte_offset": 4096},
        {"shape": (RANK * 6,), "strides": (1,)},
    ],
    ids=", ".join,  # not their values: an address differs each time
)
def test_harmless_settings_change_nothing(settings: dict[str, Any]) -> None:
    entry, tensor = Entry("step grad_a", *ENTRIES["step grad_a"]), Tensor(MATRIX, **settings)
    assert entry.call(0, tensor) == entry.call(1, MATRIX)
    assert entry.side(0) == entry.side(1)
    assert (tensor.handed_out, tensor.deleted) == (1, 1)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((1, 18), (1, 1)),
        ((1, 18), (-7, 1)),
        ((18, 1), (1, 0)),
        ((3, 1, 6), (6, 999, 1)),
        ((), None),
        ((), ()),
        ((1,), (0,)),
    ],
)
def test_strides_of_axes_of_one_element_do_not_matter(shape: tuple[int, ...], strides: Any) -> None:
    values = VALUES[: int(np.prod(shape))]
    assert grad_norm([Tensor(values, shape=shape, strides=strides)]) == grad_norm([values])


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2**40), (2, 0, 3)])
def test_an_empty_tensor_needs_no_memory(shape: tuple[int, ...]) -> None:
    for strides in (None, (5,) * len(shape)):
        tensor = Tensor(VALUES, shape=shape, strides=strides, data=None)
        assert grad_norm([VALUES, tensor, VALUES]) == grad_norm([VALUES, VALUES])
        assert clip_grad_norm_([tensor], 1.0) == 0.0
        assert not tensor.is_lent


def test_a_producer_is_asked_for_version_1_without_a_copy_and_an_old_one_for_nothing() -> None:
    new, old, fast = Tensor(VALUES), OldTensor(VALUES), FastTensor(VALUES)
    for tensor in (new, old, fast):
        assert grad_norm([tensor]) == grad_norm([VALUES])
    assert new.asked == [{"max_version": (1, 0), "copy": False}]
    assert old.asked == [{}]
    assert fast.asked == []


def test_all_of_a_set_of_tensors_are_taken_and_given_back() -> None:
    tensors = [kind(MATRIX * n) for n in range(1, 8) for kind in KINDS]
    assert grad_norm(tensors) == grad_norm([tensor.values for tensor in tensors])
    assert all((tensor.handed_out, tensor.deleted) == (1, 1) for tensor in tensors)
    with pytest.raises(InputError, match=r"grads\[21\] must be .*, got float"):
        grad_norm([*tensors, 1.0])
    assert all((tensor.handed_out, tensor.deleted) == (2, 2) for tensor in tensors)


def test_the_same_tensor_may_be_both_gradients() -> None:
    adapters = [LoraAdapter(4, 4, seed=0), LoraAdapter(4, 4, seed=0)]
    tensor = Tensor(np.arange(32, dtype=np.float32))
    make_trainer().step(1.0, adapters[0], tensor, tensor)
    make_trainer().step(1.0, adapters[1], tensor.values, tensor.values)
    assert adapters[0].flat.vector.tobytes() == adapters[1].flat.vector.tobytes()
    assert tensor.deleted == 2


# ---------------------------------------------------------------- what is refused

MEMORY = np.arange(64, dtype=np.float32)
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "on a GPU": ({"device": (2, 1)}, "dtype float32, shape (3, 6), on CUDA device 1"),
    "on an unknown device": ({"device": (99, 0)}, "on device type 99 device 0"),
    "on a negative device": ({"device": (-1, 0)}, "on device type -1 device 0"),
    "in managed memory": ({"device": (13, 0)}, "on CUDA managed device 0"),
    "of doubles": ({"type": (FLOAT, 64)}, "dtype float64"),
    "of 8-bit floats": ({"type": (10, 8)}, "dtype type 10 of bits 8"),
    "of 4-bit floats": ({"type": (17, 4)}, "dtype type 17 of bits 4"),
    "of ints": ({"type": (0, 32)}, "dtype int32"),
    "of uint32": ({"type": (UINT, 32)}, "dtype uint32"),
    "of int16": ({"type": (0, 16)}, "dtype int16"),
    "of bools": ({"type": (6, 8)}, "dtype bool8"),
    "of complex": ({"type": (5, 64)}, "dtype complex64"),
    "of bfloat32": ({"type": (BFLOAT, 32)}, "dtype bfloat32"),
    "of nothing": ({"type": (FLOAT, 0)}, "dtype float0"),
    "of more bytes than can be counted": ({"type": (FLOAT, 255), "shape": (2**60,), "strides": None}, "dtype float255"),
    "of vectors": ({"lanes": 4}, "dtype float32x4"),
    "of no lanes": ({"lanes": 0}, "dtype float32x0"),
    "in Fortran order": ({"strides": (1, 3)}, "strides (1, 3) in elements"),
    "every second": ({"strides": (12, 2), "data": MEMORY.ctypes.data}, "strides (12, 2) in elements"),
    "backwards": ({"strides": (-6, -1)}, "strides (-6, -1) in elements"),
    "rows backwards": ({"strides": (-6, 1)}, "strides (-6, 1) in elements"),
    "expanded": ({"strides": (0, 1)}, "strides (0, 1) in elements"),
    "one element for all": ({"strides": (0, 0)}, "strides (0, 0) in elements"),
    "wider rows": ({"strides": (7, 1), "data": MEMORY.ctypes.data}, "strides (7, 1) in elements"),
    "at an odd address": ({"byte_offset": 1}, "misaligned"),
    "at half an element": ({"byte_offset": 2}, "misaligned"),
    "without memory": ({"data": None}, "without memory"),
    "without memory, with an offset": ({"data": None, "byte_offset": 4096}, "without memory"),
    "transposed": ({"shape": (6, 3), "strides": (3, 1)}, "shape (6, 3)"),
    "with an axis more": ({"shape": (1, 3, 6), "strides": (18, 6, 1)}, "shape (1, 3, 6)"),
    "too short": ({"shape": (17,), "strides": (1,)}, "shape (17,)"),
    "a scalar": ({"shape": (), "strides": ()}, "shape ()"),
    "empty": ({"shape": (0, 6)}, "shape (0, 6)"),
    "of negative sizes": ({"shape": (-3, -6), "strides": None}, "shape (-3, -6)"),
    "of a negative size": ({"shape": (-18,), "strides": (1,)}, "shape (-18,)"),
    "too large": ({"shape": (2**62, 6)}, "shape (4611686018427387904, 6)"),
    "so large that it wraps around": ({"shape": (2**33, 2**31 + 9, 2**31), "strides": None}, "shape (8589934592, "),
    "of negative dimensions": ({"ndim": -1}, "a DLPack tensor without a shape, of -1 dimensions"),
    "of too many dimensions": ({"ndim": 65}, "a DLPack tensor without a shape, of 65 dimensions"),
    "without a shape": ({"shape": None, "ndim": 2}, "a DLPack tensor without a shape, of 2 dimensions"),
    "of the next version": ({"version": (2, 0)}, "DLPack 2.0, of which only 1.x is understood"),
    "of a version from before versions": ({"version": (0, 8)}, "DLPack 0.8, of which only 1.x is understood"),
}  # fmt: skip
ANY_SHAPE = {"transposed", "with an axis more", "too short", "a scalar", "empty"}  # which only a step minds


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tensors_are_refused_for_what_they_are(case: str) -> None:
    settings, expected = HOSTILE[case]
    for kind in KINDS:
        if kind is OldTensor and "version" in settings:
            continue
        got = []
        for name in ("step grad_a", "accumulate grad_a") + (() if case in ANY_SHAPE else ("grad_norm",)):
            entry, tensor = Entry(name, *ENTRIES[name]), kind(MATRIX, **settings)
            before = entry.side(0)
            with pytest.raises(InputError, match=entry.argument) as caught:
                entry.call(0, tensor)
            assert entry.side(0) == before
            assert (tensor.handed_out, tensor.deleted) == (1, 1)
            got.append(str(caught.value).partition(", got ")[2])
        assert all(expected in text and f"dlpack.{kind.__name__}" in text for text in got)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_message_of_a_refused_tensor(kind: type) -> None:
    """That it may not be written is said where it would be."""
    tensor = kind(MATRIX.astype(np.float16), flags=READ_ONLY, shape=(2, 9), strides=(9, 1))
    got = f"got dlpack.{kind.__name__} with dtype float16, shape (2, 9)"
    with pytest.raises(InputError) as caught:
        make_trainer().step(1.0, make_adapter(), tensor, make_pair()[1])
    assert str(caught.value) == (
        "grad_a must be a C-contiguous, aligned array of float32, float16, bfloat16 or (bfloat16's bits) uint16 "
        f"of shape (3, 6), {got}"
    )
    with pytest.raises(InputError) as caught:
        clip_grad_norm_([tensor], 1.0)
    version = "by a version of DLPack that does not tell whether it may be written"
    flag = version if kind is OldTensor else "read-only"
    assert str(caught.value) == f"grads[0] must be a writable, C-contiguous, aligned float32 array, {got}, {flag}"


@pytest.mark.parametrize("name", TAKING)
def test_every_entry_refuses_a_tensor_on_a_gpu(name: str) -> None:
    entry, tensor = Entry(name, *ENTRIES[name]), Tensor(VALUES, device=(2, 0))
    before = entry.side(0)
    with pytest.raises(InputError, match=rf"{entry.argument} be .*, got dlpack\.Tensor with .*on CUDA device 0$"):
        entry.call(0, tensor)
    assert entry.side(0) == before
    assert not tensor.is_lent


def test_a_tensor_may_not_overlap_the_parameters() -> None:
    adapter, trainer = make_adapter(), make_trainer()
    b = make_pair()[1]
    trainer.step(1.0, adapter, *make_pair())
    before = adapter.flat.vector.tobytes()
    for memory in (adapter.a_matrix, trainer._adam.m[:18].reshape(3, 6)):
        tensor = Tensor(memory)
        with pytest.raises(InputError, match="grad_a must not overlap the parameters or the optimizer's state"):
            trainer.step(1.0, adapter, tensor, b)
        assert not tensor.is_lent
    assert adapter.flat.vector.tobytes() == before


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", [Tensor, FastTensor])
def test_clipping_writes_into_a_tensor(kind: type) -> None:
    given, expected = kind(MATRIX.copy()), MATRIX.copy()
    assert clip_grad_norm_([given], 0.25) == clip_grad_norm_([expected], 0.25)
    assert given.values.tobytes() == expected.tobytes()
    assert not given.is_lent


@pytest.mark.parametrize("kind", [Tensor, FastTensor])
@pytest.mark.parametrize(
    ("settings", "dtype", "got"),
    [
        ({"flags": READ_ONLY}, "f4", "read-only$"),
        ({"flags": READ_ONLY | IS_COPIED}, "f4", "read-only$"),
        ({"flags": IS_COPIED}, "f4", "a copy$"),
        ({}, "f2", "dtype float16"),
        ({}, "u2", "dtype uint16"),
        ({}, ml_dtypes.bfloat16, "dtype bfloat16"),
        ({"device": (2, 0)}, "f4", "on CUDA device 0$"),
        ({"strides": (0, 1)}, "f4", r"strides \(0, 1\)"),
    ],
)
def test_what_may_not_be_written_is_not(settings: dict[str, Any], dtype: Any, got: str, kind: type) -> None:
    assert re.search(got, refused(kind(MATRIX.astype(dtype), **settings), written=True))


def test_a_tensor_that_does_not_tell_whether_it_may_be_written_is_not() -> None:
    for tensor in (OldTensor(MATRIX.copy()), Tensor(MATRIX.copy(), versioned=False)):
        got = refused(tensor, written=True)
        assert got.endswith("by a version of DLPack that does not tell whether it may be written")


def test_two_tensors_of_the_same_memory_are_not_clipped() -> None:
    values = MATRIX.copy()
    tensors = [Tensor(values), FastTensor(values[1:])]
    with pytest.raises(InputError, match="grads must not overlap in memory, got two arrays that share elements"):
        clip_grad_norm_(tensors, 0.25)
    assert values.tobytes() == MATRIX.tobytes()
    assert not any(tensor.is_lent for tensor in tensors)


def test_what_refuses_to_be_written_as_a_buffer_is_not_written_by_dlpack() -> None:
    """An immutable array may offer a read-only buffer, and a tensor that says nothing against writing."""

    class Immutable(bytes):
        def __dlpack__(self, **asked: Any) -> Any:
            return tensor.__dlpack__(**asked)

    tensor = Tensor(MATRIX.copy())
    with pytest.raises(InputError, match=r"grads\[0\] must be .*Immutable with format 'B', shape \(72,\), read-only"):
        clip_grad_norm_([Immutable(72)], 0.25)
    assert tensor.handed_out == 0


def test_what_lends_no_buffer_is_read_by_dlpack() -> None:
    """As a JAX array in bfloat16, a type that buffers have no name for."""

    class Closed(mmap.mmap):
        def __dlpack__(self, **asked: Any) -> Any:
            return tensor.__dlpack__(**asked)

    tensor = Tensor(MATRIX.copy())
    closed = Closed(-1, 72)
    closed.close()
    assert grad_norm([closed]) == grad_norm([MATRIX])
    assert tensor.deleted == 1
    with pytest.raises(InputError, match=r"grads\[0\] must be .*Closed \(mmap closed or invalid\)"):
        clip_grad_norm_([closed], 0.25)
    assert tensor.handed_out == 1


def test_what_lends_a_buffer_of_another_type_is_not_asked_for_a_tensor() -> None:
    class Doubles(ctypes.c_double * 18):  # type: ignore[misc]
        def __dlpack__(self, **asked: Any) -> Any:
            raise AssertionError

    for call in (lambda: grad_norm([Doubles()]), lambda: clip_grad_norm_([Doubles()], 0.25)):
        with pytest.raises(InputError, match=r"grads\[0\] must be .*Doubles with format '<d'"):
            call()


# ---------------------------------------------------------------- producers that fail


class Raising:
    """A producer that raises."""

    def __init__(self, error: BaseException | type[BaseException]) -> None:
        self.error = error

    def __dlpack__(self, **asked: Any) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "got"),
    [
        (BufferError("Can't export such tensors"), "test_dlpack.Raising (Can't export such tensors)"),
        (RuntimeError("cannot pack\nframe #0: C++\nframe #1"), "test_dlpack.Raising (RuntimeError: cannot pack)"),
        (TypeError("neither new nor old"), "test_dlpack.Raising (TypeError: neither new nor old)"),
        (ValueError("Unknown device type"), "test_dlpack.Raising (ValueError: Unknown device type)"),
        (AttributeError, "test_dlpack.Raising (AttributeError: )"),
        (InputError("x"), "test_dlpack.Raising (InputError: x)"),
    ],
)
def test_what_a_producer_raises_is_in_the_message(error: Any, got: str) -> None:
    assert refused(Raising(error)) == got
    assert refused(Raising(error), written=True) == got


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_what_is_not_about_the_tensor_passes_through(error: type[BaseException]) -> None:
    class Fast(FailingTensor):
        def __bool__(self) -> bool:
            raise error

    class Array:
        def __array__(self) -> Any:
            raise error

    class Negated(Tensor):
        def is_neg(self) -> bool:
            raise error

    for provider in (Raising(error), Fast(MATRIX), Array(), Negated(MATRIX)):
        for name in TAKING:
            entry = Entry(name, *ENTRIES[name])
            before = entry.side(0)
            with pytest.raises(error):
                entry.call(0, provider)
            assert entry.side(0) == before


class Giving:
    """A producer that gives the same each time."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def __dlpack__(self, **asked: Any) -> Any:
        return self.given

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


@pytest.mark.parametrize(
    ("given", "kind"),
    [(None, "NoneType"), (MATRIX, "ndarray")]
    + [(dlpack.capsule_of(MATRIX.ctypes.data, name), "PyCapsule") for name in (OTHER, EXCHANGE, None)],
)
def test_what_is_no_capsule_of_dlpack_is_refused(given: Any, kind: str) -> None:
    assert refused(Giving(given)) == f"test_dlpack.Giving (its __dlpack__ gave {kind}, not a capsule of DLPack)"


@pytest.mark.parametrize("versioned", [True, False])
def test_a_capsule_is_taken_once(versioned: bool) -> None:
    """Also where somebody keeps it and gives it out again."""
    tensor = Tensor(VALUES, versioned=versioned)
    giving = Giving(tensor.__dlpack__())
    assert grad_norm([giving]) == grad_norm([VALUES])
    assert (tensor.handed_out, tensor.deleted) == (1, 1)
    assert refused(giving) == "test_dlpack.Giving (its __dlpack__ gave a capsule that is used up)"
    with pytest.raises(ValueError, match="PyCapsule"):  # NumPy sees it by the same name
        np.from_dlpack(giving)
    del giving
    assert (tensor.handed_out, tensor.deleted) == (1, 1)


def test_twice_the_same_capsule_for_one_step() -> None:
    tensor = Tensor(VALUES)
    giving = Giving(tensor.__dlpack__())
    with pytest.raises(InputError, match=r"grads\[1\] must be .*used up"):
        grad_norm([giving, giving])
    assert (tensor.handed_out, tensor.deleted) == (1, 1)


# ---------------------------------------------------------------- what DLPack does not tell


def test_a_tensor_that_requires_grad_is_read_detached() -> None:
    class Graph(Tensor):
        requires_grad = True

        def __dlpack__(self, **asked: Any) -> Any:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")

        def detach(self) -> Tensor:
            return self.inner

    graph = Graph(MATRIX)
    graph.inner = Tensor(MATRIX)
    for name in ("step grad_a", "accumulate grad_a", "grad_norm"):
        entry = Entry(name, *ENTRIES[name])
        assert entry.call(0, graph) == entry.call(1, MATRIX)
    assert (graph.inner.handed_out, graph.inner.deleted) == (3, 3)
    rule = "it requires grad, and would not notice that it is written: pass its .detach()"
    assert refused(graph, written=True).endswith(f"Graph ({rule})")
    assert graph.inner.handed_out == 3


def test_a_fast_tensor_that_requires_grad_is_read_as_it_is_and_not_written() -> None:
    class Graph(FastTensor):
        requires_grad = True

    graph = Graph(MATRIX)
    assert grad_norm([graph]) == grad_norm([MATRIX])
    assert "requires grad" in refused(graph, written=True)
    assert graph.handed_out == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_that_counts_with_the_other_sign_is_refused(kind: type) -> None:
    class View(kind):
        negative = True

        def is_neg(self) -> bool:
            return self.negative

    view = View(MATRIX)
    for written in (False, True):
        got = refused(view, written=written)
        assert got.endswith("View (its elements count with the other sign: pass its .resolve_neg())")
    assert view.handed_out == 0
    view.negative = False
    assert grad_norm([view]) == grad_norm([MATRIX])


# ---------------------------------------------------------------- a type's C functions


class FailingTensor(Tensor):
    """A producer whose C function is Python's own PyObject_IsTrue: it can fail with an error, as ctypes' cannot."""

    table = dlpack.table_of(ctypes.cast(ctypes.pythonapi.PyObject_IsTrue, dlpack.LEND))
    __dlpack_c_exchange_api__ = dlpack.capsule_of(ctypes.addressof(table), EXCHANGE)


def fast_type(table: Any, name: bytes = EXCHANGE) -> type[Tensor]:
    """Return a type of producers with this table."""
    capsule = dlpack.capsule_of(ctypes.addressof(table), name)
    return type("Fast", (Tensor,), {"__dlpack_c_exchange_api__": capsule, "table": table})


@pytest.mark.parametrize("outcome", [False, True, BufferError, RuntimeError("x\ny")])
def test_where_the_c_function_gives_nothing_the_long_way_is_gone(outcome: Any) -> None:
    """It says 0 and gives nothing, it fails without an error, it fails with one."""

    class Fast(FailingTensor):
        def __bool__(self) -> bool:
            if isinstance(outcome, bool):
                return outcome
            raise outcome

    tensor = Fast(MATRIX)
    assert grad_norm([tensor]) == grad_norm([MATRIX])
    assert tensor.asked == [{"max_version": (1, 0), "copy": False}]
    assert not tensor.is_lent


def test_the_table_of_version_1_is_found_behind_newer_ones() -> None:
    def never(producer: Any, out: Any) -> int:
        raise AssertionError

    one = dlpack.table_of(dlpack.lend_managed)
    newest = dlpack.table_of(never, major=3, older=dlpack.table_of(never, major=2, older=one))
    tensor = fast_type(newest)(MATRIX)
    assert grad_norm([tensor]) == grad_norm([MATRIX])
    assert (tensor.asked, tensor.handed_out) == ([], 1)
    tensor = fast_type(dlpack.table_of(never, major=2))(MATRIX)
    assert grad_norm([tensor]) == grad_norm([MATRIX])
    assert len(tensor.asked) == 1


@pytest.mark.parametrize("offered", [None, 12345, "x", dlpack.capsule_of(MATRIX.ctypes.data, OTHER)])
def test_what_is_no_table_is_passed_over(offered: Any) -> None:
    tensor = type("Fast", (Tensor,), {"__dlpack_c_exchange_api__": offered})(MATRIX)
    assert grad_norm([tensor]) == grad_norm([MATRIX])
    assert len(tensor.asked) == 1


# ---------------------------------------------------------------- how long it is held


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_is_held_until_the_step_is_over(kind: type) -> None:
    tensor, seen = kind(MATRIX), []

    class Loss:
        def __float__(self) -> float:
            seen.append(tensor.is_lent)
            return 1.0

    trainer = make_trainer(schedule=lambda step: seen.append(tensor.is_lent) or 0.01)
    adapter, b = make_adapter(), make_pair()[1]
    seen.clear()
    trainer.step(Loss(), adapter, tensor, b)
    trainer.accumulate(Loss(), adapter, tensor, b)
    assert len(seen) == 3
    assert all(seen)
    assert (tensor.handed_out, tensor.deleted) == (2, 2)


def test_every_refusal_gives_a_tensor_back() -> None:
    """Whatever comes after it was borrowed: the other gradient, the loss, the schedule, the norm, an overlap."""

    def fail(step: int) -> float:
        raise ZeroDivisionError

    a, b = (Tensor(part) for part in make_pair())
    nan = Tensor(np.full_like(a.values, np.nan))
    wrong = Tensor(a.values, shape=(2, 9), strides=(9, 1))
    trainer, failing = make_trainer(), make_trainer(schedule=fail)
    adapter, other, adapters = make_adapter(), make_adapter(), make_set()
    good = make_pair()
    trainer.step(1.0, adapter, *good)
    for call in (
        lambda: trainer.step(1.0, adapter, a, wrong),
        lambda: trainer.step(1.0, adapter, wrong, b),
        lambda: trainer.step(1.0, adapter, a, 1.0),
        lambda: trainer.step("x", adapter, a, b),
        lambda: trainer.step(1.0, adapter, nan, b),
        lambda: trainer.step(1.0, other, a, b),
        lambda: trainer.step(1.0, adapter, a),
        lambda: trainer.accumulate(1.0, adapter, a, wrong),
        lambda: trainer.accumulate("x", adapter, a, b),
        lambda: trainer.accumulate(1.0, adapter, nan, b),
        lambda: failing.step(1.0, other, a, b),
        lambda: make_trainer().step(1.0, adapters, a, b),
        lambda: grad_norm([a, b, object()]),
        lambda: clip_grad_norm_([a, b, a], 1.0),
        lambda: clip_grad_norm_([a, nan], 1.0),
        lambda: clip_grad_norm_([a, b, object()], 1.0),
    ):
        with pytest.raises((InputError, ValueError, ZeroDivisionError)):
            call()
        assert not any(tensor.is_lent for tensor in (a, b, nan, wrong))
    trainer.step(1.0, adapter, a, b)


def test_step_many_takes_and_gives_back_tensors() -> None:
    tensors = [Tensor(part) for part in make_pair()]
    pairs = tensors, make_pair()
    sides = [[(make_trainer(), 1.0, make_adapter(seed), *pair) for seed in range(40)] for pair in pairs]
    sides[0].insert(7, (make_trainer(), 1.0, make_adapter(), tensors[0], Tensor(VALUES, device=(2, 0))))
    records = step_many(sides[0])
    error = records.pop(7)
    assert re.search(r"grad_b must be .*on CUDA device 0", str(error))
    del sides[0][7]
    assert records == step_many(sides[1])
    for with_tensors, with_arrays in zip(*sides, strict=True):
        assert with_tensors[2].flat.vector.tobytes() == with_arrays[2].flat.vector.tobytes()
    assert (tensors[0].handed_out, tensors[0].deleted, tensors[1].deleted) == (41, 41, 40)


def test_a_deleter_that_steps_the_trainer_finds_it_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs while the step lets go of what it borrowed, when all is recorded."""
    caught: list[Any] = []

    class Meddling(Tensor):
        @property
        def deleted(self) -> int:
            return self._deleted

        @deleted.setter
        def deleted(self, value: int) -> None:
            self._deleted = value
            if value:
                try:
                    trainer.step(1.0, adapter, *make_pair())
                except Exception as error:
                    caught.append(error)

    trainer, adapter = make_trainer(), make_adapter()
    trainer.step(1.0, adapter, Meddling(MATRIX), make_pair()[1])
    assert [type(error).__name__ for error in caught] == ["TrainerBusyError"]
    assert trainer.total_steps() == 1
    trainer.step(1.0, adapter, *make_pair())


# ---------------------------------------------------------------- __array__


class Convertible:
    """What only NumPy's own protocol turns into an array."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        if isinstance(self.array, BaseException):
            raise self.array
        return self.array


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("name", TAKING)
def test_an_object_with_only_array_is_read(name: str, dtype: Any) -> None:
    rows, columns = ENTRIES[name][0]
    given, wide = halves_of(dtype, np.random.default_rng(5).normal(size=rows * columns).astype(np.float32))
    entry = Entry(name, *ENTRIES[name])
    assert entry.call(0, Convertible(given)) == entry.call(1, wide)
    assert entry.side(0) == entry.side(1)


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (MATRIX.astype("f8"), "whose __array__ gives numpy.ndarray with format 'd', shape (3, 6)"),
        (MATRIX.astype(">f4"), "whose __array__ gives numpy.ndarray with format '>f'"),
        (np.repeat(VALUES, 2)[::2], "whose __array__ gives numpy.ndarray with format 'f', shape (18,), strides (8,)"),
        (VALUES.tolist(), "whose __array__ gives list"),
        (None, "whose __array__ gives NoneType"),
        (np.ma.masked_greater(MATRIX, 5), "shape (3, 6), masked elements"),
        (RuntimeError("only on the device"), "whose __array__ raises RuntimeError: only on the device"),
        (BufferError("no"), "whose __array__ raises BufferError: no"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_array_gives_is_judged_like_an_array(array: Any, got: str) -> None:
    message = refused(Convertible(array))
    assert message.startswith("test_dlpack.Convertible, whose __array__ ")
    assert got in message


def test_what_array_gives_is_not_written() -> None:
    values = MATRIX.copy()
    got = refused(Convertible(values), written=True)
    assert got == "test_dlpack.Convertible, which offers only __array__, which may be a copy"
    assert values.tobytes() == MATRIX.tobytes()


def test_an_object_with_dlpack_is_not_converted() -> None:
    """What is on a GPU would come by a copy that nobody asked for."""

    class Both(Tensor):
        def __array__(self) -> Any:
            raise AssertionError

    assert "on CUDA device 0" in refused(Both(MATRIX, device=(2, 0)))


def test_masked_elements_are_not_read() -> None:
    masked = np.ma.masked_greater(MATRIX, 5)
    for given in (masked, masked.astype(np.float16), masked.ravel()):
        assert "masked elements" in refused(given)
    assert "masked elements" in refused(masked, written=True)
    unmasked = np.ma.array(MATRIX)
    entry = Entry("step grad_a", *ENTRIES["step grad_a"])
    assert entry.call(0, unmasked) == entry.call(1, MATRIX)


# ---------------------------------------------------------------- NumPy's own tensors


def test_numpys_own_tensors_are_taken_or_refused_like_its_arrays() -> None:
    good = [MATRIX, VALUES, MATRIX.astype(np.float16), MATRIX.view(np.uint32)[:, ::1].astype(np.uint16)]
    for array in good:
        entry = Entry("step grad_a", *ENTRIES["step grad_a"])
        assert entry.call(0, NumpyTensor(array)) == entry.call(1, array)
        assert entry.side(0) == entry.side(1)
    read_only = MATRIX.copy()
    read_only.flags.writeable = False
    assert grad_norm([NumpyTensor(read_only)]) == grad_norm([MATRIX])
    assert "read-only" in refused(NumpyTensor(read_only), written=True)
    written, expected = MATRIX.copy(), MATRIX.copy()
    assert clip_grad_norm_([NumpyTensor(written)], 0.25) == clip_grad_norm_([expected], 0.25)
    assert written.tobytes() == expected.tobytes()
    for array, got in (
        (MATRIX.astype("f8"), "dtype float64"),
        (MATRIX[:, ::-1], r"strides \(6, -1\) in elements"),
        (np.asfortranarray(MATRIX), r"strides \(1, 3\) in elements"),
        (np.broadcast_to(VALUES[:6], (3, 6)), r"strides \(0, 1\) in elements"),
        (MATRIX.astype(">f4"), "BufferError|byte order|endian"),
        (MATRIX.astype(object), "DLPack only supports"),
        (MATRIX.astype(ml_dtypes.bfloat16), "DLPack only supports"),
    ):
        assert re.search(got, refused(NumpyTensor(array))), got


# ---------------------------------------------------------------- the adapter's own arithmetic


def test_apply_and_gradients_take_what_converts_to_an_array() -> None:
    adapter, rng = make_adapter(), np.random.default_rng(0)
    x, g = rng.normal(size=(2, 6)).astype(np.float32), rng.normal(size=(2, 5)).astype(np.float32)

    class Graph(Convertible):
        """What converts only when detached, as a tensor of torch does."""

        requires_grad = True
        shape = ndim = None

        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")

        def detach(self) -> Any:
            return Convertible(self.array)

    for given_x, given_g in ((Convertible(x), Convertible(g)), (Graph(x), Graph(g))):
        np.testing.assert_array_equal(adapter.gradients(given_x, given_g).grad_a, adapter.gradients(x, g).grad_a)
    np.testing.assert_array_equal(adapter.apply(Convertible(x)), adapter.apply(x))


@pytest.mark.parametrize("error", [RuntimeError, TypeError, BufferError])
def test_apply_says_why_something_does_not_convert(error: type[Exception]) -> None:
    given = Convertible(error("can't convert cuda:0 tensor to numpy\nstack"))
    message = r"x must be an array of real numbers, got Convertible \(can't convert cuda:0 tensor to numpy\)"
    with pytest.raises(InputError, match=message):
        make_adapter().apply(given)
    with pytest.raises(MemoryError):
        make_adapter().apply(Convertible(MemoryError()))


def test_adam_takes_a_tensor_and_a_learning_rate() -> None:
    parameters = [np.ones(18, np.float32), np.ones(18, np.float32)]
    norms = [Adam(p).step(g, 0.1) for p, g in zip(parameters, (FastTensor(VALUES), VALUES), strict=True)]
    assert norms[0] == norms[1]
    assert parameters[0].tobytes() == parameters[1].tobytes()


def test_a_trainer_of_a_set_takes_one_flat_tensor() -> None:
    sides = []
    for kind in (Tensor, np.asarray):
        adapters, trainer = make_set(), LoraTrainer()
        vector = np.random.default_rng(3).normal(size=adapters.param_count()).astype(np.float32)
        sides.append((trainer.step(1.0, adapters, kind(vector)), adapters.flat.vector.tobytes()))
    assert sides[0] == sides[1]
