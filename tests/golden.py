"""Reader of the golden vectors in tests/data/golden: its FORMAT.md turned into code. It never imports cylora."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Case = dict[str, Any]

SPECIAL = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}


def load() -> dict[str, Any]:
    """Return the whole file."""
    text = (Path(__file__).parent / "data" / "golden" / "golden_public.json").read_text(encoding="utf-8")
    return json.loads(text)


def floats(values: list[float | str]) -> Floats:
    """Return a list from the file as the float32 it stands for."""
    return np.array([SPECIAL[v] if isinstance(v, str) else v for v in values], np.float32)


def number(value: float | str) -> float:
    """Return a number from the file, which is a float32, as a Python float."""
    return float(np.float32(SPECIAL[value] if isinstance(value, str) else value))


class Generator:
    """The linear congruential generator that makes most gradients; ``k_sum`` adds up every draw."""

    def __init__(self, seed: int) -> None:
        self.state = seed
        self.k_sum = 0

    def draw(self, count: int, exponent: int | None) -> Floats:
        """Return the next values, k * 2^-exponent; an exponent of None draws too, but makes zeros."""
        values = np.zeros(count, np.float32)
        for i in range(count):
            self.state = (self.state * 1664525 + 1013904223) % 2**32
            k = (self.state >> 16) - 32768
            self.k_sum += k
            if exponent is not None:
                values[i] = np.float32(k * 2.0**-exponent)
        return values


def generated_steps(case: Case, generator: Generator) -> Iterator[tuple[Floats, Floats]]:
    """Yield (grad A, grad B), flat, for each step of a run of kind "lcg"."""
    grads, rank = case["grads"], case["config"]["rank"]
    for t in range(case["num_steps"]):
        exponents_a, exponents_b = grads["exponents_a"], grads["exponents_b"]
        a = generator.draw(rank * case["d_in"], exponents_a[t % len(exponents_a)])
        b = generator.draw(case["d_out"] * rank, exponents_b[t % len(exponents_b)])
        yield a, b


def gradients(case: Case) -> Iterator[tuple[Floats, Floats]]:
    """Yield (grad A, grad B), flat, for each step of any trainer run."""
    grads, rank = case["grads"], case["config"]["rank"]
    if grads["kind"] == "lcg":
        yield from generated_steps(case, Generator(grads["seed"]))
    elif grads["kind"] == "constant":
        for _ in range(case["num_steps"]):
            yield (
                np.full(rank * case["d_in"], number(grads["a"]), np.float32),
                np.full(case["d_out"] * rank, number(grads["b"]), np.float32),
            )
    elif grads["kind"] == "explicit":
        for a, b in zip(grads["a"], grads["b"], strict=True):
            yield floats(a), floats(b)
    else:
        raise ValueError(f"gradients of kind {grads['kind']!r}")


def crc32(values: Floats) -> int:
    """Return the CRC-32 of values as little-endian float32 bytes."""
    return zlib.crc32(values.astype("<f4").tobytes())
