"""Safetensors files put together by hand, from header text and bytes: nothing here knows the code under test."""

import os
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

MIB = 2**20


def raw(header: str | bytes, payload: bytes = b"", length: int | None = None) -> bytes:
    """Return a file's bytes; ``length`` if the first 8 bytes are to say another length than the header's."""
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + payload


def one(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0,4]", name: str = "a", more: str = "") -> str:
    """Return the header of one tensor, each part of it as JSON text."""
    return f'{{"{name}":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}}}'


def open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


class Peak:
    bytes: int


@contextmanager
def memory_peak() -> Iterator[Peak]:
    """Measure the most memory that the part took beyond what was there before."""
    peak = Peak()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield peak
        peak.bytes = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
