"""Tenant: one entry of an AdapterStore, and what it takes in memory."""

import math
from typing import Any

import numpy as np

from cylora import checks
from cylora.adapter import AdapterSet, Gradients, LoraAdapter
from cylora.config import LoraTrainingConfig
from cylora.errors import InputError
from cylora.flat import Layout
from cylora.moments import Moments
from cylora.optimizer import Owned, check_gradient
from cylora.parts import trained_sizes
from cylora.serving.snapshot import AdapterSnapshot
from cylora.trainer import LoraTrainer

__all__ = ["Tenant", "check_gradients", "published_bytes", "share_configs", "snapshot_bytes", "tenant_bytes"]

# Of Python objects, padding and allocators' headers around a tenant's vectors: with AdapterStore, 10,000 tenants of one
# adapter and 500 of 14 grow the process by no more (bench/tenants.py, tests/test_serving_store_memory.py).
OBJECT_BYTES = 12 * 1024
MATRIX_BYTES = 1024  # for each matrix beyond the first two
RECORD_BYTES = 25  # of a history
GUARD_BYTES = 2 * 40  # of a divergence guard's two numbers for each step of its window
OPTION_BYTES = 3 * 1024  # of objects for a guard, and again for a state to go back to
SNAPSHOT_BYTES = 5 * 512  # of objects around a published vector


class Tenant(Owned):
    """One tenant in its store. All but ``snapshot`` is read and written under the store's lock or by the owner.

    Attributes
    ----------
    adapters : None while they are on disk only, as ``trainer`` is.
    layout : of the adapters; None before the first time they were in memory.
    n_bytes : counted for it while it is in memory; for one on disk what it would take, or an estimate.
    is_pinned : whether its owner may keep it for as long as it likes (`AdapterStore.use`).
    snapshot : the version to serve, or None.
    version : of the last snapshot ever, or 0.
    """

    __slots__ = ("adapters", "is_pinned", "layout", "n_bytes", "snapshot", "version")

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.n_bytes = 0
        self.adapters: LoraAdapter | AdapterSet | None = None
        self.layout: Layout | None = None
        self.is_pinned = False
        self.snapshot: AdapterSnapshot | None = None
        self.version = 0


def share_configs(config: LoraTrainingConfig, trainer: LoraTrainer, adapters: LoraAdapter | AdapterSet) -> None:
    """Let what was read from a file have the store's own configs where they are equal: one object for all tenants."""
    if trainer.config == config:
        trainer.config = config
    for one in adapters.values() if isinstance(adapters, AdapterSet) else (adapters,):
        if one.config == trainer.config.lora_config:
            one.config = trainer.config.lora_config


def tenant_bytes(trainer: LoraTrainer, adapters: LoraAdapter | AdapterSet) -> int:
    """Return what a tenant takes once it has everything its config asks for: moments, a full history, an average.

    Micro-batches that wait count as soon as there is a buffer for them.
    """
    config, flat = trainer.config, adapters.flat
    forms = Moments.forms(trained_sizes(flat.layout, config), config.state_dtype).values()
    moments: int = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in forms)
    vectors = flat.vector.nbytes * (1 if config.ema_decay is None else 2) + moments
    guard = 0
    if config.divergence != "ignore":
        guard = GUARD_BYTES * config.divergence_window + OPTION_BYTES
    if config.divergence == "rollback":
        vectors, guard = 2 * vectors, guard + OPTION_BYTES
    if trainer.accumulated:
        vectors += flat.vector.nbytes
    records = RECORD_BYTES * (config.history_limit or 0)
    return vectors + records + guard + OBJECT_BYTES + MATRIX_BYTES * (len(flat.layout) - 2)


def snapshot_bytes(snapshot: AdapterSnapshot | None) -> int:
    """Return what a snapshot takes; None takes nothing."""
    return 0 if snapshot is None else published_bytes(snapshot.adapters.flat.layout)


def published_bytes(layout: Layout) -> int:
    """Return what a snapshot of adapters of this layout would take."""
    return 4 * _size(layout) + SNAPSHOT_BYTES + MATRIX_BYTES * (len(layout) - 2)


def check_gradients(layout: Layout, loss: Any, grad_a: Any, grad_b: Any) -> None:
    """Raise the InputError that a step of adapters of this layout would, whatever the numbers are."""
    checks.real("loss", loss, error=InputError)
    if grad_b is not None:
        if len(layout) != 2:
            raise InputError("gradients of an AdapterSet must be one Gradients or flat vector, got a pair")
        for name, gradient, (_, (rows, columns)) in zip(("grad_a", "grad_b"), (grad_a, grad_b), layout, strict=True):
            check_gradient(gradient, name, rows, columns)
    elif not isinstance(grad_a, Gradients):
        check_gradient(grad_a, "gradient", _size(layout), -1)
    elif grad_a.layout != layout:
        raise InputError(f"grad_a must be a Gradients of the tenant's layout, {layout}, got one of {grad_a.layout}")


def _size(layout: Layout) -> int:
    return sum(math.prod(shape) for _, shape in layout)
