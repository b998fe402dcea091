"""What the server keeps: one model, a store with everybody's adapters, and an online trainer that feeds it."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Collection
from concurrent.futures import Future
from typing import cast

from model import DigitReader, Floats

from cylora import AdapterSet, CyloraError, LoraTrainingConfig, TrainingStep
from cylora.serving import AdapterSnapshot, AdapterStore, OnlineTrainer, ServingMetrics

__all__ = ["Learner", "adapters_of"]

logger = logging.getLogger("uvicorn.error")  # the server's own
NICE = 10  # of the threads that learn; those that serve have 0
PUBLISH_SECONDS = 0.25  # for all who have changed; a version for each step would take longer than the step
TRAINING = LoraTrainingConfig(
    learning_rate=1e-2, warmup_steps=0, weight_decay=0.0, log_every=0, history_limit=100, divergence="skip"
)


class Learner:
    """Adapters that are read and trained at the same time. Every method may be called from any thread.

    Parameters
    ----------
    folder : path
        Where tenants lie that are not in memory, and all of them after `close`.
    memory_budget : int
        Bytes for the tenants in memory.
    queue_size : int
        Feedbacks that may wait for the trainer.
    cpus : collection of int, optional
        Where to learn (Linux).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        memory_budget: int,
        queue_size: int,
        *,
        cpus: Collection[int] | None = None,
    ) -> None:
        self.queue_size, self._cpus = queue_size, cpus
        self.metrics = ServingMetrics()
        self.reader = DigitReader()
        self.store = AdapterStore(
            self.reader.new_adapters, TRAINING, folder=folder, memory_budget=memory_budget, metrics=self.metrics
        )
        self.online = OnlineTrainer(
            self.store,
            queue_size=queue_size,
            policy="block",
            on_result=lambda tenant, outcome: self._changed.add(tenant),
            metrics=self.metrics,
            nice=NICE,
            cpus=cpus,
        )
        self._changed: set[str] = set()  # since their latest version; single operations on it need no lock
        self._is_closing = threading.Event()
        self._publisher = threading.Thread(target=self._publish_regularly, name="publisher", daemon=True)
        self._publisher.start()

    def give_way(self) -> None:
        """Give the calling thread the place and the priority of those that learn; only Linux has them for threads."""
        if sys.platform == "linux":
            with contextlib.suppress(PermissionError):  # a sandbox's rule: better to learn at another priority
                os.setpriority(os.PRIO_PROCESS, 0, max(NICE, os.getpriority(os.PRIO_PROCESS, 0)))
            if self._cpus is not None:
                os.sched_setaffinity(0, self._cpus)

    def create(self, tenant: str) -> bool:
        """Make a tenant and publish its first version; return whether it is new."""
        is_new = tenant not in self.store
        if is_new:
            self.store.create(tenant)
        self.restored(tenant)
        return is_new

    def restored(self, tenant: str) -> AdapterSnapshot:
        """Return what to serve for a tenant that nobody has asked for since the start, from the disk."""
        return self.store.latest(tenant) or self.store.publish(tenant)

    def published(self, tenant: str, step: int) -> AdapterSnapshot:
        """Return the first version that has this step; if it is not there yet, it is made now."""
        snapshot = self.restored(tenant)
        return self.store.publish(tenant) if snapshot.step is None or snapshot.step <= step else snapshot

    def submit(self, tenant: str, images: Floats, labels: list[int]) -> "Future[TrainingStep]":
        """Compute the gradients of a correction, by the adapters that are being served, and queue them.

        A full queue raises at once.
        """
        loss, gradients = self.reader.loss_and_gradients(adapters_of(self.restored(tenant)), images, labels)
        return self.online.submit(tenant, loss, gradients, timeout=0)

    def _publish_regularly(self) -> None:
        """Publish who has changed, one after the other, evenly: each takes the GIL for a moment, not all together."""
        self.give_way()
        pause = PUBLISH_SECONDS
        while not self._is_closing.wait(pause):
            if self._changed:
                tenant = self._changed.pop()
                try:
                    self.store.publish(tenant)
                except (CyloraError, OSError):  # weights that are not finite, no room: the version before stays
                    logger.exception("no new version of %r", tenant)
            pause = PUBLISH_SECONDS / max(1, len(self._changed))

    def close(self) -> None:
        """Learn what is queued and write all tenants to disk."""
        self.online.close()
        self._is_closing.set()
        self._publisher.join()
        self.store.close()


def adapters_of(snapshot: AdapterSnapshot) -> AdapterSet:
    """Return a snapshot's adapters as what the model has made of each tenant's: a set."""
    return cast(AdapterSet, snapshot.adapters)
