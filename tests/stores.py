"""Stores of small tenants, and twins of them that were never on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from training import fingerprint, make_adapter, make_pair

from cylora import LoraTrainer, LoraTrainingConfig
from cylora.serving import AdapterStore
from cylora.serving.tenant import tenant_bytes

CONFIG: dict[str, Any] = {"learning_rate": 1e-2, "warmup_steps": 0, "log_every": 0, "history_limit": 8}


def size_of(adapters: Any = None, **config: Any) -> int:
    """Return what one tenant is counted with."""
    return tenant_bytes(LoraTrainer(LoraTrainingConfig(**CONFIG | config)), adapters or make_adapter())


def number(tenant: str) -> int:
    """Return a seed for a tenant."""
    return sum(tenant.encode())


def new_adapters(tenant: str) -> Any:
    """Return adapters that are this tenant's alone."""
    return make_adapter(number(tenant))


def make_store(
    folder: Path, *, room: float = 100, make: Callable[[str], Any] = new_adapters, store: Any = None, **config: Any
) -> AdapterStore:
    """Return a store with memory for ``room`` tenants; ``store`` are arguments of its own."""
    settings = LoraTrainingConfig(**CONFIG | config)
    budget = int(room * tenant_bytes(LoraTrainer(settings), make("any")))
    return AdapterStore(make, settings, **{"folder": folder, "memory_budget": budget} | (store or {}))


class Twin:
    """What a tenant is without a store: a trainer and its adapters."""

    def __init__(self, tenant: str, make: Callable[[str], Any] = new_adapters, **config: Any) -> None:
        self.trainer = LoraTrainer(LoraTrainingConfig(**CONFIG | config))
        self.adapters = make(tenant)

    def step(self, *arguments: Any) -> Any:
        """Do what the store's `step` does for a tenant."""
        loss, *gradients = arguments
        return self.trainer.step(loss, self.adapters, *gradients)

    def print(self) -> str:
        """Return the fingerprint of everything."""
        return everything(self.trainer, self.adapters)


def everything(trainer: LoraTrainer, adapters: Any) -> str:
    """Return a fingerprint that is the same whether or not the trainer has met its adapters again since it was read."""
    return fingerprint(trainer.state_dict(), list(trainer.training_history), trainer.config.to_dict(), adapters)


def print_of(store: AdapterStore, tenant: str) -> str:
    """Return the fingerprint of everything a tenant is."""
    with store.use(tenant) as (trainer, adapters):
        return everything(trainer, adapters)


def gradients(tenant: str, step: int) -> tuple[Any, ...]:
    """Return a loss and a pair of gradients."""
    return (1.0 + step, *make_pair(1000 * step + number(tenant)))


def by_use(store: AdapterStore) -> list[str]:
    """Return the names of the tenants in memory, the least recently used first."""
    return [tenant.name for tenant in sorted(store._memory.resident.values(), key=lambda one: one.used)]
