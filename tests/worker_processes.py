"""Children that `multiprocessing` starts go on from their parent's file; tests/test_threads_config.py starts this.

``worker_processes.py METHOD COUNT FOLDER``: the parent steps with threads and saves; a child of its own loads that,
does the next step with threads, saves and exits; the parent does the same step. It prints how many files were equal.
"""

import multiprocessing
import sys
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np

from cylora import AdapterSet, LoraConfig, LoraTrainer, LoraTrainingConfig
from cylora.formats.checkpoint import load_checkpoint, save_checkpoint
from cylora.kernels.threads import configure, started

THREADS = 4
PATIENCE = 120  # seconds; a child that takes longer hangs


def gradient(number: int) -> Any:
    return np.random.default_rng(number).standard_normal(65_536, np.float32)


def step_and_save(trainer: LoraTrainer, adapters: Any, number: int, path: Path) -> None:
    configure("always")
    trainer.step(1.0 / number, adapters, gradient(number))
    assert started() == THREADS - 1
    save_checkpoint(trainer, adapters, path)


def child(source: Path, number: int, target: Path) -> None:
    assert started() == 0
    trainer, adapters, *_ = load_checkpoint(source, threads=THREADS)
    step_and_save(trainer, adapters, number, target)


def run(context: BaseContext, count: int, folder: Path) -> int:
    adapters = AdapterSet({"layer": (4096, 4096)}, LoraConfig(rank=8), seed=0)
    trainer = LoraTrainer(LoraTrainingConfig(warmup_steps=0, log_every=0, threads=THREADS))
    mine, theirs = folder / "parent", folder / "child"
    step_and_save(trainer, adapters, 1, mine)
    equal = 0
    for number in range(2, count + 2):
        process = context.Process(target=child, args=(mine, number, theirs))  # type: ignore[attr-defined]
        process.start()
        process.join(PATIENCE)
        if process.exitcode != 0:
            process.kill()
            raise SystemExit(f"child {number - 1}: exit code {process.exitcode}")
        step_and_save(trainer, adapters, number, mine)
        equal += mine.read_bytes() == theirs.read_bytes()
        theirs.unlink()
    return equal


if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    if sys.argv[1] == "forkserver":
        context.set_forkserver_preload(["cylora", "cylora.formats.checkpoint"])
    print(run(context, int(sys.argv[2]), Path(sys.argv[3])))
