"""The safetensors container: tensors by name in one file, written in parts and read in place.

A file is 8 bytes that give the header's length (little endian), the header (a JSON object: for each tensor its dtype,
shape and place, and under ``__metadata__`` strings), and the tensors' bytes without gaps. The `safetensors` library
defines it, and the tests hold every file against it. What is here, it does not offer: writing buffers where they lie
(it copies them several times), the same bytes for the same content (it orders metadata by chance), reading straight
into arrays that exist, and refusing what two readers could understand differently.
"""

import math
import os
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from cylora.errors import FormatError, InputError
from cylora.formats import strict_json

__all__ = ["DTYPES", "NAMES", "Tensor", "TensorFile", "content", "open_regular", "read_regular"]

DTYPES = {  # the container's names, and NumPy's type for the bytes: bfloat16 travels as uint16
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items() if name != "BF16"}
MAX_NAME = 512
MAX_RANK = 8
METADATA = "__metadata__"
READ_SIZE = 2**20
PICKLES = (b"\x80", b"PK\x03\x04", b"\x93NUMPY")  # pickle, zip (torch.save, .npz), .npy
PICKLE_SUFFIXES = {".bin", ".ckpt", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}


class Tensor(NamedTuple):
    """What a header says of one tensor: its bytes are those from ``start`` to ``stop`` after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


# ------------------------------------------------------------------ writing


def content(
    tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str], *, bfloat16: bool = False
) -> list[bytes | memoryview]:
    """Return a whole file as buffers for `cylora.formats.durable`: a header and the arrays' own memory.

    Parameters
    ----------
    tensors : C-contiguous arrays by name, read only. Wider elements come first, else the order is kept.
    metadata : strings by name.
    bfloat16 : whether the uint16 arrays hold the bits of bfloat16 numbers.

    Raises
    ------
    InputError   If `TensorFile` would not read it: a name, a dtype, a shape, or too much besides the arrays.
    """
    described: dict[str, Any] = {METADATA: dict(metadata)}
    parts: list[memoryview] = []
    start = 0
    for name, array in sorted(tensors.items(), key=lambda pair: -pair[1].itemsize):
        if reason := _bad_name(name):
            raise InputError(f"a tensor's name must {reason}, got {name!r}")
        if array.ndim > MAX_RANK:
            raise InputError(f"{name!r} must have at most {MAX_RANK} dimensions, got {array.ndim}")
        if array.dtype not in NAMES:
            raise InputError(f"{name!r} must have a dtype among {', '.join(map(str, NAMES))}, got {array.dtype}")
        dtype = "BF16" if bfloat16 and array.dtype == np.uint16 else NAMES[array.dtype]
        stop = start + array.nbytes
        described[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, stop]}
        start = stop
        if array.size:
            parts.append(array.reshape(-1).view(np.uint8).data)
    if wrong := [key for key, value in metadata.items() if strict_json.SURROGATE.search(key + value)]:
        raise InputError(f"metadata must be text, got half of a surrogate pair at {wrong[0]!r}")
    header = strict_json.to_text(described).encode()
    header += b" " * (-len(header) % 8)  # so that the first array is aligned
    if len(header) > strict_json.MAX_BYTES:
        raise InputError(f"names, shapes and metadata must fit {strict_json.MAX_BYTES} bytes, got {len(header)}")
    limit = strict_json.MAX_MEMORY + min(2 * start, strict_json.MAX_MEMORY)
    if (needed := strict_json.memory_needed(header)) > limit:
        raise InputError(f"names, shapes and metadata must not need more than {limit} bytes of memory, got {needed}")
    return [len(header).to_bytes(8, "little") + header, *parts]


def _bad_name(name: str) -> str | None:
    """Return what a tensor's name must be and ``name`` is not, or None."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "be text"
    if not 0 < length <= MAX_NAME:
        return f"have 1 to {MAX_NAME} bytes"
    if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in name):
        return "have no control characters"
    if ".." in name:
        return "not contain '..'"
    return f"not be {METADATA}" if name == METADATA else None


# ------------------------------------------------------------------ reading


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes; anything else is a FormatError."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        raw = file.read(size + 1) if size <= limit else b""
    if size > limit or len(raw) > limit:
        raise FormatError(f"{path}: must have at most {limit} bytes, got more")
    return raw


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading and return its descriptor; a link, a pipe or a device is a FormatError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        if os.path.islink(path):
            got = "a symbolic link (cp -L makes a file of it)"
            raise FormatError(f"{path}: must be a regular file, got {got}") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FormatError(f"{path}: must be a regular file, got a directory, pipe or device")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class TensorFile:
    """An open file whose header has been checked: every tensor lies where it says, without holes or overlap.

    Parameters
    ----------
    path : a regular file, read with ``read``, never mapped: a mapped file that shrinks kills the process.
    leading_space : whether the header may begin with white space, as page-aligning writers make it.

    Attributes
    ----------
    path : Path
    metadata : dict of str to str
    tensors : dict of name to Tensor, in the order of their bytes
    head : bytes before the tensors
    size : int, bytes of the file

    Raises
    ------
    FormatError   If the file breaks a rule of the format. The message names file, key and rule.
    OSError       If it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], *, leading_space: bool = True) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() in PICKLE_SUFFIXES:
            self._refuse("the file", "must be safetensors", f"{self.path.suffix}, which is never opened")
        self._descriptor = open_regular(path)
        try:
            self.size = os.fstat(self._descriptor).st_size
            self.head = self._read_head()
            place = f"{self.path}: header"
            spare = 2 * (self.size - len(self.head))
            header = strict_json.parse(self.head[8:], place, leading_space=leading_space, spare=spare)
            if not isinstance(header, dict):
                self._refuse("header", "must be an object", type(header).__name__)
            self.metadata = self._metadata(header.pop(METADATA, {}))
            self.tensors = self._tensors(header)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor in a new array; BF16 as uint16."""
        tensor = self.tensors[name]
        array: NDArray[Any] = np.empty(tensor.shape, DTYPES[tensor.dtype])
        self.read_into(name, array.reshape(-1).view(np.uint8))
        return array

    def read_into(self, name: str, octets: NDArray[np.uint8], digest: Any = None) -> None:
        """Read one tensor's bytes into ``octets``, which has just as many, and into a running hash."""
        tensor = self.tensors[name]
        assert octets.size == tensor.stop - tensor.start
        self._fill(octets.data, len(self.head) + tensor.start, repr(name), digest)

    def _fill(self, part: memoryview, at: int, key: str, digest: Any = None) -> None:
        rest = part
        while rest:  # a call may return less than it was asked for
            count = os.preadv(self._descriptor, [rest[:READ_SIZE]], at)
            if count == 0:
                self._refuse(key, f"must have {len(part)} bytes", "a file that was cut while it was read")
            if digest is not None:  # while the bytes are in the cache
                digest.update(rest[:count])
            rest, at = rest[count:], at + count

    def read_all(self) -> bytes:
        """Return the bytes of the whole file."""
        raw = bytearray(self.size)
        self._fill(memoryview(raw), 0, "the file")
        return bytes(raw)

    # The checks, in the order of the bytes.

    def _refuse(self, key: str, rule: str, got: object) -> NoReturn:
        raise FormatError(f"{self.path}: {key} {rule}, got {got}")

    def _read_head(self) -> bytes:
        first = bytearray(min(8, self.size))
        self._fill(memoryview(first), 0, "header")
        length = int.from_bytes(first, "little")
        if first.startswith(PICKLES) and (len(first) < 8 or length > strict_json.MAX_BYTES):
            self._refuse("the file", "must be safetensors", "a pickle, zip or NumPy file, which is never opened")
        if len(first) < 8:
            self._refuse("the file", "must have at least 8 bytes", self.size)
        if not 2 <= length <= strict_json.MAX_BYTES:
            self._refuse("header", f"must have 2 to {strict_json.MAX_BYTES} bytes", length)
        if length + 8 > self.size:
            self._refuse("header", f"must end within the file's {self.size} bytes", length)
        head = bytearray(8 + length)
        self._fill(memoryview(head), 0, "header")
        return bytes(head)

    def _metadata(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self._refuse(METADATA, "must be an object of strings", _short(metadata))
        return metadata

    def _tensors(self, header: dict[str, Any]) -> dict[str, Tensor]:
        found = {name: self._tensor(name, entry) for name, entry in header.items()}
        ordered = dict(sorted(found.items(), key=lambda pair: pair[1][2:]))
        end = 0
        for name, tensor in ordered.items():
            if tensor.start != end:
                self._refuse(f"{name!r} data_offsets", f"must begin where the one before ends, {end}", tensor.start)
            end = tensor.stop
        if len(self.head) + end != self.size:
            got = f"{len(self.head)} + {end}"
            self._refuse("header and tensors", f"must fill the file's {self.size} bytes", got)
        return ordered

    def _tensor(self, name: str, entry: Any) -> Tensor:
        if reason := _bad_name(name):
            self._refuse("a tensor's name", f"must {reason}", repr(name[:80]))
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            got = _short(sorted(entry)) if isinstance(entry, dict) else type(entry).__name__
            self._refuse(f"{name!r}", "must have the keys dtype, shape and data_offsets", got)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            self._refuse(f"{name!r} dtype", f"must be one of {', '.join(DTYPES)}", _short(dtype))
        if not _is_sizes(shape, range(MAX_RANK + 1)):
            self._refuse(f"{name!r} shape", f"must be at most {MAX_RANK} integers >= 0", _short(shape))
        if not _is_sizes(offsets, range(2, 3)):
            self._refuse(f"{name!r} data_offsets", "must be two integers >= 0", _short(offsets))
        item = np.dtype(DTYPES[dtype]).itemsize
        # Without the zeros: neither NumPy nor the library makes an array of (0, 2^62, 2^62).
        if math.prod(size for size in shape if size) * item > strict_json.MAX_INTEGER:
            self._refuse(f"{name!r} shape", "must span less than 2^63 bytes", f"{dtype} {shape}")
        n_bytes = math.prod(shape) * item
        if offsets[1] - offsets[0] != n_bytes:
            self._refuse(f"{name!r} data_offsets", f"must span the {n_bytes} bytes of {dtype} {shape}", offsets)
        return Tensor(dtype, tuple(shape), *offsets)


def _is_sizes(values: Any, lengths: range) -> bool:
    if not isinstance(values, list) or len(values) not in lengths:
        return False
    return all(type(value) is int and value >= 0 for value in values)


def _short(value: Any) -> str:
    """Return some 80 characters of what a header says, and take no more memory for it."""
    return reprlib.repr(value)[:80]
