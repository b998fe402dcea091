"""Go on from each checkpoint in a folder to the end of a fixed run, and say what comes out.

``worker_resume.py FOLDER THREADS`` prints the instruction set and the fingerprint at the end by name of the file. Run
it with CYLORA_ISA set to compare instruction sets. The run itself is here too: `VARIETIES` and `act`.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from training import fingerprint

from cylora import AdapterSet, Gradients, LoraAdapter, LoraConfig, LoraTrainer, LoraTrainingConfig, optimizer
from cylora.formats.checkpoint import load_checkpoint, save_checkpoint

ACTIONS = 60
# Warm-up, a decaying schedule, clipping, micro-batches and skipped steps in all of them.
COMMON: dict[str, Any] = {
    "learning_rate": 1e-2, "warmup_steps": 6, "max_steps": 40, "schedule": "cosine", "max_grad_norm": 0.5,
    "nonfinite": "skip", "log_every": 0,
}  # fmt: skip
VARIETIES: dict[str, dict[str, Any]] = {
    "float32": {},
    "l2, ring": {"weight_decay_mode": "l2", "history_limit": 7, "schedule": "linear"},
    "bfloat16": {"state_dtype": "bfloat16", "schedule": "warmup_stable_decay"},
    "8bit": {"state_dtype": "8bit", "history_limit": 50, "weight_decay": 0.1},
    "LoRA+, average": {
        "lora_plus_ratio": 4.0,
        "ema_decay": 0.8,
        "weight_decay_pattern": {"q": 0.3},
        "early_stopping_patience": 9,
    },
    "LoRA-FA, 8bit, rollback": {
        "train_a": False,
        "state_dtype": "8bit",
        "ema_decay": 0.5,
        "divergence": "rollback",
        "divergence_window": 4,
        "divergence_factor": 5.0,
        "rollback_every": 3,
        "history_limit": 6,
        "rate_pattern": {"odd": 0.5},
    },
}
# Small ones, and one of so many parameters that several threads get a part.
WIDTHS = {"small": 5, "wide": 700}


def begin(variety: str, width: str) -> tuple[LoraTrainer, AdapterSet, np.random.Generator]:
    """Return a run before its first action."""
    size = WIDTHS[width]
    members = {
        "q": LoraAdapter(size, size + 2, LoraConfig(rank=16 if width == "wide" else 2), seed=0),
        "odd": LoraAdapter(3, size, LoraConfig(rank=1, alpha=2.0), seed=1),
    }
    adapters = AdapterSet.from_adapters(members)
    return LoraTrainer(LoraTrainingConfig(**COMMON | VARIETIES[variety])), adapters, np.random.default_rng(3)


def act(trainer: LoraTrainer, adapters: AdapterSet, rng: np.random.Generator, gradients: Gradients, index: int) -> None:
    """Do action ``index``, which depends on nothing but the state and the generator."""
    gradients.vector[...] = rng.standard_normal(gradients.vector.size, dtype=np.float32)
    if index % 7 in (2, 3, 4):
        trainer.accumulate(rng.random(), adapters, gradients, weight=1 + rng.random())
    elif index % 7 == 5:
        trainer.step_accumulated(adapters)
    else:
        if index % 9 == 8:
            gradients.vector[int(rng.integers(gradients.vector.size))] = math.nan
        if index % 13 == 12:  # for a guard
            gradients.vector *= 99
        trainer.step(3 - index / 50, adapters, gradients)


def end(trainer: LoraTrainer, adapters: AdapterSet, rng: np.random.Generator, start: int) -> str:
    """Do what is left and return the fingerprint of everything."""
    gradients = Gradients(adapters)
    for index in range(start, ACTIONS):
        act(trainer, adapters, rng, gradients, index)
    return fingerprint(trainer, adapters, rng)


def save_cuts(folder: Path, variety: str, width: str, cuts: list[int]) -> str:
    """Save before each of these actions; return the fingerprint at the end of the run, which nothing interrupted."""
    trainer, adapters, rng = begin(variety, width)
    gradients = Gradients(adapters)
    for index in range(ACTIONS):
        if index in cuts:
            save_checkpoint(trainer, adapters, folder / f"{variety}, {width}, {index}", generation=index, rng=rng)
        act(trainer, adapters, rng, gradients, index)
    return fingerprint(trainer, adapters, rng)


def resume(path: Path, threads: int | None) -> str:
    """Go on from a file to the end."""
    checkpoint = load_checkpoint(path, threads=threads)
    assert isinstance(checkpoint.adapters, AdapterSet)
    assert checkpoint.rng is not None
    return end(checkpoint.trainer, checkpoint.adapters, checkpoint.rng, checkpoint.generation)


if __name__ == "__main__":
    files = sorted(Path(sys.argv[1]).iterdir())
    results = {path.name: resume(path, int(sys.argv[2])) for path in files}
    print(json.dumps({"isa": optimizer.isa, "results": results}))
