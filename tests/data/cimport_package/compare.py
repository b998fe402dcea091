"""Do the same work through `foreign.steps` and through cylora's Python; print the bits of both as JSON."""

import hashlib
import json
import sys

import foreign.steps
import numpy as np

import cylora
from cylora.kernels import dispatch

SIZES = (1, 15, 16, 17, 8191, 8192, 8193, 20_011)
RULES = [{"weight_decay": decay, "weight_decay_mode": mode} for decay in (0.0, 0.1) for mode in ("decoupled", "l2")]
MAX_NORM = 1.5


def digest(*arrays) -> str:
    return hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in arrays)).hexdigest()


def vector(generator, size):
    """Return normal numbers over many magnitudes."""
    return (generator.standard_normal(size) * 10.0 ** generator.integers(-6, 1, size)).astype(np.float32)


def compare(size: int, seed: int) -> dict[str, tuple[str, str]]:
    """Return for each piece of work the digests of (foreign, cylora)."""
    generator = np.random.default_rng(seed)
    gradient = vector(generator, size)
    tiny = np.full(size, 1e-42, np.float32)
    ours, theirs = gradient.copy(), gradient.copy()
    found = {
        "norm": (digest(foreign.steps.norm(gradient)), digest(cylora.grad_norm([gradient]))),
        "norm in pieces": (digest(foreign.steps.norm_in_pieces(gradient, 13)), digest(cylora.grad_norm([gradient]))),
        "norm, flushing": (digest(foreign.steps.norm(tiny, flush=True)), digest(cylora.grad_norm([tiny]))),
        "clip": (
            digest(foreign.steps.clip(theirs, MAX_NORM), theirs),
            digest(cylora.clip_grad_norm_([ours], MAX_NORM), ours),
        ),
    }
    for rule in RULES:
        found[f"adam {rule}"] = adam(generator, size, rule)
    return found


def adam(generator, size: int, rule) -> tuple[str, str]:
    ours, norms = vector(generator, size), []
    theirs, m, v = ours.copy(), np.zeros_like(ours), np.zeros_like(ours)
    optimizer = cylora.Adam(ours, learning_rate=1e-3, max_grad_norm=MAX_NORM, **rule)
    fixed = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": rule["weight_decay"]}
    fixed |= {"l2": rule["weight_decay_mode"] == "l2", "max_norm": MAX_NORM, "rate": 1e-3}
    for t in range(1, 6):
        gradient = vector(generator, size)
        norms.append((foreign.steps.adam_step(theirs, gradient, m, v, t, **fixed), optimizer.step(gradient)))
    there, here = zip(*norms, strict=True)
    return digest(there, theirs, m, v), digest(here, ours, optimizer.m, optimizer.v)


def micro_batches(seed: int) -> tuple[str, str]:
    """Three weighted micro-batches and their step, through `LoraTrainer` on one side."""
    generator = np.random.default_rng(seed)
    adapter = cylora.LoraAdapter(37, 11, cylora.LoraConfig(rank=5), seed=seed)
    adapter.flat.vector[...] = vector(generator, adapter.param_count())
    config = cylora.LoraTrainingConfig(warmup_steps=0, max_grad_norm=MAX_NORM)
    trainer = cylora.LoraTrainer(config)
    theirs, total = adapter.flat.vector.copy(), np.zeros_like(adapter.flat.vector)
    m, v = np.zeros_like(total), np.zeros_like(total)
    weights = (3.0, 0.7, 11.0)
    for weight in weights:
        gradient = vector(generator, adapter.param_count())
        trainer.accumulate(1.0, adapter, gradient, weight=weight)
        foreign.steps.accumulate(total, gradient, weight)
    record = trainer.step_accumulated()
    fixed = {name: getattr(config, name) for name in ("beta1", "beta2", "eps", "weight_decay")}
    fixed |= {"l2": False, "max_norm": MAX_NORM, "rate": config.learning_rate, "divisor": sum(weights)}
    before = foreign.steps.adam_step(theirs, total, m, v, 1, **fixed)
    return digest(before, theirs), digest(record.grad_norm, adapter.flat.vector)


work = {f"{name}, {size} elements": both for size in SIZES for name, both in compare(size, seed=size).items()}
work["micro-batches"] = micro_batches(seed=7)
json.dump({"isa": dispatch.isa, "work": work}, sys.stdout)
