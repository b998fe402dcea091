"""DLPack tensors made by hand, with every field at the test's will, that count what comes back.

The structs are written here anew from dlpack.h, so that a slip in the kernel's does not go unnoticed.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

FLOAT, BFLOAT, UINT = 2, 4, 1
READ_ONLY, IS_COPIED = 1, 2
TYPES = {"float32": (FLOAT, 32), "float16": (FLOAT, 16), "bfloat16": (BFLOAT, 16), "uint16": (UINT, 16)}
# A capsule keeps the address of its name.
PLAIN, VERSIONED, EXCHANGE, OTHER = b"dltensor", b"dltensor_versioned", b"dlpack_exchange_api", b"something"


class DLDevice(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device", DLDevice), ("ndim", ctypes.c_int32), ("dtype", DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


DELETER = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class DLManagedTensor(ctypes.Structure):
    _fields_ = [("dl_tensor", DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", DELETER)]


class DLPackVersion(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32)]


class DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = [
        ("version", DLPackVersion), ("manager_ctx", ctypes.c_void_p), ("deleter", DELETER), ("flags", ctypes.c_uint64),
        ("dl_tensor", DLTensor),
    ]  # fmt: skip


LEND = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(ctypes.c_void_p))


class DLPackExchangeAPI(ctypes.Structure):
    _fields_ = [
        ("version", DLPackVersion), ("prev_api", ctypes.c_void_p), ("managed_tensor_allocator", ctypes.c_void_p),
        ("managed_tensor_from_py_object_no_sync", LEND), ("managed_tensor_to_py_object_no_sync", ctypes.c_void_p),
        ("dltensor_from_py_object_no_sync", ctypes.c_void_p), ("current_work_stream", ctypes.c_void_p),
    ]  # fmt: skip


_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]

_handed_out: dict[int, tuple[Any, "Tensor"]] = {}  # struct and producer by address, until the deleter comes


@DELETER
def _delete(address: int) -> None:
    _, producer = _handed_out.pop(address)  # a KeyError, and an error of the test, if it comes twice
    producer.deleted += 1


@DELETER
def _destroy(capsule: int) -> None:
    """Do what a producer does for a capsule that nobody took."""
    for name in (PLAIN, VERSIONED):
        if _is_valid(capsule, name):
            _delete(_pointer(capsule, name))


def capsule_of(address: int, name: bytes) -> Any:
    """Return a capsule without a destructor."""
    return _new(address, name, None)


def table_of(lend: Callable[..., int], *, major: int = 1, older: DLPackExchangeAPI | None = None) -> Any:
    """Return a type's table of C functions. Whoever calls this keeps it."""
    lend = lend if isinstance(lend, LEND) else LEND(lend)
    table = DLPackExchangeAPI(version=DLPackVersion(major, 0), managed_tensor_from_py_object_no_sync=lend)
    table.older = older
    table.prev_api = None if older is None else ctypes.addressof(older)
    return table


class Tensor:
    """A producer of one tensor: the values as they are, unless a setting says otherwise."""

    def __init__(self, values: Any, **settings: Any) -> None:
        self.values = np.asarray(values)
        self.settings = {
            "type": TYPES[self.values.dtype.name], "lanes": 1, "device": (1, 0), "shape": self.values.shape,
            "ndim": None, "strides": tuple(s // self.values.itemsize for s in self.values.strides), "byte_offset": 0,
            "data": self.values.ctypes.data, "versioned": True, "version": (1, 0), "flags": 0, "deleter": True,
        }  # fmt: skip
        assert settings.keys() <= self.settings.keys()
        self.settings |= settings
        self.asked: list[dict[str, Any]] = []
        self.handed_out = self.deleted = 0

    @property
    def is_lent(self) -> bool:
        return self.handed_out > self.deleted

    def hand_out(self, *, versioned: bool) -> int:
        """Return the address of a new managed tensor."""
        s = self.settings
        shape, strides = (None if s[key] is None else (ctypes.c_int64 * 64)(*s[key]) for key in ("shape", "strides"))
        code, bits = s["type"]
        tensor = DLTensor(
            data=s["data"],
            device=DLDevice(*s["device"]),
            ndim=len(s["shape"]) if s["ndim"] is None else s["ndim"],
            dtype=DLDataType(code, bits, s["lanes"]),
            byte_offset=s["byte_offset"],
        )
        if shape is not None:
            tensor.shape = shape
        if strides is not None:
            tensor.strides = strides
        managed: Any = DLManagedTensorVersioned() if versioned else DLManagedTensor()
        managed.dl_tensor = tensor
        if versioned:
            managed.version, managed.flags = DLPackVersion(*s["version"]), s["flags"]
        self.handed_out += 1
        if s["deleter"]:
            managed.deleter = _delete
            _handed_out[ctypes.addressof(managed)] = (managed, shape, strides), self
        else:  # nothing will come back: it lives as long as the producer
            self.deleted += 1
            self.kept = managed, shape, strides
        return ctypes.addressof(managed)

    def __dlpack__(self, **asked: Any) -> Any:
        self.asked = [*self.asked, asked][-2:]  # not all: the test of references counts blocks
        versioned = self.settings["versioned"]
        address = self.hand_out(versioned=versioned)
        return _new(address, VERSIONED if versioned else PLAIN, ctypes.cast(_destroy, ctypes.c_void_p))


class OldTensor(Tensor):
    """A producer from before versions."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        self.settings["versioned"] = False
        return super().__dlpack__()


class NumpyTensor:
    """An array of NumPy's, seen through nothing but its DLPack methods."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __dlpack__(self, **asked: Any) -> Any:
        return self.values.__dlpack__(**asked)

    def __dlpack_device__(self) -> Any:
        return self.values.__dlpack_device__()


def lend_managed(producer: Tensor, out: Any) -> int:
    """Do what a type's C function does."""
    out[0] = producer.hand_out(versioned=True)
    return 0


class FastTensor(Tensor):
    """A producer whose type offers C functions too."""

    table = table_of(lend_managed)
    __dlpack_c_exchange_api__ = capsule_of(ctypes.addressof(table), EXCHANGE)
