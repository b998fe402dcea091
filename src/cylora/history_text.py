"""Read back, row by row, the text that a TrainingHistory wrote: JSON Lines or CSV."""

import csv
import json
from collections.abc import Iterable, Iterator
from typing import Any

from cylora.errors import FormatError

__all__ = ["COLUMNS", "read_rows"]

COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "perplexity", "skipped")


def read_rows(stream: Iterable[str], form: str) -> Iterator[tuple[str, tuple[int, float, float, float, bool]]]:
    """Yield what `TrainingHistory.write_jsonl` or `write_csv` wrote: place, and step, the three numbers, skipped.

    Parameters
    ----------
    stream : lines of text.
    form : "jsonl" or "csv".

    Raises
    ------
    FormatError   If a row is wrong; the message names its line. Which steps follow which is not looked at.
    """
    for place, row in (_jsonl_rows if form == "jsonl" else _csv_rows)(stream):
        if set(row) != set(COLUMNS):
            raise FormatError(f"{place} must have the keys {', '.join(COLUMNS)}, got {', '.join(map(str, row))}")
        step, skipped = _parse(place, "step", row["step"], int), _parse(place, "skipped", row["skipped"], int)
        if skipped not in (0, 1):
            raise FormatError(f"{place}: skipped must be true or false, got {row['skipped']!r}")
        loss, rate, norm, _ = (_parse(place, name, row[name], float) for name in COLUMNS[1:5])
        yield place, (step, loss, rate, norm, bool(skipped))


def _jsonl_rows(stream: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(stream):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise FormatError(f"line {number} must be a JSON object, got {line[:40]!r} ({error})") from None
            if not isinstance(row, dict):
                raise FormatError(f"line {number} must be a JSON object, got {line[:40]!r}")
            yield f"line {number}", row


def _csv_rows(stream: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = csv.DictReader(line for _, line in _lines(stream))
    try:
        if tuple(rows.fieldnames or ()) != COLUMNS:
            raise FormatError(f"line 1 must be the header {','.join(COLUMNS)}, got {rows.fieldnames!r}")
        for row in rows:
            yield f"line {rows.line_num}", row
    except csv.Error as error:
        raise FormatError(f"line {max(rows.reader.line_num, 1)} must be CSV ({error})") from None


def _lines(stream: Iterable[str]) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(stream, 1):
            yield number, line
    except UnicodeDecodeError as error:
        raise FormatError(f"line {number + 1} or one soon after must be text ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key is repeated")
    return row


def _parse(place: str, name: str, value: Any, kind: type[int] | type[float]) -> Any:
    try:
        if (kind is int and isinstance(value, float)) or (name != "skipped" and isinstance(value, bool)):
            raise TypeError
        if isinstance(value, str) and "_" in value:  # float("1_0") is 10
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        what = "an integer" if kind is int else "a number"
        raise FormatError(f"{place}: {name} must be {what}, got {value!r}") from None
