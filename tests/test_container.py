"""The safetensors container: what we write the library reads, what it writes we read, and nothing else."""

import errno
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from raw_container import one, open_descriptors, raw

from cylora.errors import FormatError, InputError
from cylora.formats import container, strict_json
from cylora.formats.container import DTYPES, Tensor, TensorFile, content, open_regular


def joined(*arguments: Any, **keywords: Any) -> bytes:
    return b"".join(content(*arguments, **keywords))


def by_name(file: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Return what the library understands."""
    return {
        name: (each["dtype"], each["shape"], bytes(each["data"])) for name, each in safetensors.deserialize(file)
    }  # fmt: skip


def write(path: Path, file: bytes) -> Path:
    path.write_bytes(file)
    return path


# ------------------------------------------------------------------ writing

MIXED: dict[str, Any] = {
    "bytes": np.arange(3, dtype=np.uint8),
    "scalar": np.array(2.5),
    "nothing": np.zeros((2, 0, 3), np.float32),
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "truth": np.array([True, False]),
    "counts": np.array([-1, 2**62]),
}


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "BF16"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 3), (3, 0, 2), (1,) * 8], ids=str)
def test_library_reads_each_dtype_and_shape(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(DTYPES[dtype])
    file = joined({"x": array}, {})
    assert by_name(file) == {"x": (dtype, list(shape), array.tobytes())}
    again = safetensors.numpy.load(file)["x"]
    assert again.dtype == array.dtype
    np.testing.assert_array_equal(again, array)
    with TensorFile(write(tmp_path / "file", file), leading_space=False) as opened:
        own = opened.read("x")
    assert (own.dtype, own.shape, own.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_bfloat16_travels_as_its_bits(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3e38], ml_dtypes.bfloat16)
    arrays = {"a": values.view(np.uint16), "f": np.ones(1, np.float32)}
    file = joined(arrays, {}, bfloat16=True)
    assert by_name(file)["a"] == ("BF16", [3], values.tobytes())
    assert by_name(file)["f"][0] == "F32"
    assert by_name(joined(arrays, {}))["a"][0] == "U16"
    with TensorFile(write(tmp_path / "file", file)) as opened:
        assert opened.tensors["a"].dtype == "BF16"
        again = opened.read("a")
    assert again.dtype == np.uint16
    assert (again.view(ml_dtypes.bfloat16) == values).all()


def test_file_is_laid_out_as_promised() -> None:
    file = joined(MIXED, {"z": "1", "a": "é"})
    (length,) = struct.unpack("<Q", file[:8])
    header = file[8 : 8 + length]
    assert header == (
        b'{"__metadata__":{"a":"\\u00e9","z":"1"},"bytes":{"data_offsets":[48,51],"dtype":"U8","shape":[3]},'
        b'"counts":{"data_offsets":[8,24],"dtype":"I64","shape":[2]},'
        b'"matrix":{"data_offsets":[24,48],"dtype":"F32","shape":[2,3]},'
        b'"nothing":{"data_offsets":[24,24],"dtype":"F32","shape":[2,0,3]},'
        b'"scalar":{"data_offsets":[0,8],"dtype":"F64","shape":[]},'
        b'"truth":{"data_offsets":[51,53],"dtype":"BOOL","shape":[2]}}'
    ).ljust(length)
    assert length % 8 == 0
    assert len(file) == 8 + length + 53
    assert by_name(file).keys() == MIXED.keys()


def test_same_content_gives_the_same_bytes() -> None:
    again = {name: array.copy() for name, array in MIXED.items()}
    assert joined(MIXED, {"a": "1", "b": "2"}) == joined(again, {"b": "2", "a": "1"})


def test_arrays_are_not_copied_and_may_be_read_only() -> None:
    array = np.arange(4, dtype=np.float32)
    array.setflags(write=False)
    _, part = content({"x": array}, {})
    assert np.shares_memory(np.frombuffer(part, np.uint8), array)
    assert part.nbytes == 16


def test_no_tensors_at_all() -> None:
    assert by_name(joined({}, {})) == {}
    assert len(content({"x": np.zeros((0, 4))}, {})) == 1


BAD_NAMES = [
    ("", "have 1 to 512 bytes"),
    ("x" * 513, "have 1 to 512 bytes"),
    ("é" * 257, "have 1 to 512 bytes"),
    ("a\nb", "have no control characters"),
    ("\0", "have no control characters"),
    ("a\x1f", "have no control characters"),
    ("a\x7f", "have no control characters"),
    ("a\x9f", "have no control characters"),
    ("a..b", r"not contain '\.\.'"),
    ("../../etc/passwd", r"not contain '\.\.'"),
    ("__metadata__", "not be __metadata__"),
    ("\ud800", "be text"),
]
GOOD_NAMES = ["x" * 512, "é" * 256, ".", "a.b", "/etc/passwd", " ", "\xa0", "~", '"', "\\", "\N{GRINNING FACE}", "__"]


@pytest.mark.parametrize(("name", "rule"), BAD_NAMES, ids=[repr(name[:20]) for name, _ in BAD_NAMES])
def test_name_that_nobody_would_read_is_not_written(name: str, rule: str) -> None:
    with pytest.raises(InputError, match=f"^a tensor's name must {rule}, got "):
        content({"fine": np.ones(1), name: np.ones(1)}, {})


@pytest.mark.parametrize("name", GOOD_NAMES, ids=[repr(name[:20]) for name in GOOD_NAMES])
def test_unusual_names_travel(name: str, tmp_path: Path) -> None:
    file = joined({name: np.ones(2)}, {name: name})
    assert by_name(file).keys() == {name}
    with TensorFile(write(tmp_path / "file", file)) as opened:
        assert opened.tensors == {name: Tensor("F64", (2,), 0, 16)}
        assert opened.metadata == {name: name}


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((1,) * 9), "'x' must have at most 8 dimensions, got 9$"),
        (np.ones(1, np.complex64), "'x' must have a dtype among float64, .*, bool, got complex64$"),
        (np.ones(1, ">f4"), "'x' must have a dtype among .*, got >f4$"),
        (np.ones(1, ml_dtypes.bfloat16), "'x' must have a dtype among .*, got bfloat16$"),
    ],
)
def test_array_that_we_would_not_read_is_not_written(array: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        content({"x": array}, {})


@pytest.mark.parametrize("metadata", [{"k": "\ud800"}, {"\udfff": "v"}])
def test_metadata_that_is_no_text_is_not_written(metadata: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"^metadata must be text, got half of a surrogate pair at '"):
        content({}, metadata)


def test_header_that_we_would_not_read_is_not_written(tmp_path: Path) -> None:
    most = strict_json.MAX_BYTES
    frame = len('{"__metadata__":{"k":""}}')
    file = joined({}, {"k": "v" * (most - frame)})
    with TensorFile(write(tmp_path / "file", file)) as opened:
        assert len(opened.metadata["k"]) == most - frame
    with pytest.raises(InputError, match=f"must fit {most} bytes, got {most + 8}$"):
        content({}, {"k": "v" * (most - frame + 1)})
    limit = strict_json.MAX_MEMORY
    many = {str(number): "" for number in range(250_000)}
    with pytest.raises(InputError, match=f"must not need more than {limit} bytes of memory, got 1[0-9]{{8}}$"):
        content({}, many)
    long = np.zeros(20 * 2**20, np.uint8)  # a longer file may have more of a header
    with TensorFile(write(tmp_path / "file", joined({"x": long}, many))) as opened:
        assert opened.metadata == many


# ------------------------------------------------------------------ reading what the library writes


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    file = safetensors.numpy.save(MIXED, {"format": "pt"})
    before = open_descriptors()
    with TensorFile(str(write(tmp_path / "file", file))) as opened:
        assert open_descriptors() == before + 1
        assert opened.path == tmp_path / "file"
        assert opened.metadata == {"format": "pt"}
        assert opened.head == file[: len(opened.head)]
        assert opened.tensors.keys() == MIXED.keys()
        assert [each.start for each in opened.tensors.values()] == sorted(t.start for t in opened.tensors.values())
        for name, array in MIXED.items():
            again = opened.read(name)
            assert (again.dtype, again.shape, again.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert open_descriptors() == before
    opened.close()  # again: nothing


def test_metadata_may_be_missing(tmp_path: Path) -> None:
    with TensorFile(write(tmp_path / "file", raw("{}"))) as opened:
        assert (opened.metadata, opened.tensors) == ({}, {})


def test_a_page_of_spaces_is_accepted_where_it_may_be(tmp_path: Path) -> None:
    path = write(tmp_path / "file", raw(" " * 4096 + one() + " " * 9, bytes(4)))
    with TensorFile(path) as opened:
        assert opened.read("a").tolist() == [0.0]
    with pytest.raises(FormatError, match=r"file: header: JSON must begin with {, got b' '$"):
        TensorFile(path, leading_space=False)


def test_read_into_writes_where_it_is_told(tmp_path: Path) -> None:
    array = np.arange(5, dtype=np.float32)
    place = np.full(28, 255, np.uint8)
    with TensorFile(write(tmp_path / "file", joined({"x": array}, {}))) as opened:
        opened.read_into("x", place[4:24])
    assert place[4:24].tobytes() == array.tobytes()
    assert set(place[:4].tolist() + place[24:].tolist()) == {255}


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(container.os, "preadv", lambda file, parts, at: preadv(file, [parts[0][:3]], at))
    with TensorFile(write(tmp_path / "file", joined(MIXED, {"k": "v"}))) as opened:
        assert opened.metadata == {"k": "v"}
        assert opened.read("matrix").tobytes() == MIXED["matrix"].tobytes()


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40).filter(
    lambda name: ".." not in name and name != "__metadata__"
)
ARRAYS = stn.arrays(
    st.sampled_from([np.dtype(kind) for kind in dict.fromkeys(DTYPES.values())]),
    stn.array_shapes(min_dims=0, max_dims=8, min_side=0, max_side=3),
)


@given(st.dictionaries(NAMES, ARRAYS, max_size=5), st.dictionaries(st.text("aé\0", max_size=3), NAMES), st.booleans())
def test_round_trip_through_both_codecs(tensors: dict[str, Any], metadata: dict[str, str], bfloat16: bool) -> None:
    def wanted(array: Any) -> tuple[str, list[int], bytes]:
        dtype = "BF16" if bfloat16 and array.dtype == np.uint16 else container.NAMES[array.dtype]
        return dtype, list(array.shape), array.tobytes()

    ours = joined(tensors, metadata, bfloat16=bfloat16)
    expected = {name: wanted(array) for name, array in tensors.items()}
    assert by_name(ours) == expected
    files = [ours]
    if not bfloat16:  # NumPy's half of the library knows none; and it writes no JSON for no tensors with {}
        files.append(safetensors.numpy.save(tensors, metadata or None))
    for file in files:
        with in_memory(file) as opened:
            assert opened.metadata == metadata
            found = {name: (t.dtype, list(t.shape), opened.read(name).tobytes()) for name, t in opened.tensors.items()}
            assert found == expected


def in_memory(file: bytes) -> TensorFile:
    """Open bytes as a file without a disk."""
    descriptor = os.memfd_create("file")
    os.write(descriptor, file)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(container, "open_regular", lambda _: descriptor)  # its path would be a link, which is refused
        return TensorFile("in memory")


# ------------------------------------------------------------------ what is not a file


def test_links_are_refused_also_those_to_nowhere(tmp_path: Path) -> None:
    write(tmp_path / "file", raw("{}"))
    for target in ("file", "nowhere", "link"):
        link = tmp_path / "link"
        link.symlink_to(tmp_path / target)
        message = r"link: must be a regular file, got a symbolic link \(cp -L makes a file of it\)$"
        with pytest.raises(FormatError, match=message):
            TensorFile(link)
        link.unlink()


@pytest.mark.parametrize("kind", ["pipe", "directory", "zero", "null"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)  # opening it would wait for a writer
    elif kind == "directory":
        path.mkdir()
    else:
        path = Path("/dev") / kind
    before = open_descriptors()
    with pytest.raises(FormatError, match=f"{kind}: must be a regular file, got a directory, pipe or device$"):
        TensorFile(path)
    assert open_descriptors() == before


def test_missing_file_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TensorFile(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError):
        TensorFile(write(tmp_path / "file", b"") / "below")


def test_unreadable_file_is_the_systems_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "file", raw("{}"))

    def denied(*_: object) -> int:  # also where the tests run as root
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(container.os, "open", denied)
    with pytest.raises(PermissionError, match="Permission denied"):
        TensorFile(path)


def test_open_regular_does_not_pass_the_file_to_children(tmp_path: Path) -> None:
    descriptor = open_regular(write(tmp_path / "file", b"x"))
    try:
        assert not os.get_inheritable(descriptor)
        assert stat.S_ISREG(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth", ".PT"])
def test_pickles_by_extension_are_not_even_opened(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / f"adapter_model{suffix}", raw("{}"))
    monkeypatch.setattr(container.os, "open", None)
    with pytest.raises(FormatError, match=rf"the file must be safetensors, got \{suffix}, which is never opened$"):
        TensorFile(path)


# ------------------------------------------------------------------ what happens while it is read


def test_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "file", joined(MIXED, {}))
    with TensorFile(path) as opened:
        start = len(opened.head) + opened.tensors["matrix"].start
        for size in (start + 5, start, 0):
            os.truncate(path, size)
            with pytest.raises(
                FormatError, match=r"'matrix' must have 24 bytes, got a file that was cut while it was read$"
            ):
                opened.read("matrix")


@pytest.mark.parametrize(("left", "bytes_wanted"), [(0, 8), (7, 8), (8, 74), (30, 74)])
def test_file_cut_while_its_header_is_read(
    left: int, bytes_wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "file", raw(one().ljust(66), bytes(4)))
    size = os.stat(path)
    preadv = os.preadv

    def cut_first(file: int, parts: Any, at: int) -> int:
        if left < 8 or len(parts[0]) > 8:
            os.truncate(path, left)
        return preadv(file, parts, at)

    monkeypatch.setattr(container.os, "preadv", cut_first)
    before = open_descriptors()
    with pytest.raises(FormatError, match=f"header must have {bytes_wanted} bytes, got a file that was cut"):
        TensorFile(path)
    assert size.st_size == 78
    assert open_descriptors() == before


@pytest.mark.parametrize("call", ["fstat", "preadv"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=repr)
def test_no_descriptor_is_left_after_an_error(
    call: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise error

    path = write(tmp_path / "file", raw(one(), bytes(4)))
    before = open_descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(container.os, call, fail)
        with pytest.raises(type(error)):
            TensorFile(path)
    assert open_descriptors() == before
    opened = TensorFile(path)
    monkeypatch.setattr(container.os, "preadv", fail)
    with pytest.raises(type(error)), opened:
        opened.read("a")
    assert open_descriptors() == before


# ------------------------------------------------------------------ rules of the header

LIMIT = strict_json.MAX_BYTES
RULES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file must have at least 8 bytes, got 0$"),
    "seven bytes": (b"\2" + bytes(6), "the file must have at least 8 bytes, got 7$"),
    "no header": (bytes(8), f"header must have 2 to {LIMIT} bytes, got 0$"),
    "header of one byte": (raw("{", length=1), f"header must have 2 to {LIMIT} bytes, got 1$"),
    "header over the cap": (raw("{}", length=LIMIT + 1), f"header must have 2 to {LIMIT} bytes, got {LIMIT + 1}$"),
    "header over the file": (raw("{}", length=3), "header must end within the file's 10 bytes, got 3$"),
    "cut header like a pickle": (raw("{}", length=128), "header must end within the file's 10 bytes, got 128$"),
    "list": (raw("[]"), "header must be an object, got list$"),
    "null": (raw("null"), "header must be an object, got NoneType$"),
    "no JSON": (raw("{]"), "file: header: the text must be JSON, got "),
    "metadata list": (raw('{"__metadata__":[]}'), r"__metadata__ must be an object of strings, got \[\]$"),
    "metadata null": (raw('{"__metadata__":null}'), "__metadata__ must be an object of strings, got None$"),
    "metadata number": (raw('{"__metadata__":{"a":1}}'), "__metadata__ must be an object of strings, got {'a': 1}$"),
    "name": (raw(one(name="")), "a tensor's name must have 1 to 512 bytes, got ''$"),
    "long name": (raw(one(name="n" * 600)), f"a tensor's name must have 1 to 512 bytes, got '{'n' * 80}'$"),
    "entry": (raw('{"a":[]}'), "'a' must have the keys dtype, shape and data_offsets, got list$"),
    "missing key": (
        raw('{"a":{"shape":[],"dtype":"U8"}}'),
        r"'a' must have the keys dtype, shape and data_offsets, got \['dtype', 'shape'\]$",
    ),
    "unknown key": (raw(one(more=',"x":1'), bytes(4)), r"'a' must have the keys .* got \['data_offsets', 'dtype', "),
    "dtype": (raw(one(dtype='"F8"')), "'a' dtype must be one of F64, .*, BOOL, got 'F8'$"),
    "dtype list": (raw(one(dtype='["F32"]')), r"'a' dtype must be one of .*, got \['F32'\]$"),
    "shape": (raw(one(shape="1")), "'a' shape must be at most 8 integers >= 0, got 1$"),
    "shape below zero": (raw(one(shape="[-1]")), r"'a' shape must be at most 8 integers >= 0, got \[-1\]$"),
    "shape of floats": (raw(one(shape="[1.0]")), r"'a' shape must be at most 8 integers >= 0, got \[1.0\]$"),
    "shape of booleans": (raw(one(shape="[true]")), r"'a' shape must be at most 8 integers >= 0, got \[True\]$"),
    "rank": (raw(one(shape="[1,1,1,1,1,1,1,1,1]")), r"'a' shape must be at most 8 integers >= 0, got \[1, 1, .*\]$"),
    "offsets": (raw(one(offsets="{}")), "'a' data_offsets must be two integers >= 0, got {}$"),
    "one offset": (raw(one(offsets="[4]")), r"'a' data_offsets must be two integers >= 0, got \[4\]$"),
    "three offsets": (raw(one(offsets="[0,4,8]")), r"'a' data_offsets must be two integers >= 0, got \[0, 4, 8\]$"),
    "span": (raw(one(offsets="[0,8]"), bytes(8)), r"'a' data_offsets must span the 4 bytes of F32 \[1\], got \[0, 8\]"),
    "span below zero": (raw(one(offsets="[4,0]"), bytes(4)), r"must span the 4 bytes of F32 \[1\], got \[4, 0\]$"),
    "overflow": (
        raw(one(shape="[2147483648,1073741824]")),
        r"'a' shape must span less than 2\^63 bytes, got F32 \[2147483648, 1073741824\]$",
    ),
    "overflow beside zero": (
        raw(one(shape="[4611686018427387904,4,0]", offsets="[0,0]")),
        r"'a' shape must span less than 2\^63 bytes, got F32 \[4611686018427387904, 4, 0\]$",
    ),
    "hole": (
        raw(one(offsets="[4,8]"), bytes(8)), "'a' data_offsets must begin where the one before ends, 0, got 4$"
    ),
    "overlap": (
        raw(one()[:-1] + ',"b":{"dtype":"F32","shape":[1],"data_offsets":[3,7]}}', bytes(7)),
        "'b' data_offsets must begin where the one before ends, 4, got 3$",
    ),
    "trailing bytes": (raw(one(), bytes(5)), r"header and tensors must fill the file's 67 bytes, got 62 \+ 4$"),
    "cut tensors": (raw(one(), bytes(3)), r"header and tensors must fill the file's 65 bytes, got 62 \+ 4$"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94.", "must be safetensors, got a pickle, zip or NumPy file"),
    "short pickle": (b"\x80\x04N.", "must be safetensors, got a pickle, zip or NumPy file, which is never opened$"),
    "zip": (b"PK\3\4\x14\0\0\0\0\0", "must be safetensors, got a pickle, zip or NumPy file, which is never opened$"),
    "NumPy": (b"\x93NUMPY\1\0v\0{'descr'", "must be safetensors, got a pickle, zip or NumPy file"),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_each_rule_has_its_message(case: str, tmp_path: Path) -> None:
    file, message = RULES[case]
    path = write(tmp_path / "file", file)
    before = open_descriptors()
    with pytest.raises(FormatError, match=message) as caught:
        TensorFile(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < len(str(path)) + 300
    assert open_descriptors() == before


@pytest.mark.parametrize(("name", "rule"), BAD_NAMES[:-2], ids=[repr(name[:20]) for name, _ in BAD_NAMES[:-2]])
def test_name_that_is_not_written_is_not_read(name: str, rule: str, tmp_path: Path) -> None:
    escaped = "".join(f"\\u{ord(character):04x}" for character in name)
    with pytest.raises(FormatError, match=f"a tensor's name must {rule}, got "):
        TensorFile(write(tmp_path / "file", raw(one(name=escaped), bytes(4))))


def test_long_values_are_cut_in_messages(tmp_path: Path) -> None:
    for part in ("dtype", "shape", "offsets"):
        long: Callable[[str], str] = lambda text: f'["{text * 10_000}"' + ',"x"' * 1000 + "]"  # noqa: E731
        with pytest.raises(FormatError) as caught:
            TensorFile(write(tmp_path / "file", raw(one(**{part: long("y")}), bytes(4))))
        assert len(str(caught.value)) < len(str(tmp_path)) + 250
