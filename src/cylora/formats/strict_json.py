"""JSON from outside, read so that two readers cannot understand it differently; and JSON of ours, written for that.

Refused, beyond what is no JSON at all: a byte-order mark, NUL, bytes that are not UTF-8, a key twice in one object, NaN
and infinities (also numbers like 1e999), integers beyond 64 bits, -0, more than four levels, text that would take much
more memory than the file.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from cylora.errors import FormatError

__all__ = ["MAX_BYTES", "MAX_MEMORY", "memory_needed", "parse", "to_text"]

MAX_BYTES = 8 * 2**20  # some 50,000 tensors
MAX_DEPTH = 4
MAX_INTEGER = 2**63 - 1
MAX_MEMORY = 64 * 2**20
# Bytes of memory that CPython takes at most for what each character may begin: an empty dict; a list with its first
# places and number; a place and a number; half a string; a key's place in three tables (the object, its list of pairs,
# and the scanner's own of all keys), any of which may just be growing.
COSTS = {b"{": 96, b"[": 144, b",": 48, b'"': 36, b":": 200}
SURROGATE = re.compile("[\ud800-\udfff]")


def parse(raw: bytes, place: str, *, leading_space: bool = True, spare: int = 0) -> Any:
    """Return what the JSON text ``raw`` says.

    Parameters
    ----------
    raw : the whole text.
    place : how a message begins: file and part.
    leading_space : whether white space may come first.
    spare : bytes that it may take beyond MAX_MEMORY, at most as many again: a long file may have a long header.

    Raises
    ------
    FormatError   If the text breaks a rule; the message says which.
    """

    def refuse(rule: str, got: str) -> NoReturn:
        raise FormatError(f"{place}: {rule}, got {got}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            refuse("a key must not be repeated", f"{twice[:80]!r} twice")
        return found

    def integer(text: str) -> int:
        if len(text) > 18 and (len(text) > 20 or abs(int(text)) > MAX_INTEGER):  # int() of long text is quadratic
            refuse("integers must fit 64 bits", text[:40])
        if text == "-0":  # an integer here, a floating-point number in the library
            refuse("zero must have no sign", text)
        return int(text)

    def real(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            refuse("numbers must be finite", text[:40])
        return number

    if len(raw) > MAX_BYTES:
        refuse(f"JSON must have at most {MAX_BYTES} bytes", str(len(raw)))
    if raw.startswith(b"\xef\xbb\xbf"):
        refuse("JSON must not begin with a byte-order mark", "one")
    if b"\0" in raw:
        refuse("JSON must not contain NUL", f"one at byte {raw.index(0)}")
    if not leading_space and raw[:1] != b"{":
        refuse("JSON must begin with {", repr(raw[:1]))
    limit = MAX_MEMORY + min(spare, MAX_MEMORY)
    if (needed := memory_needed(raw)) > limit:
        refuse(f"JSON must not need more than {limit} bytes of memory", f"up to {needed}")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        refuse("JSON must be UTF-8", str(error))
    try:
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_int=integer,
            parse_float=real,
            parse_constant=lambda name: refuse("numbers must be finite", name),
        )
    except FormatError:
        raise
    except RecursionError:
        refuse(f"JSON must have at most {MAX_DEPTH} levels", "many more")
    except ValueError as error:
        refuse("the text must be JSON", str(error))
    if _is_deeper(value, MAX_DEPTH):
        refuse(f"JSON must have at most {MAX_DEPTH} levels", "more")
    if "\\u" in text and any(SURROGATE.search(string) for string in _strings(value)):
        refuse("strings must be text", "half of a surrogate pair")
    return value


def memory_needed(raw: bytes) -> int:
    """Return the most bytes that reading ``raw`` can take, besides ``raw``."""
    # One wide character makes all of a string four bytes wide, and a string with escapes grows by quarters, the old one
    # beside the new.
    text = len(raw) if raw.isascii() else 4 * len(raw)
    strings = 25 * len(raw) // 4 if text > len(raw) or b"\\u" in raw else 5 * len(raw) // 4
    return text + strings + sum(raw.count(mark) * cost for mark, cost in COSTS.items())


def to_text(value: Any, *, indent: int | None = None, is_sorted: bool = True) -> str:
    """Return JSON with sorted keys, so that equal values give equal text. ValueError for NaN and infinities.

    Not sorted, keys keep their order, for mappings in which that counts.
    """
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, sort_keys=is_sorted, separators=separators, indent=indent, allow_nan=False)


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    members = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(member, levels - 1) for member in members)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for member in value.values():
            yield from _strings(member)
    elif isinstance(value, list):
        for member in value:
            yield from _strings(member)
