"""Small adapters, gradients and a fingerprint of everything a trainer and its adapters hold."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cylora import AdapterSet, Gradients, LoraAdapter, LoraConfig, LoraTrainer, LoraTrainingConfig

Floats = NDArray[np.float32]
D_IN, D_OUT, RANK = 6, 5, 3


def make_adapter(seed: int = 0, **config: Any) -> LoraAdapter:
    """Return an adapter whose B is not zero, as after some training."""
    adapter = LoraAdapter(D_IN, D_OUT, LoraConfig(rank=RANK, **config), seed=seed)
    adapter.b_matrix[...] = np.random.default_rng(seed + 1).normal(size=adapter.b_matrix.shape)
    return adapter


def make_set(seed: int = 0, **config: Any) -> AdapterSet:
    """Return three adapters of three shapes in one vector."""
    adapters = AdapterSet({"q": (6, 5), "k": (4, 3), "out.proj": (2, 7)}, LoraConfig(rank=2, **config), seed=seed)
    adapters.flat.vector[...] = np.random.default_rng(seed).normal(size=adapters.param_count())
    return adapters


def make_trainer(**config: Any) -> LoraTrainer:
    """Return a trainer that moves the parameters from its first step on."""
    return LoraTrainer(LoraTrainingConfig(**{"learning_rate": 1e-2, "warmup_steps": 0, "log_every": 0} | config))


def make_pair(seed: int = 0, adapter: LoraAdapter | None = None) -> tuple[Floats, Floats]:
    """Return gradients for A and B."""
    rng = np.random.default_rng([seed, 7])
    shapes = ((RANK, D_IN), (D_OUT, RANK)) if adapter is None else (adapter.a_matrix.shape, adapter.b_matrix.shape)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return a, b


def fill(gradients: Gradients, seed: int = 0) -> Gradients:
    """Write gradients into a buffer and return it."""
    gradients.vector[...] = np.random.default_rng([seed, 9]).normal(size=gradients.vector.size)
    return gradients


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(f"{key}:".encode())
            _feed(digest, value[key])
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype.str}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(digest, item)
    else:
        digest.update(f"{type(value).__name__}={value!r};".encode())


def fingerprint(*holders: Any) -> str:
    """Return the sha256 of all that trainers, adapters, arrays and generators hold, with the live moments as stored."""
    digest = hashlib.sha256()
    for holder in holders:
        if isinstance(holder, LoraTrainer):
            adam = holder._adam
            stored = None if adam is None else adam._moments.to_dict()
            live = None if adam is None or adam.t == 0 else [adam.m, adam.v, stored, adam.t, adam.busy]
            _feed(digest, [holder.state_dict(), live, holder.accumulated, holder.total_steps(), holder.skipped_steps()])
            _feed(digest, [list(holder.training_history), holder.average_loss(), holder._calling_back])
        elif isinstance(holder, (LoraAdapter, AdapterSet)):
            _feed(digest, [holder.flat.vector, holder.flat.layout])
        elif isinstance(holder, np.random.Generator):
            _feed(digest, holder.bit_generator.state)
        else:
            _feed(digest, holder)
    return digest.hexdigest()


def same_bits(a: Any, b: Any) -> bool:
    """Return whether two arrays have the same dtype, shape and bytes."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
