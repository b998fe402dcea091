"""A target for an OnlineTrainer: tenants in a dict over cylora.step_many, with a gate that keeps a worker in a call."""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from training import fingerprint, make_adapter, make_pair, make_trainer

import cylora
from cylora import AdapterSet, Gradients, InputError, LoraAdapter, LoraTrainer, TrainingStep
from cylora.optimizer import grad_norm
from cylora.serving import OnlineTrainer

TIMEOUT = 60.0  # against hangs: a test that works needs a thousandth of it


class Tenants:
    """A trainer and adapters for each name."""

    def __init__(self, *names: str, adapters: dict[str, LoraAdapter | AdapterSet] | None = None, **config: Any) -> None:
        made = {name: make_adapter(place) for place, name in enumerate(names)}
        self.adapters: dict[str, LoraAdapter | AdapterSet] = {**made, **(adapters or {})}
        self.trainers: dict[str, LoraTrainer] = {name: make_trainer(**config) for name in self.adapters}
        self.calls: list[list[str]] = []
        self.jobs: list[tuple[Any, ...]] = []
        self.renew()

    def renew(self) -> None:
        """Make locks and events of its own: those that a forked child finds may be held by nobody for ever."""
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self._under_way: set[str] = set()
        self._lock = threading.Lock()

    def check(self, tenant: str, loss: Any, grad_a: Any, grad_b: Any = None) -> None:
        """Refuse an unknown tenant, a loss that is no number, and what is of another size."""
        if tenant not in self.adapters:
            raise InputError(f"tenant must be one of {', '.join(self.adapters)}, got {tenant!r}")
        float(loss)
        if isinstance(grad_a, Gradients):
            grad_a = grad_a.vector
        grad_norm([grad_a] if grad_b is None else [grad_a, grad_b])
        sizes = sum(memoryview(part).nbytes // 4 for part in (grad_a, grad_b) if part is not None)
        if sizes != self.adapters[tenant].param_count():
            raise InputError(f"gradients must have {self.adapters[tenant].param_count()} elements, got {sizes}")

    def step_many(self, jobs: Iterable[tuple[Any, ...]]) -> list[TrainingStep | Exception]:
        """Step them, each tenant once, and no tenant in two calls at a time."""
        jobs = list(jobs)
        names = [job[0] for job in jobs]
        with self._lock:
            assert len({*names}) == len(names)
            assert not self._under_way & {*names}
            self._under_way |= {*names}
            self.calls.append(names)
            self.jobs += jobs
        self.entered.set()
        assert self.gate.wait(2 * TIMEOUT)  # longer than any wait for what must happen meanwhile
        results = cylora.step_many(
            [(self.trainers[name], loss, self.adapters[name], *rest) for name, loss, *rest in jobs]
        )
        with self._lock:
            self._under_way -= {*names}
        return results

    def bits(self, *names: str) -> list[str]:
        """Return a fingerprint of each tenant."""
        return [fingerprint(self.trainers[name], self.adapters[name]) for name in names or self.adapters]

    @contextlib.contextmanager
    def busy(self, online: OnlineTrainer, tenant: str = "plug") -> Iterator[Any]:
        """Keep a worker inside a step of ``tenant``; what is submitted meanwhile waits in the queue."""
        self.gate.clear()
        self.entered.clear()
        try:
            ticket = online.submit(tenant, 0.0, *make_pair(99))
            assert self.entered.wait(TIMEOUT)
            yield ticket
        finally:
            self.gate.set()
