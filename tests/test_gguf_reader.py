"""read_gguf: what the package gguf writes is read to the bit; of anything else the message says what is wrong."""

import math
import os
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from cylora.errors import FormatError
from cylora.formats import gguf_reader
from cylora.formats.gguf_reader import read_gguf

QUANTIZATION = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10
GOOD_KEYS: dict[str, tuple[int, Any]] = {
    "general.type": (STRING, "adapter"),
    "general.architecture": (STRING, "llama"),
    "adapter.type": (STRING, "lora"),
    "adapter.lora.alpha": (F32, 16.0),
}
A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(8, dtype=np.float32).reshape(4, 2) - 3
Tensors = Sequence[tuple[str, Sequence[int], int, int, bytes]]  # name, sizes as in the file, type, offset, bytes
GOOD_TENSORS: Tensors = [
    ("blk.0.attn_q.weight.lora_a", (3, 2), 0, 0, A.tobytes()),
    ("blk.0.attn_q.weight.lora_b", (2, 4), 0, 32, B.tobytes()),
]


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def field(kind: int, value: Any) -> bytes:
    if isinstance(value, bytes):
        return struct.pack("<I", kind) + value
    packed = text(value) if kind == STRING else struct.pack("<" + gguf_reader.SCALARS[kind], value)
    return struct.pack("<I", kind) + packed


def keyed(keys: Mapping[str, tuple[int, Any]]) -> list[tuple[str | bytes, bytes]]:
    return [(name, field(*value)) for name, value in keys.items()]


def made(
    keys: Mapping[str, tuple[int, Any]] | list[tuple[str | bytes, bytes]] = GOOD_KEYS,
    tensors: Tensors = GOOD_TENSORS,
    *,
    version: int = 3,
    alignment: int = 32,
    n_tensors: int | None = None,
    n_keys: int | None = None,
) -> bytes:
    """Return a file as the format describes it, or with something wrong."""
    listed = keys if isinstance(keys, list) else keyed(keys)
    raw = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(listed) if n_keys is None else n_keys,
    )
    raw += b"".join(text(name) + value for name, value in listed)
    for name, sizes, kind, offset, _ in tensors:
        raw += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    raw += b"\0" * (-len(raw) % alignment)
    for *_, content in tensors:
        raw += content + b"\0" * (-len(content) % alignment)
    return raw


@pytest.fixture
def reading(tmp_path: Path) -> Callable[[bytes], Any]:
    """Return a function that reads a file of these bytes."""

    def read(raw: bytes) -> Any:
        (tmp_path / "adapter.gguf").write_bytes(raw)
        return read_gguf(tmp_path / "adapter.gguf")

    return read


def written(path: Path, tensors: Mapping[str, NDArray[Any]], dtype: str = "float32", **more: Any) -> None:
    """Write an adapter with the package's own writer."""
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 12.5)
    for name, value in more.items():
        writer.add_array(name, value) if isinstance(value, list) else writer.add_uint32(name, value)
    for name, matrix in tensors.items():
        writer.add_tensor(name, matrix, raw_dtype=QUANTIZATION[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------------- whole files


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_the_package_writes_is_read_to_the_bit(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    sizes = {"blk.0.attn_q.weight": (7, 3, 5), "blk.10.ffn_up.weight": (1, 4, 33), "output.weight": (16, 1, 1)}
    expected, stored = {}, {}
    for base, (d_in, rank, d_out) in sizes.items():
        for name, shape in ((f"{base}.lora_a", (rank, d_in)), (f"{base}.lora_b", (d_out, rank))):
            numbers = rng.normal(size=shape).astype(np.float32).astype(DTYPES[dtype])
            expected[name] = numbers.astype(np.float32)
            stored[name] = numbers.view(np.uint8) if dtype == "bfloat16" else numbers
    written(tmp_path / "adapter.gguf", stored, dtype, **{"some.count": 3, "numbers": [1, 2, 3], "words": ["a", "bc"]})

    adapters, facts = read_gguf(tmp_path / "adapter.gguf")
    assert list(adapters) == list(sizes)
    for base, (d_in, rank, d_out) in sizes.items():
        one = adapters[base]
        assert (one.d_in, one.rank, one.d_out, one.alpha, one.scaling) == (d_in, rank, d_out, 12.5, 12.5 / rank)
        assert one.a_matrix.tobytes() == expected[f"{base}.lora_a"].tobytes()
        assert one.b_matrix.tobytes() == expected[f"{base}.lora_b"].tobytes()
    assert facts == {"architecture": "qwen3", "alpha": 12.5}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 32, 128])
def test_hand_made_file_is_read(reading: Callable[[bytes], Any], version: int, alignment: int) -> None:
    second = -(-A.nbytes // alignment) * alignment
    tensors = [GOOD_TENSORS[0], (*GOOD_TENSORS[1][:3], second, B.tobytes())]
    keys = GOOD_KEYS | ({} if alignment == 32 else {"general.alignment": (U32, alignment)})
    adapters, facts = reading(made(keys, tensors, version=version, alignment=alignment))
    assert np.array_equal(adapters["blk.0.attn_q.weight"].a_matrix, A)
    assert np.array_equal(adapters["blk.0.attn_q.weight"].b_matrix, B)
    assert facts == {"architecture": "llama", "alpha": 16.0}


def test_padding_behind_the_last_tensor_may_be_missing(reading: Callable[[bytes], Any]) -> None:
    tensors = [GOOD_TENSORS[0], ("blk.0.attn_q.weight.lora_b", (2, 3), 0, 32, B[:3].tobytes())]
    raw = made(tensors=tensors)
    for cut in range(9):
        adapters, _ = reading(raw[: len(raw) - cut])
        assert np.array_equal(adapters["blk.0.attn_q.weight"].b_matrix, B[:3])
    with pytest.raises(FormatError, match=rf"must have {len(raw) - 8} bytes, or with padding {len(raw)}, got"):
        reading(raw[:-9])


def test_weights_may_be_nan_or_infinite(reading: Callable[[bytes], Any]) -> None:
    values = A.copy()
    values[0, :2] = math.nan, math.inf
    adapters, _ = reading(made(tensors=[(*GOOD_TENSORS[0][:4], values.tobytes()), GOOD_TENSORS[1]]))
    assert np.array_equal(adapters["blk.0.attn_q.weight"].a_matrix, values, equal_nan=True)


def test_keys_of_every_type_and_arrays_are_passed_over(reading: Callable[[bytes], Any]) -> None:
    keys = {f"number.{kind}": (kind, 1) for kind in gguf_reader.SCALARS}
    keys |= {
        f"array.{kind}": (ARRAY, struct.pack("<IQ", kind, 3) + struct.pack("<3" + form, 1, 0, 1))
        for kind, form in gguf_reader.SCALARS.items()
    }
    keys["words"] = (ARRAY, struct.pack("<IQ", STRING, 2) + text("one") + text(""))
    adapters, _ = reading(made(keys | GOOD_KEYS))
    assert np.array_equal(adapters["blk.0.attn_q.weight"].a_matrix, A)


def test_reading_needs_no_package(reading: Callable[[bytes], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert reading(made())[1] == {"architecture": "llama", "alpha": 16.0}


# ---------------------------------------------------------------------- files with something wrong


def one(name: str, sizes: Sequence[int], kind: int = 0, offset: int = 0, n_bytes: int = 24) -> Tensors:
    return [(name, sizes, kind, offset, bytes(n_bytes)), GOOD_TENSORS[1]]


def without(key: str) -> dict[str, tuple[int, Any]]:
    return {name: value for name, value in GOOD_KEYS.items() if name != key}


LORA_A = "blk.0.attn_q.weight.lora_a"
ENDLESS = struct.pack("<IQ", U32, 2**62)  # an array that would take all memory if believed
DAMAGED = {
    "nothing": (b"", r"must begin with GGUF, got b''"),
    "another magic": (b"GGML" + bytes(99), r"must begin with GGUF, got b'GGML'"),
    "nothing but the magic": (b"GGUF", r"must hold all keys and names that it announces, got an end at byte 8, of 4"),
    "version 1": (made(version=1), r"version must be one of \(2, 3\), little endian, got 1$"),
    "big endian": (made(version=3 << 24), r"version must be one of \(2, 3\), little endian, got 50331648"),
    "too many tensors": (made(n_tensors=2**40), r"at most 65536 tensors and keys, got 1099511627776 and 4"),
    "too many keys": (made(n_keys=2**63), r"at most 65536 tensors and keys, got 2 and 9223372036854775808"),
    "more keys than there are": (made(n_keys=60_000), r"must hold all keys and names that it announces, got an end at"),
    "a key twice": (
        made([*keyed(GOOD_KEYS), *keyed(GOOD_KEYS)]),
        r"key must not be repeated, got 'general.type' twice",
    ),
    "a key that is no text": (made([(b"\xff", field(U32, 1))]), r"a key must be UTF-8, got .*codec can't decode"),
    "a value that is no text": (
        made({"general.name": (STRING, text(b"\xff"))}),
        r"'general.name' must be UTF-8, got .*codec can't decode",
    ),
    "a type of the future": (made({"x": (13, b"")}), r"'x' must have a type that GGUF has, got 13"),
    "an array of arrays": (
        made({"x": (ARRAY, struct.pack("<IQ", ARRAY, 1))}),
        r"'x' must be an array of numbers or strings, got type 9",
    ),
    "an endless array": (made({"x": (ARRAY, ENDLESS)}), r"must hold all keys and names that it announces"),
    "an endless array of strings": (
        made({"x": (ARRAY, struct.pack("<IQ", STRING, 2**62))}),
        r"must hold all keys and names that it announces",
    ),
    "a model": (
        made({"general.type": (STRING, "model"), "x": (ARRAY, ENDLESS)}),
        r"general.type must be 'adapter', got 'model'",
    ),
    "an old model": (made(without("general.type")), r"general.type must be 'adapter', got None"),
    "another kind of adapter": (
        made(GOOD_KEYS | {"adapter.type": (STRING, "control")}),
        r"adapter.type must be 'lora', got 'control'",
    ),
    "no kind of adapter": (made(without("adapter.type")), r"adapter.type must be 'lora', got None"),
    "no alpha": (made(without("adapter.lora.alpha")), r"adapter.lora.alpha must be a number in .*, got None"),
    "alpha 0": (
        made(GOOD_KEYS | {"adapter.lora.alpha": (F32, 0.0)}),
        r"adapter.lora.alpha must be a number in \(0, 1e6\] \(llama.cpp takes 0 for 'do not scale'\), got 0.0",
    ),
    "alpha NaN": (made(GOOD_KEYS | {"adapter.lora.alpha": (F32, math.nan)}), r"alpha must be a number in .*, got nan"),
    "alpha too large": (made(GOOD_KEYS | {"adapter.lora.alpha": (F32, 2e6)}), r"alpha must be a number in .*2000000.0"),
    "alpha a text": (made(GOOD_KEYS | {"adapter.lora.alpha": (STRING, "8")}), r"alpha must be a number in .*, got '8'"),
    "alignment 0": (
        made(GOOD_KEYS | {"general.alignment": (U32, 0)}),
        r"general.alignment must be a power of two, at most 2\^20, got 0",
    ),
    "alignment 48": (made(GOOD_KEYS | {"general.alignment": (U32, 48)}), r"alignment must be a power of two.*got 48"),
    "alignment 2^40": (made(GOOD_KEYS | {"general.alignment": (U64, 2**40)}), r"alignment must be .*got 1099511627776"),
    "alignment a text": (made(GOOD_KEYS | {"general.alignment": (STRING, "1")}), r"alignment must be .*got '1'"),
    "alignment true": (made(GOOD_KEYS | {"general.alignment": (7, 1)}), r"alignment must be .*got True"),
    "no tensors": (made(tensors=[]), r"must hold the tensors of at least one adapter, got none"),
    "a tensor twice": (made(tensors=[GOOD_TENSORS[0]] * 2), r"tensor must not be repeated, got '.*lora_a' twice"),
    "a whole weight": (
        made(tensors=one("output.weight", (3, 2))),
        r"a tensor's name must be <base.*got 'output.weight'",
    ),
    "no base tensor": (made(tensors=one(".lora_a", (3, 2))), r"a tensor's name must be <base .*, got '.lora_a'"),
    "no dot": (
        made(tensors=one("lora_a", (3, 2))),
        r"a tensor's name must be <base tensor>.* or .lora_b, got 'lora_a'",
    ),
    "five sizes": (made(tensors=one(LORA_A, (1,) * 5)), r"lora_a' must have at most 4 sizes, got 5"),
    "three sizes": (
        made(tensors=one(LORA_A, (3, 2, 1))),
        r"must be a matrix of 1 to 2\^31 rows and columns, got shape",
    ),
    "one size": (made(tensors=one(LORA_A, (6,))), r"must be a matrix of 1 to .*, got shape \[6\]"),
    "no elements": (made(tensors=one(LORA_A, (3, 0))), r"must be a matrix of 1 to .*, got shape \[0, 3\]"),
    "huge": (
        made(tensors=one(LORA_A, (2**62, 8))),
        r"must be a matrix of 1 to .*, got shape \[8, 4611686018427387904\]",
    ),
    "quantized": (
        made(tensors=one(LORA_A, (3, 2), kind=8)),
        r"must be F32, F16 or BF16 \(type 0, 1 or 30\), got type 8",
    ),
    "a hole": (
        made(tensors=[GOOD_TENSORS[0], (*GOOD_TENSORS[1][:3], 64, B.tobytes())]),
        r"lora_b' must have offset 32, behind the one before, got 64",
    ),
    "an overlap": (
        made(tensors=[GOOD_TENSORS[0], (*GOOD_TENSORS[1][:3], 0, B.tobytes())]),
        r"lora_b' must have offset 32, behind the one before, got 0",
    ),
    "bytes too many": (made() + b"\0", r"must have 384 bytes, or with padding 384, got 385"),
    "bytes too few": (made()[:-1], r"must have 384 bytes, or with padding 384, got 383"),
    "lora_b missing": (made(tensors=GOOD_TENSORS[:1]), r"'blk.0.attn_q.weight' must have both matrices, got .* lora_b"),
    "lora_a missing": (
        made(tensors=[(*GOOD_TENSORS[1][:3], 0, B.tobytes())]),
        r"'blk.0.attn_q.weight' must have both matrices, got none named lora_a",
    ),
    "two ranks": (
        made(tensors=[GOOD_TENSORS[0], ("blk.0.attn_q.weight.lora_b", (4, 2), 0, 32, B.tobytes())]),
        r"'blk.0.attn_q.weight' must have one rank, got lora_a \[2, 3\] and lora_b \[2, 4\]",
    ),
    "a name that is no text": (
        made().replace(b"blk.0.attn_q.weight.lora_a", b"blk.0.attn_q.weight.lora_\xff"),
        r"a tensor's name must be UTF-8, got",
    ),
}


@pytest.mark.parametrize(("raw", "message"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_wrong_is_said(reading: Callable[[bytes], Any], tmp_path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        reading(raw)
    assert str(caught.value).startswith(f"{tmp_path / 'adapter.gguf'}: ")
    assert len(str(caught.value)) < len(str(tmp_path)) + 400


def test_head_beyond_the_limit_is_refused(reading: Callable[[bytes], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    raw = made(GOOD_KEYS | {"long": (STRING, "x" * 1000)})
    assert len(reading(raw)[0]) == 1
    monkeypatch.setattr(gguf_reader, "MAX_HEAD", 900)
    with pytest.raises(
        FormatError, match=r"all keys and names that it announces, in its first 900 bytes, got an end at"
    ):
        reading(raw)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    path.write_bytes(made())
    for length in reversed(range(len(made()))):
        os.truncate(path, length)
        with pytest.raises(FormatError):
            read_gguf(path)


def test_every_flipped_bit_of_the_head_is_refused_or_takes_no_more_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    raw = made(GOOD_KEYS | {"array": (ARRAY, struct.pack("<IQ2I", U32, 2, 1, 2))})
    path.write_bytes(raw)
    head = len(raw) - 2 * 32
    refused = 0
    with path.open("r+b", buffering=0) as file:
        for place in range(8 * head):
            at, bit = divmod(place, 8)
            os.pwrite(file.fileno(), bytes([raw[at] ^ 1 << bit]), at)
            try:
                adapters, _ = read_gguf(path)
            except FormatError:
                refused += 1
            else:
                assert 0 < adapters.param_count() <= A.size + B.size  # fewer: one size less ends within the padding
            os.pwrite(file.fileno(), raw[at : at + 1], at)
    assert refused > 4 * head  # text can change and still be text


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link", "nothing"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "adapter.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path(os.devnull)
    elif kind == "link":
        (tmp_path / "file").write_bytes(made())
        path.symlink_to("file")
    if kind == "nothing":
        with pytest.raises(FileNotFoundError):
            read_gguf(path)
    else:
        with pytest.raises(FormatError, match="must be a regular file, got a"):
            read_gguf(path)


def test_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter.gguf"
    path.write_bytes(made())
    zeros = gguf_reader.AdapterSet.zeros

    def cut(members: Any) -> Any:
        os.truncate(path, path.stat().st_size - 1)
        return zeros(members)

    monkeypatch.setattr(gguf_reader.AdapterSet, "zeros", cut)
    with pytest.raises(FormatError, match=r"must have 384 bytes, got a file that was cut while it was read"):
        read_gguf(path)


def test_file_may_be_as_large_as_a_model_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(made({"general.type": (STRING, "model")}))
    os.truncate(path, 2**36)  # sparse
    with pytest.raises(FormatError, match=r"general.type must be 'adapter', got 'model'"):
        read_gguf(path)
