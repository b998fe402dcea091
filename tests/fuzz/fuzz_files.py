"""Coverage-guided fuzzing of the readers: ``python tests/fuzz/fuzz_files.py TARGET -runs=100000``, as libFuzzer does.

Any error but the documented ones, more than a second, or more memory than promised ends it, with the input in
``crash-...`` in the working directory. A target gets a directory it may write to and the fuzzer's bytes.
"""

import hashlib
import os
import random
import resource
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import atheris
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import safetensors
from file_mutations import SEEDS, mutated
from raw_container import raw

with atheris.instrument_imports(include=["cylora.formats", "cylora.tasks.settings", "json"]):
    from cylora import ConfigError, FormatError, StateError
    from cylora.formats import load_checkpoint, load_peft, peft_files, save_checkpoint, strict_json
    from cylora.formats.container import TensorFile
    from cylora.tasks.settings import read_tables, resolve

from training import fill, make_set, make_trainer

from cylora import Gradients

MIB = 2**20
MAX_LENGTH = 4096


def read_container(folder: Path, octets: bytes) -> None:
    path = rewritten(folder, "file.safetensors", octets)
    try:
        with TensorFile(path) as opened:
            found = {name: (t.dtype, list(t.shape), opened.read(name).tobytes()) for name, t in opened.tensors.items()}
    except FormatError:
        return
    library = {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in safetensors.deserialize(octets)}
    assert found == library


def read_json(folder: Path, octets: bytes) -> None:
    try:
        value = strict_json.parse(octets, "text", leading_space=len(octets) % 2 == 0)
    except FormatError:
        return
    text = strict_json.to_text(value)
    assert strict_json.to_text(strict_json.parse(text.encode(), "text")) == text


def read_checkpoint(folder: Path, octets: bytes) -> None:
    """With the hash put right, or nothing behind it would be reached."""
    signed = octets[:-32] + hashlib.sha256(octets[:-32]).digest()
    try:
        saved = load_checkpoint(rewritten(folder, "checkpoint.safetensors", signed))
    except (FormatError, ConfigError, StateError):
        return
    state = saved.trainer.state_dict()
    assert state["history"]["total_steps"] == saved.trainer.total_steps()
    assert np.isfinite(saved.adapters.flat.vector).all()


def read_peft_tensors(folder: Path, octets: bytes) -> None:
    rewritten(folder, "adapter_config.json", PEFT["adapter_config.json"])
    rewritten(folder, "adapter_model.safetensors", octets)
    read_peft(folder)


def read_peft_config(folder: Path, octets: bytes) -> None:
    rewritten(folder, "adapter_config.json", octets)
    rewritten(folder, "adapter_model.safetensors", PEFT["adapter_model.safetensors"])
    read_peft(folder)


def read_peft(folder: Path) -> None:
    try:
        adapters = load_peft(folder)
    except FormatError:
        return
    assert np.isfinite(adapters.flat.vector).all()
    peft_files(adapters)


def read_settings(folder: Path, octets: bytes) -> None:
    path = rewritten(folder, "config.toml", octets)
    try:
        resolve([("", read_tables(path))])
    except (FormatError, ConfigError):
        return


def rewritten(folder: Path, name: str, octets: bytes) -> Path:
    """Return a file with these bytes, written over the last one's."""
    path = folder / name
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(descriptor, octets)
    os.close(descriptor)
    return path


def checkpoint_seeds() -> list[bytes]:
    """Return small checkpoints with everything in them that there may be."""
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        for state_dtype in ("float32", "bfloat16", "8bit"):
            adapters, trainer = make_set(), make_trainer(state_dtype=state_dtype, history_limit=2)
            adapters.origin = {"task_type": "CAUSAL_LM"}
            gradients = fill(Gradients(adapters))
            for _ in range(3):
                trainer.step(1.0, adapters, gradients)
            trainer.accumulate(1.0, adapters, gradients)
            path = Path(folder, state_dtype)
            save_checkpoint(trainer, adapters, path, rng=np.random.default_rng(0), extra={"notes": [1, {"a": None}]})
            seeds.append(path.read_bytes())
    return seeds


def peft_directory() -> dict[str, bytes]:
    files = peft_files(make_set(alpha=3.0, use_rslora=True), portable=False, step=3)
    return {name: b"".join([content] if isinstance(content, bytes) else content) for name, content in files.items()}


PEFT = peft_directory()
SETTINGS = b"""[run]
seed = 3
[training]
learning_rate = 1e-3
schedule = "cosine"
decay_steps = "none"
[lora]
rank = 4
target_modules = ["q_proj", "hidden1"]
"""


class Target(NamedTuple):
    read: Callable[[Path, bytes], None]
    seeds: list[bytes]
    is_framed: bool  # a length and a header of this length come first


TARGETS = {
    "container": Target(read_container, SEEDS, True),
    "json": Target(read_json, [seed[8 : 8 + seed[0]] for seed in SEEDS] + [b'[1,-2.5e3,"a",null,true]'], False),
    "checkpoint": Target(read_checkpoint, checkpoint_seeds(), True),
    "peft": Target(read_peft_tensors, [PEFT["adapter_model.safetensors"]], True),
    "peft config": Target(read_peft_config, [PEFT["adapter_config.json"]], False),
    "settings": Target(read_settings, [SETTINGS], False),
}


def framed_mutation(octets: bytes, max_size: int, seed: int) -> bytes:
    """Change a token of the header, or what libFuzzer likes but with the length put right, or anything."""
    random_ = random.Random(seed)
    choice = random_.random()
    if choice < 0.3:
        return mutated(octets, random_)[:max_size]
    if choice < 0.8 and len(octets) > 8:
        (length,) = struct.unpack("<Q", octets[:8])
        header, payload = octets[8 : 8 + length], octets[8 + length :]
        return raw(atheris.Mutate(header, max(max_size - 8 - len(payload), 1)), payload)[:max_size]
    return atheris.Mutate(octets, max_size)


def main() -> None:
    target = TARGETS[sys.argv[1]]
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    # _exit ends libFuzzer's run, so nothing of Python's own would remove these.
    with tempfile.TemporaryDirectory(dir=shared) as folder, tempfile.TemporaryDirectory(dir=shared) as corpus:
        for number, seed in enumerate(target.seeds):
            Path(corpus, str(number)).write_bytes(seed)
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        limits = [
            "-timeout=1",
            "-mutate_depth=1",
            f"-max_len={MAX_LENGTH}",
            f"-rss_limit_mb={rss + 128}",
            "-print_final_stats=1",
        ]
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
        else:
            arguments = [sys.argv[0], *limits, *sys.argv[2:], corpus]
            mutator = {"custom_mutator": framed_mutation} if target.is_framed else {}
            atheris.Setup(arguments, lambda octets: target.read(Path(folder), octets), **mutator)
            atheris.Fuzz()
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
