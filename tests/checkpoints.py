"""Checkpoints taken apart and put together again by hand, with a hash that is right, and a training that fills them."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from training import fill, make_pair

from cylora import AdapterSet, Gradients, LoraAdapter, LoraTrainer

TYPES = {"F64": np.float64, "F32": np.float32, "U16": np.uint16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
NAMES = {np.dtype(kind): name for name, kind in TYPES.items()}

Tensors = dict[str, NDArray[Any]]


def taken_apart(path: Path) -> tuple[dict[str, str], Tensors]:
    """Return metadata and tensors (without the hash), in the order of their bytes."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, payload = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        values = np.frombuffer(payload[start:stop], TYPES[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"]).copy()
    del tensors["sha256"]
    return metadata, tensors


def put_together(
    path: Path, metadata: dict[str, str] | str, tensors: Tensors, *, digest: bytes | None = None, space: bytes = b""
) -> Path:
    """Write a file with these parts and the hash of all before it, unless ``tensors`` has one of its own.

    ``metadata`` may be JSON text; ``space`` comes before the header.
    """
    listed = dict(tensors) if "sha256" in tensors else tensors | {"sha256": np.zeros(32, np.uint8)}
    entries, start = {}, 0
    for name, values in listed.items():
        stop = start + values.nbytes
        entries[name] = {"dtype": NAMES[values.dtype], "shape": list(values.shape), "data_offsets": [start, stop]}
        start = stop
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    header = space + f'{{"__metadata__":{text},{json.dumps(entries)[1:]}'.encode()
    raw = len(header).to_bytes(8, "little") + header
    for name, values in listed.items():
        if name == "sha256" and "sha256" not in tensors:
            raw += hashlib.sha256(raw).digest() if digest is None else digest
        else:
            raw += values.tobytes()
    path.write_bytes(raw)
    return path


def do_one(trainer: LoraTrainer, adapters: LoraAdapter | AdapterSet, index: int) -> None:
    """Do action ``index`` of a programme: steps, micro-batches, and where they are skipped, bad gradients."""
    gradients = fill(Gradients(adapters), index)
    if isinstance(adapters, LoraAdapter):
        pair: tuple[Any, ...] = make_pair(index)
    else:
        pair = (gradients,)
    if index % 5 in (2, 3):
        trainer.accumulate(1.0 + index, adapters, *pair, weight=1.0 + index)
    elif index % 5 == 4:
        trainer.step_accumulated(adapters)
    elif trainer.config.nonfinite == "skip" and index % 10 == 6:
        pair[0].vector.fill(math.inf) if isinstance(pair[0], Gradients) else pair[0].fill(math.nan)
        trainer.step(math.nan, adapters, *pair)
    else:
        trainer.step(3.0 - index / 10, adapters, *pair)
