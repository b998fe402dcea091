"""Look into a GGUF LoRA adapter: names, shapes, alpha and weights.

Not for training: names and the order of rows are llama.cpp's, and depend on a base model that the file does not hold.

(a) The reader of the package gguf maps the file, which kills the process where it shrinks, and of a damaged one it can
    take the whole memory: a wrong length of an array keeps it appending empty elements. So the file is read here, with
    ``read``, and nothing is believed that the file's size does not bear out.
(b) A file is: magic, version, numbers of tensors and keys; the keys with type and value; of each tensor its name, sizes
    (the fastest first), type and offset; and the tensors' bytes, aligned. llama.cpp wants them without holes, in order.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from cylora import checks
from cylora.adapter import AdapterSet
from cylora.errors import FormatError
from cylora.formats.container import open_regular
from cylora.formats.weights import check_count, widen
from cylora.lora_config import MAX_ALPHA, LoraConfig

__all__ = ["GGUF_MAGIC", "read_gguf"]

GGUF_MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEAD = 16 * 2**20  # an adapter's keys and names; of a model, whose vocabulary is among the keys, not always enough
MAX_COUNT = 2**16  # keys, and tensors: far more than the largest model has
MAX_RANK = 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
DTYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype("<u2")}  # F32, F16, BF16
MAX_SIZE = 2**31
PARTS = ("lora_a", "lora_b")
REQUIRED = {"general.type": "adapter", "adapter.type": "lora"}


class _Tensor(NamedTuple):
    kind: int
    shape: tuple[int, ...]
    offset: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.kind].itemsize


def read_gguf(path: str | os.PathLike[str]) -> tuple[AdapterSet, dict[str, Any]]:
    """Return the adapters by their base tensors' names, in the file's order, and architecture and alpha.

    Raises
    ------
    FormatError   If the file is no LoRA adapter in GGUF. The message names file, key and rule.
    OSError       If it cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = _Head(Path(path), file.read(min(size, MAX_HEAD)), size)
        fields, tensors = head.read()
        alpha = fields.get("adapter.lora.alpha")
        rule = "a number in (0, 1e6] (llama.cpp takes 0 for 'do not scale')"
        alpha = checks.real(f"{path}: adapter.lora.alpha", alpha, rule, lambda x: 0 < x <= MAX_ALPHA, FormatError)
        pairs = _pairs(Path(path), tensors)
        check_count(str(path), len(pairs), size)
        configs = {rank: LoraConfig(rank=rank, alpha=alpha) for rank in {a.shape[0] for a, _ in pairs.values()}}
        adapters = AdapterSet.zeros(
            {base: (a.shape[1], b.shape[0], configs[a.shape[0]]) for base, (a, b) in pairs.items()}
        )
        for base, pair in pairs.items():
            for tensor, matrix in zip(pair, (adapters[base].a_matrix, adapters[base].b_matrix), strict=True):
                file.seek(tensor.offset)
                raw = file.read(tensor.n_bytes)
                if len(raw) != tensor.n_bytes:
                    raise FormatError(f"{path}: must have {size} bytes, got a file that was cut while it was read")
                widen(np.frombuffer(raw, DTYPES[tensor.kind]).reshape(tensor.shape), matrix)
    return adapters, {"architecture": fields.get("general.architecture"), "alpha": alpha}


def _pairs(path: Path, tensors: dict[str, _Tensor]) -> dict[str, tuple[_Tensor, _Tensor]]:
    """Return A and B by the base tensor's name."""
    bases = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    pairs = {}
    for base in bases:
        for part in PARTS:
            if f"{base}.{part}" not in tensors:
                raise FormatError(f"{path}: {base!r:.120} must have both matrices, got none named {part}")
        a, b = (tensors[f"{base}.{part}"] for part in PARTS)
        if a.shape[0] != b.shape[1]:
            got = f"lora_a {list(a.shape)} and lora_b {list(b.shape)}"
            raise FormatError(f"{path}: {base!r:.120} must have one rank, got {got}")
        pairs[base] = (a, b)
    return pairs


class _Head:
    """What comes before the tensors' bytes, taken one item after another."""

    def __init__(self, path: Path, raw: bytes, size: int) -> None:
        self._path, self._raw, self._size = path, raw, size
        self._at = len(GGUF_MAGIC)

    def read(self) -> tuple[dict[str, Any], dict[str, _Tensor]]:
        """Return the keys' values (of arrays None), and the tensors in their order, each within the file."""
        if not self._raw.startswith(GGUF_MAGIC):
            self._refuse("must begin with GGUF", repr(self._raw[:4]))
        version = self._number("I")
        if version not in VERSIONS:
            self._refuse(f"version must be one of {VERSIONS}, little endian", str(version))
        n_tensors, n_keys = self._number("Q"), self._number("Q")
        if max(n_tensors, n_keys) > MAX_COUNT:
            self._refuse(f"must have at most {MAX_COUNT} tensors and keys", f"{n_tensors} and {n_keys}")
        fields: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._text("a key")
            if key in fields:
                self._refuse("a key must not be repeated", f"{key!r:.120} twice")
            fields[key] = self._value(key, self._number("I"))
            if key in REQUIRED:  # at once: a model's vocabulary need not be read to see that it is none of ours
                self._require(key, fields)
        for key in REQUIRED:
            self._require(key, fields)
        return fields, self._tensors(n_tensors, fields.get("general.alignment", 32))

    def _tensors(self, count: int, alignment: Any) -> dict[str, _Tensor]:
        if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            self._refuse("general.alignment must be a power of two, at most 2^20", f"{alignment!r:.80}")
        if not count:
            self._refuse("must hold the tensors of at least one adapter", "none")
        tensors: dict[str, _Tensor] = {}
        end = 0
        for _ in range(count):
            name = self._text("a tensor's name")
            if name in tensors:
                self._refuse("a tensor must not be repeated", f"{name!r:.120} twice")
            base, _, part = name.rpartition(".")
            if not base or part not in PARTS:
                self._refuse("a tensor's name must be <base tensor>.lora_a or .lora_b", f"{name!r:.120}")
            n_sizes = self._number("I")
            if n_sizes > MAX_RANK:
                self._refuse(f"{name!r:.120} must have at most {MAX_RANK} sizes", str(n_sizes))
            shape = tuple(self._number("Q") for _ in range(n_sizes))[::-1]
            kind, offset = self._number("I"), self._number("Q")
            if kind not in DTYPES:
                self._refuse(f"{name!r:.120} must be F32, F16 or BF16 (type 0, 1 or 30)", f"type {kind}")
            if len(shape) != 2 or not all(1 <= length <= MAX_SIZE for length in shape):
                self._refuse(f"{name!r:.120} must be a matrix of 1 to 2^31 rows and columns", f"shape {list(shape)}")
            start = -(-end // alignment) * alignment
            if offset != start:
                self._refuse(f"{name!r:.120} must have offset {start}, behind the one before", str(offset))
            tensors[name] = _Tensor(kind, shape, offset)
            end = start + tensors[name].n_bytes
        first = -(-self._at // alignment) * alignment
        last = first + -(-end // alignment) * alignment
        if not first + end <= self._size <= last:
            self._refuse(f"must have {first + end} bytes, or with padding {last}", str(self._size))
        return {name: one._replace(offset=first + one.offset) for name, one in tensors.items()}

    def _value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self._text(repr(key)[:120])
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind != ARRAY:
            self._refuse(f"{key!r:.120} must have a type that GGUF has", str(kind))
        inner, count = self._number("I"), self._number("Q")
        if inner in SCALARS:
            self._skip(count * struct.calcsize(SCALARS[inner]))
        elif inner == STRING:
            for _ in range(count):  # ends at the file's end at the latest, as each takes some bytes
                self._skip(self._number("Q"))
        else:
            self._refuse(f"{key!r:.120} must be an array of numbers or strings", f"type {inner}")
        return None

    def _require(self, key: str, fields: dict[str, Any]) -> None:
        if fields.get(key) != REQUIRED[key]:
            self._refuse(f"{key} must be {REQUIRED[key]!r}", f"{fields.get(key)!r:.80}")

    def _text(self, what: str) -> str:
        start = self._skip(self._number("Q"))
        try:
            return self._raw[start : self._at].decode()
        except UnicodeDecodeError as error:
            self._refuse(f"{what} must be UTF-8", str(error))

    def _number(self, form: str) -> Any:
        start = self._skip(struct.calcsize(form))
        return struct.unpack_from(f"<{form}", self._raw, start)[0]

    def _skip(self, count: int) -> int:
        """Move on by ``count`` bytes and return where they began."""
        start, self._at = self._at, self._at + count
        if self._at > len(self._raw):
            rule = "must hold all keys and names that it announces"
            if len(self._raw) < self._size:
                rule += f", in its first {len(self._raw)} bytes"
            self._refuse(rule, f"an end at byte {self._at}, of {self._size}")
        return start

    def _refuse(self, rule: str, got: str) -> NoReturn:
        raise FormatError(f"{self._path}: {rule}, got {got}")
