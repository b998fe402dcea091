"""What clients may send: ``{"images": [[64 numbers], ...], "labels": [digit, ...]}``, checked to the last number."""

import json
import reprlib
from typing import Any, NoReturn

import numpy as np
from model import DIGITS, MAX_IMAGES, PIXELS, Floats

__all__ = ["MAX_BYTES", "BodyError", "batch_of"]

MAX_BYTES = 64 * 1024  # sixteen images, written with all digits of a double, take 22 KB


class BodyError(ValueError):
    """The request's body breaks a rule, which the message names."""


def batch_of(body: bytes, *, with_labels: bool) -> tuple[Floats, list[int]]:
    """Return 1 to 16 images, float32 (n, 64), and their labels, if asked for; BodyError says what is wrong."""
    content = _object(body)
    expected = ["images", "labels"] if with_labels else ["images"]
    if sorted(content) != expected:
        got = ", ".join(map(reprlib.repr, sorted(content))) or "none"
        raise BodyError(f"the body must have the keys {', '.join(expected)}, got {got}")
    images = content["images"]
    if not isinstance(images, list) or not 1 <= len(images) <= MAX_IMAGES:
        raise BodyError(f"images must be a list of 1 to {MAX_IMAGES} images, got {_length(images)}")
    for number, image in enumerate(images):
        if not isinstance(image, list) or len(image) != PIXELS:
            raise BodyError(f"images[{number}] must be a list of {PIXELS} numbers, got {_length(image)}")
        for place, ink in enumerate(image):
            if type(ink) not in (int, float) or not 0 <= ink <= 1:
                raise BodyError(f"images[{number}][{place}] must be a number from 0 to 1, got {reprlib.repr(ink)}")
    return np.array(images, np.float32), _labels(content["labels"], len(images)) if with_labels else []


def _labels(labels: Any, count: int) -> list[int]:
    if not isinstance(labels, list) or len(labels) != count:
        raise BodyError(f"labels must be a list of as many digits as there are images, {count}, got {_length(labels)}")
    for number, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < DIGITS:
            raise BodyError(f"labels[{number}] must be an integer from 0 to {DIGITS - 1}, got {reprlib.repr(label)}")
    return labels


def _object(body: bytes) -> dict[str, Any]:
    """Return what the JSON text says. Python's reader also takes NaN, infinities and a key twice; this does not."""

    def refuse(constant: str) -> NoReturn:
        raise BodyError(f"numbers must be finite, got {constant}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise BodyError(f"a key must not be repeated, got {', '.join(reprlib.repr(key) for key, _ in pairs)}")
        return found

    try:
        content = json.loads(body.decode(), parse_constant=refuse, object_pairs_hook=unique)
    except BodyError:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BodyError(f"the body must be JSON in UTF-8, got {error}") from None
    if not isinstance(content, dict):
        raise BodyError(f"the body must be a JSON object, got {reprlib.repr(content)}")
    return content


def _length(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else reprlib.repr(value)
