"""strict_json: every rule with its message, what is written reads back, and memory within what it charges."""

import contextlib
import json
import math
import re
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_container import MIB, memory_peak

from cylora.errors import FormatError
from cylora.formats import strict_json
from cylora.formats.strict_json import MAX_BYTES, MAX_MEMORY, memory_needed, parse, to_text

HUGE = 2**63 - 1

ACCEPTED = [
    (b"{}", {}),
    (b" \t\r\n{}\n ", {}),
    (b"[]", []),
    (b'"a"', "a"),
    (b"null", None),
    (b"true", True),
    (b"0", 0),
    (b"-0.5", -0.5),
    (b"9223372036854775807", HUGE),
    (b"-9223372036854775807", -HUGE),
    (b"999999999999999999", 10**18 - 1),
    (b"1.5e-3", 1.5e-3),
    (b"1e308", 1e308),
    (b"1e-999", 0.0),
    (b'{"a":{"b":{"c":{}}}}', {"a": {"b": {"c": {}}}}),
    (b"[[[[1]]]]", [[[[1]]]]),
    (b'{"a":1,"b":{"a":1}}', {"a": 1, "b": {"a": 1}}),
    (b'"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
    ('"é€\N{GRINNING FACE}"'.encode(), "é€\N{GRINNING FACE}"),
    (b'"\\u0000"', "\0"),
    (b'"\\u0041"', "A"),
]


@pytest.mark.parametrize(("raw", "value"), ACCEPTED, ids=[raw.decode(errors="replace") for raw, _ in ACCEPTED])
def test_json_within_the_rules_is_read_as_json_reads_it(raw: bytes, value: Any) -> None:
    assert parse(raw, "file") == value == json.loads(raw)
    assert type(parse(raw, "file")) is type(value)


REFUSED = [
    (b"", "the text must be JSON, got Expecting value: line 1 column 1"),
    (b"{", "the text must be JSON, got Expecting property name"),
    (b"{} {}", "the text must be JSON, got Extra data: line 1 column 4"),
    (b"{'a':1}", "the text must be JSON, got Expecting property name"),
    (b"[1,]", "the text must be JSON, got "),
    (b"01", "the text must be JSON, got Extra data"),
    (b"+1", "the text must be JSON, got Expecting value"),
    (b'"\n"', "the text must be JSON, got Invalid control character"),
    (b'"\\x41"', r"the text must be JSON, got Invalid \\escape"),
    (b"// x\n{}", "the text must be JSON, got Expecting value"),
    (b"\xef\xbb\xbf{}", "JSON must not begin with a byte-order mark, got one"),
    (b"\xff\xfe{\0}\0", "JSON must not contain NUL, got one at byte 3"),
    (b'{"a":1}\0', "JSON must not contain NUL, got one at byte 7"),
    (b'"\xff"', "JSON must be UTF-8, got 'utf-8' codec can't decode byte 0xff in position 1"),
    (b'"\xc0\x80"', "JSON must be UTF-8, got .* byte 0xc0"),
    (b'"\xed\xa0\x80"', "JSON must be UTF-8, got .* byte 0xed"),
    (b'{"a":1,"b":2,"a":1}', "a key must not be repeated, got 'a' twice"),
    (b'{"a":1,"\\u0061":1}', "a key must not be repeated, got 'a' twice"),
    (b'{"":1,"":1}', "a key must not be repeated, got '' twice"),
    (b'[{"x":{"a":1,"a":2}}]', "a key must not be repeated, got 'a' twice"),
    (b'{"%b":1,"%b":1}' % (b"k" * 99, b"k" * 99), f"a key must not be repeated, got '{'k' * 80}' twice"),
    (b"NaN", "numbers must be finite, got NaN"),
    (b"[Infinity]", "numbers must be finite, got Infinity"),
    (b'{"a":-Infinity}', "numbers must be finite, got -Infinity"),
    (b"1e999", "numbers must be finite, got 1e999"),
    (b"-1.5e400", "numbers must be finite, got -1.5e400"),
    (b"9223372036854775808", "integers must fit 64 bits, got 9223372036854775808"),
    (b"-9223372036854775808", "integers must fit 64 bits, got -9223372036854775808"),
    (b"1" * 4000, f"integers must fit 64 bits, got {'1' * 40}$"),
    (b"-" + b"1" * 100_000, f"integers must fit 64 bits, got -{'1' * 39}$"),
    (b"[-0]", "zero must have no sign, got -0"),
    (b"[[[[[]]]]]", "JSON must have at most 4 levels, got more"),
    (b'{"a":[{"b":[{}]}]}', "JSON must have at most 4 levels, got more"),
    (b"[" * 100_000, "JSON must have at most 4 levels, got many more"),
    (b'{"a":' * 100_000, "JSON must have at most 4 levels, got many more"),
    (b'"\\ud800"', "strings must be text, got half of a surrogate pair"),
    (b'{"\\udfff":1}', "strings must be text, got half of a surrogate pair"),
    (b'[[[{"a":["\\u0041"],"b":"\\ude00\\ud83d"}]]]', "JSON must have at most 4 levels, got more"),
    (b'[[{"a":["\\u0041",1],"b":"\\ude00\\ud83d"}]]', "strings must be text, got half of a surrogate pair"),
    (b" " * (MAX_BYTES + 1), f"JSON must have at most {MAX_BYTES} bytes, got {MAX_BYTES + 1}"),
    (b"{}," * 1_000_000, f"JSON must not need more than {MAX_MEMORY} bytes of memory, got up to 15[0-9]{{7}}"),
]


@pytest.mark.parametrize(("raw", "message"), REFUSED, ids=[repr(raw[:40]) for raw, _ in REFUSED])
def test_each_rule_has_its_message(raw: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=f"^file: {message}"):
        parse(raw, "file")


@pytest.mark.parametrize(("raw", "got"), [(b" {}", "b' '"), (b"\n{}", r"b'\\n'"), (b"[]", r"b'\['"), (b"", "b''")])
def test_leading_space_can_be_refused(raw: bytes, got: str) -> None:
    with pytest.raises(FormatError, match=f"^file: JSON must begin with {{, got {got}$"):
        parse(raw, "file", leading_space=False)
    assert parse(b"{} \n", "file", leading_space=False) == {}


def test_leading_space_may_be_a_page() -> None:
    assert parse(b" " * 4096 + b'{"a":1}', "file") == {"a": 1}


def test_largest_text_is_read() -> None:
    assert parse(b"{" + b" " * (MAX_BYTES - 2) + b"}", "file") == {}


def test_spare_memory_lets_a_long_file_have_a_long_header_but_not_without_end() -> None:
    text = b"[" + b"0," * 1_500_000 + b"0]"
    needed = memory_needed(text)
    assert MAX_MEMORY < needed < 2 * MAX_MEMORY
    with pytest.raises(FormatError, match=f"must not need more than {needed - 1} bytes of memory, got up to {needed}$"):
        parse(text, "file", spare=needed - 1 - MAX_MEMORY)
    assert len(parse(text, "file", spare=needed - MAX_MEMORY)) == 1_500_001
    with pytest.raises(FormatError, match=f"must not need more than {2 * MAX_MEMORY} bytes of memory"):
        parse(b"[" + b"[]," * 1_000_000 + b"0]", "file", spare=2**60)


def distinct(unit: str, begin: str, end: str, size: int = MIB // 2) -> bytes:
    """Return one object or list with ``unit`` again and again, a running number in it."""
    members = []
    while size > 0:
        members.append(unit.replace("%", format(len(members), "x")))
        size -= len(members[-1].encode()) + 1
    return (begin + ",".join(members) + end).encode()


COSTLY = {
    "integers": distinct("999", "[", "]"),
    "long integers": distinct(str(HUGE), "[", "]"),
    "floats": distinct("1.5", "[", "]"),
    "empty objects": distinct("{}", "[", "]"),
    "objects": distinct('{"%":999}', "[", "]"),
    "objects with one key": distinct('{"a":999}', "[", "]"),
    "empty lists": distinct("[]", "[", "]"),
    "lists": distinct("[999]", "[", "]"),
    "lists of five": distinct("[999,999,999,999,999]", "[", "]"),
    "strings": distinct('"ab"', "[", "]"),
    "wide strings": distinct('"€%"', "[", "]"),
    "astral strings": distinct('"\N{GRINNING FACE}"', "[", "]"),
    "escaped astral strings": distinct('"\\ud83d\\ude00"', "[", "]"),
    "keys": distinct('"%":0', "{", "}"),
    "keys just after their tables grew": distinct('"%":0', "{", "}", 440_000),
    "keys and integers": distinct('"%":999', "{", "}"),
    "keys and objects": distinct('"%":{}', "{", "}"),
    "keys and lists": distinct('"%":[]', "{", "}"),
    "keys and strings": distinct('"%":"ab"', "{", "}"),
    "astral keys": distinct('"\N{GRINNING FACE}%":0', "{", "}"),
    "deep": distinct("[{},{}]", "[[", "]]"),
    "tensors": distinct('"%":{"dtype":"U8","shape":[0,999],"data_offsets":[999,999]}', "{", "}"),
    "one string": b'"' + b"a" * MIB + b'"',
    "one string, an astral character first": '"\N{GRINNING FACE}'.encode() + b"a" * MIB + b'"',
    "one string, an astral character last": b'"' + b"a" * MIB + '\N{GRINNING FACE}"'.encode(),
    "one string, an escape last": b'"' + b"a" * MIB + b'\\ud83d\\ude00"',
    "one string, escapes everywhere": b'"' + b"\\n" * (MIB // 2) + b'"',
    "one wide string, an escape last": '"é'.encode() + b"a" * MIB + b'\\ud83d\\ude00"',
    "one key, an escape last": b'{"' + b"a" * MIB + b'\\ud83d\\ude00":0}',
    "half a pair in a long string": b'"' + b"a" * MIB + b'\\ud83d"',
    "spaces": b"{" + b" " * MIB + b"}",
    "digits": b"1" * MIB,
    "digits of a fraction": b"0." + b"1" * MIB,
    "nested": b"[" * (MIB // 4),
}


@pytest.mark.parametrize("case", COSTLY)
def test_reading_takes_no_more_memory_than_it_was_charged(case: str) -> None:
    raw = COSTLY[case]
    parse(b"[1.5,{}]", "file")  # whatever the first call of json loads
    with memory_peak() as peak, contextlib.suppress(FormatError):
        parse(raw, "file")
    assert peak.bytes <= memory_needed(raw) + 64 * 1024


def test_a_header_of_thirty_thousand_tensors_is_read_for_what_it_is_charged() -> None:
    name = "base_model.model.model.layers.10.mlp.experts.%.down_proj.lora_A.weight"
    raw = distinct(f'"{name}":{{"dtype":"F32","shape":[8,2048],"data_offsets":[999,65536]}}', "{", "}", 7 * MIB // 2)
    assert memory_needed(raw) <= MAX_MEMORY
    assert len(parse(raw, "file")) > 24_000


# ------------------------------------------------------------------ what is written

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-HUGE, HUGE)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=12,
)


def depth(value: Any) -> int:
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if members is None else 1 + max(map(depth, members), default=0)


@given(VALUES)
def test_what_is_written_reads_back_equal(value: Any) -> None:
    text = to_text(value)
    assert text.isascii()
    if depth(value) > 4:
        with pytest.raises(FormatError, match="at most 4 levels, got more"):
            parse(text.encode(), "file")
        return
    again = parse(text.encode(), "file")
    assert again == value
    assert to_text(again) == text


def test_equal_values_give_equal_text() -> None:
    assert to_text({"b": 1, "a": [1.5, None]}) == to_text({"a": [1.5, None], "b": 1}) == '{"a":[1.5,null],"b":1}'


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_not_written(number: float) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        to_text({"a": number})


def test_reading_leaves_the_limits_of_python_alone() -> None:
    before = sys.getrecursionlimit(), sys.get_int_max_str_digits()
    with pytest.raises(FormatError, match=re.escape("many more")):
        parse(b"[" * 50_000, "file")
    assert (sys.getrecursionlimit(), sys.get_int_max_str_digits()) == before
    assert strict_json.MAX_DEPTH == 4
