"""Runs with every training option, whose bits must not depend on threads, floating-point state or gradients' type."""

import hashlib
import math
from typing import Any

import fp_state
import numpy as np

from cylora import AdamParams, AdapterSet, Gradients, LoraConfig, LoraTrainer, LoraTrainingConfig
from cylora.kernels import threads as pool

RUNS: dict[str, dict[str, Any]] = {
    "LoRA+": {"lora_plus_ratio": 16 / 3},
    "LoRA-FA": {"train_a": False, "ema_decay": 0.9},
    "patterns": {"rate_pattern": {"q": 1 / 3, "odd": 0.0}, "weight_decay_pattern": {"up": 0.3}, "ema_decay": 0.99},
    "rollback": {
        "divergence": "rollback", "divergence_window": 3, "divergence_factor": 2.5, "rollback_every": 2,
        "ema_decay": 0.7, "lora_plus_ratio": 2.0,
    },
    "skip": {"divergence": "skip", "divergence_window": 2, "divergence_factor": 3.0, "early_stopping_patience": 4},
}  # fmt: skip
FORMS = ("float32", "bfloat16", "8bit")
SHAPES = {
    "small": {"q": (5, 7), "odd": (3, 1), "up": (9, 4)},
    "wide": {"q": (900, 1300), "odd": (3, 1), "up": (1111, 300)},
}
THREADS = (1, 2, 3, 7, 16)


def drawn(size: int) -> list[Any]:
    """Return ten gradients: not in another floating-point state, which would change them."""
    rng = np.random.default_rng(1)
    return [
        rng.standard_normal(size).astype(np.float16) * np.float16(40 if step == 7 else 1) for step in range(10)
    ]  # fmt: skip


def run(name: str, form: str, shapes: str, threads: int, half: bool, state_name: str) -> str:
    """Return the digest of all that a run of ten steps comes to: a bad one, micro-batches and overrides among them."""
    config = LoraTrainingConfig(
        **RUNS[name], state_dtype=form, threads=threads, warmup_steps=0, learning_rate=1 / 300, log_every=0,
        weight_decay_mode="l2" if name == "patterns" else "decoupled", max_grad_norm=0.7,
    )  # fmt: skip
    adapters = AdapterSet(SHAPES[shapes], LoraConfig(rank=8), seed=0)
    trainer, gradients = LoraTrainer(config), Gradients(adapters)
    params = AdamParams(learning_rate=1e-3 / 3, beta1=0.7, beta2=0.95, eps=1e-12, weight_decay=0.2)
    records: list[Any] = []
    third, seventh = 1 / 3, 1 / 7
    for step, values in enumerate(drawn(gradients.vector.size)):
        gradients.vector[...] = values
        gradient: Any = values if half else gradients
        overrides = params if step in (3, 6) else None
        fp_state.enter(state_name)
        try:
            if step in (4, 5):
                trainer.accumulate(third, adapters, gradient, weight=seventh)
            elif step == 6:
                records.append(trainer.step_accumulated(overrides=overrides))
            elif overrides is not None:
                records.append(trainer.step_with(overrides, third, adapters, gradient))
            else:
                records.append(trainer.step(third, adapters, gradient))
        finally:
            fp_state.enter("clean")
    assert name not in ("rollback", "skip") or records[-3].skipped
    state = trainer.state_dict()
    digest = hashlib.sha256(adapters.flat.vector.tobytes() + repr(records).encode())
    for part in (state["adam"], {"ema": state["ema"]}, state["watch"] or {}):
        for value in part.values():
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()[:16]


def options() -> tuple[int, dict[str, dict[str, str]]]:
    """Return how many combinations there were, and the digests of each run with one combination that gave it."""
    found: dict[str, dict[str, str]] = {}
    combinations = 0
    pool.configure("always", 0)
    states = list(fp_state.STATES)
    for name in RUNS:
        for form in FORMS:
            for shapes in SHAPES:
                for place, threads in enumerate(THREADS if shapes == "wide" else THREADS[:3]):
                    state = states[(place + len(found)) % len(states)]
                    digest = run(name, form, shapes, threads, bool(place % 2), state)
                    combinations += 1
                    ways = found.setdefault(f"{name}, {form}, {shapes}", {})
                    ways.setdefault(digest, f"{threads} threads, state {state}")
    assert combinations == len(RUNS) * len(FORMS) * (len(THREADS) + 3)
    assert math.prod((len(RUNS), len(FORMS), len(SHAPES))) == len(found)
    return combinations, found
