"""A checkpoint of 30 M parameters: how long saving and loading take, beside what no implementation could do without.

Saving has to write the bytes, sync them, and take their sha256; loading has to read them and take their sha256. Both
are timed on the very same bytes, by turns with the checkpoint, and a ratio is the median over the turns. Read back, the
files come from the page cache, for both sides alike. What loading adds in memory is the state itself.

``python bench/files.py [--quick] [--json FILE] [--folder FOLDER]``
"""

import argparse
import gc
import hashlib
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cylora import AdapterSet, Gradients, LoraConfig, LoraTrainer, LoraTrainingConfig
from cylora.formats.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

TARGET = 1.5
PIECE = 2**20
PARAMETERS, QUICK_PARAMETERS = 30 * 10**6, 3 * 10**6
TURNS, QUICK_TURNS = 7, 3


def training(parameters: int) -> tuple[LoraTrainer, AdapterSet]:
    """Return a training of about so many parameters with both moments, after one step."""
    width = parameters // 3 // 32
    shapes = {f"layers.{i}.q_proj": (width, width) for i in range(3)}
    adapters = AdapterSet(shapes, LoraConfig(rank=16), seed=0)
    gradients = Gradients(adapters)
    gradients.vector[...] = np.random.default_rng(1).standard_normal(gradients.vector.size, dtype=np.float32)
    trainer = LoraTrainer(LoraTrainingConfig(warmup_steps=0, log_every=0))
    trainer.step(1.0, adapters, gradients)
    return trainer, adapters


def write(path: Path, content: bytes) -> None:
    """Write beside the target, sync, rename, and sync the folder; take the sha256 too."""
    hashlib.sha256(content).digest()
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb", buffering=0) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(folder)
    os.close(folder)


def read(path: Path) -> np.ndarray:
    """Read into new memory and take the sha256, a piece at a time while it is in the cache."""
    content = np.empty(path.stat().st_size, np.uint8)  # not filled first
    view, running = content.data, hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while view:
            count = file.readinto(view[:PIECE])
            running.update(view[:count])
            view = view[count:]
    running.digest()
    return content


def kilobytes(field: str) -> int:
    """Return a figure of this process, as Linux counts it; 0 elsewhere."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) if found else 0


def growth_mib(call: Callable[[], object]) -> float:
    """Return how much more memory than before was in use at the peak of a call."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        return float("nan")
    before = kilobytes("VmRSS")
    call()
    return max(0, kilobytes("VmHWM") - before) / 1024


def seconds(call: Callable[[], object]) -> float:
    gc.collect()
    started = time.perf_counter()
    result = call()
    passed = time.perf_counter() - started
    del result
    return passed


def is_same(loaded: Checkpoint, trainer: LoraTrainer, adapters: AdapterSet) -> bool:
    """Return whether parameters, moments and history came back to the bit."""
    states = (loaded.trainer.state_dict(), trainer.state_dict())
    moments = all(states[0]["adam"][name].tobytes() == states[1]["adam"][name].tobytes() for name in "mv")
    same = loaded.adapters.flat.vector.tobytes() == adapters.flat.vector.tobytes()
    return same and moments and loaded.trainer.training_history == trainer.training_history


def measured(parameters: int, turns: int, folder: Path) -> dict[str, object]:
    """Return the figures; the sides take turns, and which goes first changes."""
    trainer, adapters = training(parameters)
    ours, plain = folder / "checkpoint.safetensors", folder / "plain"
    sides: dict[str, Callable[[], object]] = {
        "save": lambda: save_checkpoint(trainer, adapters, ours),
        "write": lambda: write(plain, content),
        "load": lambda: load_checkpoint(ours),
        "read": lambda: read(plain),
    }
    sides["save"]()
    content = ours.read_bytes()
    sides["write"]()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        for pair in (("save", "write"), ("load", "read")):
            for name in pair[:: 1 if turn % 2 else -1]:
                times[name].append(seconds(sides[name]))
    saving = growth_mib(sides["save"])
    correct = is_same(load_checkpoint(ours), trainer, adapters)
    loading = growth_mib(sides["load"])
    return {
        "parameters": adapters.param_count(),
        "file_mib": len(content) / 2**20,
        "turns": turns,
        "correct": correct,
        **{f"{name}_seconds": statistics.median(values) for name, values in times.items()},
        "save_ratio": statistics.median(a / b for a, b in zip(times["save"], times["write"], strict=True)),
        "load_ratio": statistics.median(a / b for a, b in zip(times["load"], times["read"], strict=True)),
        "save_adds_mib": saving,
        "load_adds_mib": loading,
        "target_ratio": TARGET,
    }


def main() -> int:
    """Measure, print a table, and say in the exit code whether the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the parameters and few turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the files lie meanwhile (default: here)")
    options = parser.parse_args()
    size, turns = (QUICK_PARAMETERS, QUICK_TURNS) if options.quick else (PARAMETERS, TURNS)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measured(size, turns, Path(folder))
    print(f"{found['parameters']:,} parameters, {found['file_mib']:.0f} MiB, median of {turns} turns")
    print(f"{'':6}{'cylora s':>10}{'plain s':>10}{'ratio':>8}{'MiB more':>10}")
    for ours, theirs in (("save", "write"), ("load", "read")):
        figures = (found[f"{ours}_seconds"], found[f"{theirs}_seconds"], found[f"{ours}_ratio"])
        print(f"{ours:6}{figures[0]:10.3f}{figures[1]:10.3f}{figures[2]:8.2f}{found[f'{ours}_adds_mib']:10.1f}")
    meets = found["save_ratio"] <= TARGET and found["load_ratio"] <= TARGET
    print(f"same bits after loading: {found['correct']}; both ratios at most {TARGET}: {meets}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if found["correct"] and meets else 1


if __name__ == "__main__":
    raise SystemExit(main())
