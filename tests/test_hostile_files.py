"""Hand-made safetensors files, each with a fixed verdict: what a hostile or broken writer could hand us.

What is accepted the library accepts and understands alike; what is refused is refused within 64 MiB and twice the
file's size of memory, leaving no descriptor behind.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
from raw_container import MIB, memory_peak, one, open_descriptors, raw

from cylora.errors import FormatError
from cylora.formats.container import TensorFile

ACCEPTED = None
CAP = 8 * MIB
MORE = "must not need more than 67108864 bytes of memory, got up to "


def tensors(*entries: tuple[str, str, str, str]) -> str:
    """Return a header of several tensors: name, dtype, shape, offsets."""
    return "{" + ",".join(one(f'"{dtype}"', shape, at, name)[1:-1] for name, dtype, shape, at in entries) + "}"


def repeated(member: str, begin: str, end: str, size: int = CAP) -> str:
    count = (size - len(begin) - len(end) + 1) // (len(member) + 1)
    return begin + ",".join([member] * count) + end


def numbered(member: str, begin: str, end: str, size: int = CAP) -> str:
    """Repeat with another number each time, eight digits of it."""
    count = (size - len(begin) - len(end)) // (len(member.replace("%", "12345678")) + 1)
    return begin + ",".join(member.replace("%", f"{number:08x}") for number in range(count)) + end


def meta(text: str) -> str:
    return f'{{"__metadata__":{text}}}'


FLOAT = bytes(4)
FILES: dict[str, tuple[bytes, str | None]] = {
    # Accepted, however odd.
    "nothing": (raw("{}"), ACCEPTED),
    "nothing but spaces": (raw("{" + " " * 1000 + "}"), ACCEPTED),
    "one number": (raw(one(), FLOAT), ACCEPTED),
    "scalar": (raw(one(shape="[]"), FLOAT), ACCEPTED),
    "eight dimensions": (raw(one(shape="[1,1,1,1,1,1,1,1]"), FLOAT), ACCEPTED),
    "no numbers": (raw(one(shape="[0]", offsets="[0,0]")), ACCEPTED),
    "no numbers, large sizes": (raw(one('"U8"', "[0,4294967296,2147483647]", "[0,0]")), ACCEPTED),
    "a thousand empty tensors at one place": (
        raw(tensors(*((f"t{number}", "F64", "[0,7]", "[0,0]") for number in range(1000)))), ACCEPTED
    ),
    "empty tensors before, between and after": (
        raw(
            tensors(
                ("z", "U8", "[0]", "[9,9]"), ("a", "U8", "[5]", "[4,9]"), ("m", "U8", "[0]", "[4,4]"),
                ("b", "F32", "[1]", "[0,4]"), ("n", "F64", "[3,0]", "[0,0]"),
            ),
            bytes(range(9)),
        ),
        ACCEPTED,
    ),
    "names against order": (raw(tensors(("z", "U8", "[1]", "[0,1]"), ("a", "U8", "[1]", "[1,2]")), b"12"), ACCEPTED),
    "unaligned numbers": (raw(tensors(("a", "U8", "[1]", "[0,1]"), ("b", "F64", "[1]", "[1,9]")), bytes(9)), ACCEPTED),
    "NaN and infinities": (raw(one(shape="[2]", offsets="[0,8]"), b"\0\0\xc0\x7f\0\0\x80\xff"), ACCEPTED),
    "leading page": (raw(b" " * 4096 + one().encode(), FLOAT), ACCEPTED),
    "all white space": (raw(" \t\r\n" + one() + "\n\r\t ", FLOAT), ACCEPTED),
    "keys in another order": (raw('{"a":{"data_offsets":[0,4],"shape":[1],"dtype":"F32"}}', FLOAT), ACCEPTED),
    "escaped keys": (raw('{"\\u0061":{"d\\u0074ype":"F\\u00332","shape":[1],"data_offsets":[0,4]}}', FLOAT), ACCEPTED),
    "metadata": (raw(meta('{"format":"pt","":"","k":"\\u0000\\n"}')), ACCEPTED),
    "metadata last": (raw(one()[:-1] + ',"__metadata__":{}}', FLOAT), ACCEPTED),
    "metadata that looks like Python": (raw(meta('{"a":"__import__(\'os\').system(\'true\')"}')), ACCEPTED),
    "a path as name": (raw(one(name="/etc/passwd"), FLOAT), ACCEPTED),
    "an astral name": (raw(one(name="\N{GRINNING FACE}"), FLOAT), ACCEPTED),
    "an escaped astral name": (raw(one(name="\\ud83d\\ude00"), FLOAT), ACCEPTED),
    "a name of 512 bytes": (raw(one(name="é" * 256), FLOAT), ACCEPTED),
    "metadata of 8 MiB": (raw(meta('{"a":"' + "x" * (CAP - 25) + '"}')), ACCEPTED),
    # The frame.
    "empty file": (b"", "the file must have at least 8 bytes, got 0"),
    "one byte": (b"{", "the file must have at least 8 bytes, got 1"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "the file must have at least 8 bytes, got 7"),
    "a length alone": (b"\2\0\0\0\0\0\0\0", "header must end within the file's 8 bytes, got 2"),
    "length 0": (bytes(8), "header must have 2 to 8388608 bytes, got 0"),
    "length 0 and tensors": (bytes(800), "header must have 2 to 8388608 bytes, got 0"),
    "length 1": (raw("{}", length=1), "header must have 2 to 8388608 bytes, got 1"),
    "length over the file": (raw("{}", length=3), "header must end within the file's 10 bytes, got 3"),
    "length at the cap, file short": (raw("{}", length=CAP), "header must end within the file's 10 bytes, got 8388608"),
    "length over the cap": (raw("{}", length=CAP + 1), "header must have 2 to 8388608 bytes, got 8388609"),
    "length 2^63": (raw("{}", length=2**63), "header must have 2 to 8388608 bytes, got 9223372036854775808"),
    "length 2^64 - 1": (b"\xff" * 8 + b"{}", "header must have 2 to 8388608 bytes, got 18446744073709551615"),
    "length 2^64 - 8, which wraps": (raw("{}", length=2**64 - 8), "header must have 2 to 8388608 bytes"),
    "length big-endian": (b"\0\0\0\0\0\0\0\2{}", "header must have 2 to 8388608 bytes, got 144115188075855872"),
    "length that cuts the JSON": (raw(one(), FLOAT, length=30), "the text must be JSON, got "),
    "length that takes in tensors": (raw("{}", b"}", length=3), "the text must be JSON, got Extra data"),
    "pickle": (b"\x80\2}q\0(X\1\0\0\0aK\1u.", "the file must be safetensors, got a pickle, zip or NumPy file"),
    "pickle that runs code": (
        b"\x80\4\x95\x1d\0\0\0\0\0\0\0\x8c\5posix\x8c\6system\x93\x8c\4true\x85R.", "a pickle, zip or NumPy file"
    ),
    "pickle of four bytes": (b"\x80\4N.", "the file must be safetensors, got a pickle, zip or NumPy file"),
    "pickle as text": (b"cposix\nsystem\n(S'true'\ntR.", "header must have 2 to 8388608 bytes"),
    "zip of torch.save": (b"PK\3\4\0\0\x08\x08\0\0\0\0\0\0", "a pickle, zip or NumPy file, which is never opened"),
    "NumPy file": (b"\x93NUMPY\1\0v\0{'descr': '<f4'}", "a pickle, zip or NumPy file, which is never opened"),
    "GGUF": (b"GGUF\3\0\0\0\0\0\0\0", "header must have 2 to 8388608 bytes"),
    "YAML": (raw("a: !!python/object/apply:os.system ['true']"), "the text must be JSON, got Expecting value"),
    # The text.
    "byte-order mark": (raw(b"\xef\xbb\xbf{}"), "JSON must not begin with a byte-order mark"),
    "UTF-16": (raw("{}".encode("utf-16")), "JSON must not contain NUL, got one at byte 3"),
    "Latin-1": (raw(one(name="\xe9").encode("latin-1"), FLOAT), "JSON must be UTF-8, got .* byte 0xe9"),
    "overlong UTF-8": (raw(b'{"\xc0\xae":1}'), "JSON must be UTF-8, got .* byte 0xc0"),
    "surrogate in UTF-8": (raw(b'{"\xed\xa0\x80":1}'), "JSON must be UTF-8, got .* byte 0xed"),
    "beyond Unicode": (raw(b'{"\xf4\x90\x80\x80":1}'), "JSON must be UTF-8, got .* byte 0xf4"),
    "cut character": (raw(b'{"\xf0\x9f'), "JSON must be UTF-8, got .* unexpected end of data"),
    "half a pair": (raw(one(name="\\ud83d"), FLOAT), "strings must be text, got half of a surrogate pair"),
    "half a pair in metadata": (raw(meta('{"a":"\\ude00"}')), "strings must be text, got half of a surrogate pair"),
    "padded with NUL": (raw("{}" + "\0" * 6), "JSON must not contain NUL, got one at byte 2"),
    "tab in a name": (raw(one(name="\t"), FLOAT), "the text must be JSON, got Invalid control character"),
    "bad escape": (raw(one(name="\\x41"), FLOAT), "the text must be JSON, got Invalid"),
    "comment": (raw("/**/{}"), "the text must be JSON, got Expecting value"),
    "single quotes": (raw("{'a':1}"), "the text must be JSON, got Expecting property name"),
    "comma at the end": (raw(one()[:-1] + ",}", FLOAT), "the text must be JSON, got "),
    "two objects": (raw("{}{}"), "the text must be JSON, got Extra data"),
    "spaces alone": (raw(" " * 100), "the text must be JSON, got Expecting value"),
    "no-break space": (raw("\xa0{}"), "the text must be JSON, got Expecting value"),
    "list": (raw("[]"), "header must be an object, got list"),
    "string": (raw('"{}"'), "header must be an object, got str"),
    "null": (raw("null"), "header must be an object, got NoneType"),
    "number": (raw("10"), "header must be an object, got int"),
    "five levels": (raw('{"a":{"shape":[[[1]]]}}'), "JSON must have at most 4 levels, got more"),
    "tensor twice": (raw(one()[:-1] + "," + one()[1:], FLOAT), "a key must not be repeated, got 'a' twice"),
    "tensor twice, once escaped": (
        raw(one()[:-1] + "," + one(name="\\u0061")[1:], FLOAT), "a key must not be repeated, got 'a' twice"
    ),
    "dtype twice": (raw(one(more=',"dtype":"I32"'), FLOAT), "a key must not be repeated, got 'dtype' twice"),
    "metadata twice": (raw(meta('{},"__metadata__":{}')), "a key must not be repeated, got '__metadata__' twice"),
    "metadata key twice": (raw(meta('{"a":"1","a":"2"}')), "a key must not be repeated, got 'a' twice"),
    "NaN": (raw(one(shape="[NaN]"), FLOAT), "numbers must be finite, got NaN"),
    "minus infinity": (raw(one(shape="[-Infinity]"), FLOAT), "numbers must be finite, got -Infinity"),
    "1e999": (raw(one(shape="[1e999]"), FLOAT), "numbers must be finite, got 1e999"),
    "4,000 digits": (raw(one(shape="[" + "1" * 4000 + "]"), FLOAT), "integers must fit 64 bits, got 1{40}$"),
    "2^63": (raw(one(shape="[9223372036854775808]"), FLOAT), "integers must fit 64 bits, got 9223372036854775808"),
    "2^64": (raw(one(offsets="[0,18446744073709551616]"), FLOAT), "must fit 64 bits, got 18446744073709551616$"),
    # What it says.
    "metadata list": (raw(meta("[]")), "__metadata__ must be an object of strings"),
    "metadata null": (raw(meta("null")), "__metadata__ must be an object of strings"),
    "metadata of numbers": (raw(meta('{"a":1}')), "__metadata__ must be an object of strings"),
    "metadata of objects": (raw(meta('{"a":{}}')), "__metadata__ must be an object of strings"),
    "tensor called metadata": (raw(one(name="__metadata__"), FLOAT), "__metadata__ must be an object of strings"),
    "empty name": (raw(one(name=""), FLOAT), "a tensor's name must have 1 to 512 bytes, got ''"),
    "a name of 513 bytes": (raw(one(name="n" * 513), FLOAT), "a tensor's name must have 1 to 512 bytes"),
    "few characters, many bytes": (raw(one(name="é" * 257), FLOAT), "a tensor's name must have 1 to 512 bytes"),
    "NUL in a name": (raw(one(name="a\\u0000b"), FLOAT), "a tensor's name must have no control characters"),
    "escape code in a name": (raw(one(name="\\u001b[2J"), FLOAT), "a tensor's name must have no control characters"),
    "C1 control in a name": (raw(one(name="\x9b2J"), FLOAT), "a tensor's name must have no control characters"),
    "parent directory": (raw(one(name="../../etc/passwd"), FLOAT), "a tensor's name must not contain '..'"),
    "parent in the middle": (raw(one(name="a/..\\\\b"), FLOAT), "a tensor's name must not contain '..'"),
    "entry null": (raw('{"a":null}'), "'a' must have the keys dtype, shape and data_offsets, got NoneType"),
    "entry list": (raw('{"a":["F32",[1],[0,4]]}', FLOAT), "'a' must have the keys dtype, shape and data_offsets"),
    "entry empty": (raw('{"a":{}}'), "'a' must have the keys dtype, shape and data_offsets"),
    "no offsets": (raw('{"a":{"dtype":"U8","shape":[0]}}'), "'a' must have the keys dtype, shape and data_offsets"),
    "more keys": (raw(one(more=',"offset":0'), FLOAT), "'a' must have the keys dtype, shape and data_offsets"),
    "old spelling": (raw('{"a":{"dtype":"U8","shape":[0],"offsets":[0,0]}}'), "'a' must have the keys dtype"),
    "unknown dtype": (raw(one('"Q4"'), FLOAT), "'a' dtype must be one of F64, .*, BOOL, got 'Q4'"),
    "dtype in small letters": (raw(one('"f32"'), FLOAT), "'a' dtype must be one of"),
    "dtype of objects": (raw(one('"O"'), FLOAT), "'a' dtype must be one of"),
    "dtype number": (raw(one("32"), FLOAT), "'a' dtype must be one of .*, got 32"),
    "dtype null": (raw(one("null"), FLOAT), "'a' dtype must be one of .*, got None"),
    "shape number": (raw(one(shape="1"), FLOAT), "'a' shape must be at most 8 integers >= 0, got 1"),
    "shape text": (raw(one(shape='"1"'), FLOAT), "'a' shape must be at most 8 integers >= 0, got '1'"),
    "shape null": (raw(one(shape="null"), FLOAT), "'a' shape must be at most 8 integers >= 0, got None"),
    "shape -0": (raw(one('"U8"', "[-0]", "[0,0]")), "zero must have no sign, got -0"),
    "offset -0": (raw(one(offsets="[-0,4]"), FLOAT), "zero must have no sign, got -0"),
    "shape -0.0": (raw(one('"U8"', "[-0.0]", "[0,0]")), r"'a' shape must be at most 8 integers >= 0, got \[-0.0\]"),
    "shape of a float": (raw(one(shape="[1.0]"), FLOAT), r"'a' shape must be at most 8 integers >= 0, got \[1.0\]"),
    "shape 1e0": (raw(one(shape="[1e0]"), FLOAT), "'a' shape must be at most 8 integers >= 0"),
    "shape of true": (raw(one(shape="[true]"), FLOAT), r"'a' shape must be at most 8 integers >= 0, got \[True\]"),
    "shape nested": (raw(one(shape="[[1]]"), FLOAT), r"'a' shape must be at most 8 integers >= 0, got \[\[1\]\]"),
    "shape below zero": (raw(one(shape="[-1]"), FLOAT), "'a' shape must be at most 8 integers >= 0"),
    "two below zero": (raw(one(shape="[-1,-1]"), FLOAT), "'a' shape must be at most 8 integers >= 0"),
    "nine dimensions": (raw(one(shape="[1,1,1,1,1,1,1,1,1]"), FLOAT), "'a' shape must be at most 8 integers >= 0"),
    "size that wraps to 4": (
        raw(one('"U8"', "[4294967296,4294967296,1]"), FLOAT), r"'a' shape must span less than 2\^63 bytes"
    ),
    "bytes that wrap to 4": (raw(one(shape="[4611686018427387905]"), FLOAT), r"'a' shape must span less than 2\^63"),
    "size that wraps, beside zero": (
        raw(one(shape="[9223372036854775807,9223372036854775807,0]", offsets="[0,0]")),
        r"'a' shape must span less than 2\^63 bytes",
    ),
    "zero first, then too large": (
        raw(one(shape="[0,9223372036854775807]", offsets="[0,0]")), r"'a' shape must span less than 2\^63 bytes"
    ),
    "eight of 2^63 - 1": (raw(one(shape=f"[{','.join([str(2**63 - 1)] * 8)}]"), FLOAT), r"must span less than 2\^63"),
    "offsets of floats": (raw(one(offsets="[0.0,4.0]"), FLOAT), "'a' data_offsets must be two integers >= 0"),
    "offsets of false": (raw(one(offsets="[false,4]"), FLOAT), "'a' data_offsets must be two integers >= 0"),
    "offsets below zero": (raw(one(offsets="[-4,0]"), FLOAT), "'a' data_offsets must be two integers >= 0"),
    "one offset": (raw(one(offsets="[4]"), FLOAT), "'a' data_offsets must be two integers >= 0"),
    "three offsets": (raw(one(offsets="[0,4,4]"), FLOAT), "'a' data_offsets must be two integers >= 0"),
    "offsets reversed": (raw(one(offsets="[4,0]"), FLOAT), "'a' data_offsets must span the 4 bytes of F32"),
    "fewer bytes than the shape": (raw(one(shape="[2]"), FLOAT), "'a' data_offsets must span the 8 bytes of F32"),
    "more bytes than the shape": (raw(one(shape="[0]"), FLOAT), "'a' data_offsets must span the 0 bytes of F32"),
    "offsets far outside": (
        raw(one(offsets="[9223372036854775803,9223372036854775807]"), FLOAT), "must begin where the one before ends, 0"
    ),
    "hole at the start": (raw(one(offsets="[4,8]"), bytes(8)), "'a' data_offsets must begin where .* ends, 0, got 4"),
    "hole between": (
        raw(tensors(("a", "U8", "[1]", "[0,1]"), ("b", "U8", "[1]", "[2,3]")), bytes(3)),
        "'b' data_offsets must begin where the one before ends, 1, got 2",
    ),
    "overlap": (
        raw(tensors(("a", "U8", "[2]", "[0,2]"), ("b", "U8", "[2]", "[1,3]")), bytes(3)),
        "'b' data_offsets must begin where the one before ends, 2, got 1",
    ),
    "two names for the same bytes": (
        raw(tensors(("a", "F32", "[1]", "[0,4]"), ("b", "F32", "[1]", "[0,4]")), FLOAT),
        "'b' data_offsets must begin where the one before ends, 4, got 0",
    ),
    "empty tensor inside another": (
        raw(tensors(("a", "U8", "[4]", "[0,4]"), ("b", "U8", "[0]", "[2,2]")), FLOAT),
        "'b' data_offsets must begin where the one before ends, 4, got 2",
    ),
    "empty tensor after the end": (
        raw(one(shape="[0]", offsets="[4,4]"), FLOAT), "'a' data_offsets must begin where the one before ends, 0, got 4"
    ),
    "bytes at the end": (raw(one(), FLOAT + b"!"), r"header and tensors must fill the file's 67 bytes, got 62 \+ 4"),
    "bytes and no tensors": (raw("{}", b"payload"), r"header and tensors must fill the file's 17 bytes, got 10 \+ 0"),
    "cut by one byte": (raw(one(), bytes(3)), r"header and tensors must fill the file's 65 bytes, got 62 \+ 4"),
    "no tensors' bytes at all": (raw(one()), r"header and tensors must fill the file's 62 bytes, got 62 \+ 4"),
    "a second file behind": (raw("{}", raw("{}")), "header and tensors must fill the file's 20 bytes"),
}  # fmt: skip

# Small files that a careless reader would spend gigabytes or minutes on, made when they are needed.
BOMBS: dict[str, tuple[Callable[[], str], str | None]] = {
    "100,000 lists deep": (lambda: "[" * 100_000, "JSON must have at most 4 levels, got many more"),
    "100,000 objects deep": (lambda: '{"a":' * 100_000, "JSON must have at most 4 levels, got many more"),
    "8 MiB of lists, deep": (lambda: "[" * CAP, MORE),
    "closed, 200 deep": (lambda: '{"a":' + "[" * 200 + "]" * 200 + "}", "JSON must have at most 4 levels, got more"),
    "empty objects": (lambda: repeated("{}", '{"a":[', "]}"), MORE),
    "empty lists": (lambda: repeated("[]", '{"a":[', "]}"), MORE),
    "empty strings": (lambda: repeated('""', '{"a":[', "]}"), MORE),
    "small integers": (lambda: repeated("1", '{"a":[', "]}"), MORE),
    "integers": (lambda: repeated("999", '{"a":[', "]}"), MORE),
    "half of it integers": (lambda: repeated("999", '{"a":[', "]}", CAP // 2), "'a' must have the keys .*, got list"),
    "a shape of a million": (lambda: one(shape=repeated("999", "[", "]", 4 * MIB)), "'a' shape must be at most 8 int"),
    "floats": (lambda: repeated("1.5", '{"a":[', "]}", CAP // 2), "'a' must have the keys .*, got list"),
    "8 MiB of digits": (lambda: one(shape="[" + "1" * (CAP - 60) + "]"), "integers must fit 64 bits, got 1{40}$"),
    "8 MiB of digits below zero": (lambda: one(shape="[-" + "1" * (CAP - 60) + "]"), "integers must fit 64 bits"),
    "integers of 4,000 digits": (lambda: repeated("1" * 4000, "[", "]"), "integers must fit 64 bits, got 1{40}$"),
    "integers of 20 digits": (lambda: repeated("9" * 20, "[", "]", CAP // 2), "integers must fit 64 bits, got 9{20}$"),
    "a fraction of 8 MiB": (lambda: one(shape="[0." + "1" * (CAP - 60) + "]"), r"shape must be .*, got \[0.1111"),
    "an exponent of 8 MiB": (lambda: one(shape="[1e" + "1" * (CAP - 60) + "]"), "numbers must be finite, got 1e1111"),
    "many keys": (lambda: numbered('"%":0', "{", "}"), MORE),
    "as many keys as pass": (lambda: numbered('"%":0', "{", "}", 2 * MIB), "'00000000' must have the keys .*, got int"),
    "much metadata": (lambda: meta(numbered('"%":"x"', "{", "}", 4 * MIB)), MORE),
    "as much metadata as passes": (lambda: meta(numbered('"%":"x"', "{", "}", 2 * MIB)), ACCEPTED),
    "the same key a million times": (lambda: repeated('"a":0', "{", "}"), MORE),
    "the same key 100,000 times": (lambda: repeated('"a":0', "{", "}", 600_000), "must not be repeated, got 'a' twice"),
    "many empty tensors": (lambda: numbered(one('"U8"', "[0]", "[0,0]", "%")[1:-1], "{", "}"), MORE),
    "20,000 empty tensors": (lambda: numbered(one('"U8"', "[0]", "[0,0]", "%")[1:-1], "{", "}", 10**6), ACCEPTED),
    "a long name": (lambda: one(name="n" * (CAP - 60)), "a tensor's name must have 1 to 512 bytes, got 'n{80}'$"),
    "a wide name": (lambda: one(name="\N{GRINNING FACE}" + "n" * (CAP - 64)), MORE),
    "a wide name that passes": (lambda: one(name="\N{GRINNING FACE}" + "n" * (6 * MIB)), "a tensor's name must have 1"),
    "a long name, its last character wide": (
        lambda: one(name="n" * (CAP - 99) + "\\ud83d\\ude00"), "a tensor's name must have 1 to 512 bytes"
    ),
    "a long dtype": (lambda: one('"' + "\N{GRINNING FACE}" * (MIB + MIB // 4) + '"'), "'a' dtype must be one of"),
    "a long text of half pairs": (lambda: meta('{"a":"' + "\\ud800" * 10**6 + '"}'), "got half of a surrogate pair"),
    "a long text of escapes": (lambda: meta('{"a":"' + "\\n" * (4 * MIB - 30) + '"}'), ACCEPTED),
    "8 MiB of quotes": (lambda: '"' * CAP, MORE),
    "8 MiB of escaped quotes": (lambda: meta('{"a":"' + '\\"' * (4 * MIB - 30) + '"}'), MORE),
    "8 MiB of spaces": (lambda: " " * CAP, "the text must be JSON, got Expecting value"),
    "8 MiB of newlines": (lambda: "\n" * (CAP - 1) + "[", "the text must be JSON, got Expecting value"),
    "an open string": (lambda: '{"' + "a" * (CAP - 2), "the text must be JSON, got Unterminated string"),
}  # fmt: skip
ALL = {name: lambda file=file: file for name, (file, _) in FILES.items()}
ALL |= {name: lambda make=make: raw(make()) for name, (make, _) in BOMBS.items()}
VERDICTS = {name: verdict for name, (_, verdict) in (FILES | BOMBS).items()}


def test_there_are_enough_cases_of_both_verdicts() -> None:
    assert len(VERDICTS) == len(FILES) + len(BOMBS) >= 60
    assert sum(verdict is ACCEPTED for verdict in VERDICTS.values()) >= 20


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict_is_fixed(case: str, tmp_path: Path) -> None:
    file, verdict = ALL[case](), VERDICTS[case]
    path = tmp_path / "file"
    path.write_bytes(file)
    descriptors = open_descriptors()
    with memory_peak() as peak:
        if verdict is not ACCEPTED:
            with pytest.raises(FormatError, match=verdict) as caught:
                TensorFile(path)
            assert len(str(caught.value)) < len(str(path)) + 300
        else:
            with TensorFile(path) as opened:
                found = {
                    name: (t.dtype, list(t.shape), opened.read(name).tobytes()) for name, t in opened.tensors.items()
                }
    assert peak.bytes <= 64 * MIB + 2 * len(file)
    assert open_descriptors() == descriptors
    assert path.read_bytes() == file
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    if verdict is ACCEPTED:
        library = {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in safetensors.deserialize(file)}
        assert found == library


MEASURE = """
import sys
from cylora.errors import FormatError
from cylora.formats.container import TensorFile

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
try:
    TensorFile(sys.argv[1]).close()
except FormatError:
    pass
print(peak() - before)
"""


@pytest.mark.parametrize("case", BOMBS)
def test_process_stays_within_the_memory_too(case: str, tmp_path: Path) -> None:
    """Also what the allocators keep, and what no tracing sees."""
    path = tmp_path / "file"
    path.write_bytes(ALL[case]())
    result = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    assert int(result.stdout) * 1024 <= 64 * MIB + 2 * path.stat().st_size
