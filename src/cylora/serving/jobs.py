"""Job and Ticket: gradients that wait for their step, and the promise of its record."""

import contextlib
import math
import os
import threading
from concurrent.futures import Future, InvalidStateError
from typing import Any

import numpy as np

from cylora.adapter import Gradients
from cylora.errors import StateError
from cylora.flat import FloatArray
from cylora.history import TrainingStep
from cylora.optimizer import grad_norm, joined

__all__ = ["Job", "Ticket"]


class Ticket(Future[TrainingStep]):
    """What `OnlineTrainer.submit` returns: a ``concurrent.futures.Future`` of the step's record.

    It has the record once the step is done, or the error that the step, or the way to it, came to. `cancel` works until
    the step begins or the job is merged with another. A forked child cannot read its parent's tickets: a StateError.
    """

    def __init__(self) -> None:
        super().__init__()
        self._process = os.getpid()

    def result(self, timeout: float | None = None) -> TrainingStep:
        """Return the record, or raise the error; wait at most ``timeout`` seconds for it."""
        self._refuse_in_child()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the error, or None; wait at most ``timeout`` seconds for it."""
        self._refuse_in_child()
        return super().exception(timeout)

    def _refuse_in_child(self) -> None:
        if os.getpid() != self._process:  # nobody would ever fulfil it, and its lock may be held by nobody
            raise StateError(f"a ticket must be read in its own process, {self._process}, got the child {os.getpid()}")


class Job:
    """One step to be done: a tenant's loss and its gradients, copied into one vector.

    The arguments are what ``target.check`` let pass.
    """

    __slots__ = (
        "adding", "count", "gradients", "has_begun", "is_finite", "loss_sum", "n_bytes", "number", "tenant", "ticket",
        "vector",
    )  # fmt: skip

    def __init__(self, tenant: str, loss: Any, grad_a: Any, grad_b: Any, *, may_be_merged: bool = False) -> None:
        self.tenant = tenant
        self.loss_sum, self.count = float(loss), 1
        self.vector: FloatArray
        self.gradients: tuple[FloatArray, ...]
        if grad_b is None:
            self.vector, _ = joined([grad_a.vector if isinstance(grad_a, Gradients) else grad_a])
            self.gradients = (self.vector,)
        else:
            self.vector, (size, _) = joined([grad_a, grad_b])
            parts = (grad_a, self.vector[:size]), (grad_b, self.vector[size:])
            self.gradients = tuple(part.reshape(getattr(given, "shape", -1)) for given, part in parts)
        self.n_bytes = self.vector.nbytes
        self.is_finite = may_be_merged and math.isfinite(grad_norm([self.vector]))
        self.adding = threading.Lock()  # one at a time adds to this job
        self.number = 0  # in the order of submission
        self.ticket = Ticket()
        self.has_begun: bool | None = None  # None: not asked yet; False: cancelled

    def begin(self) -> bool:
        """Return whether the job is still wanted; from then on its ticket cannot be cancelled."""
        if self.has_begun is None:
            try:
                self.has_begun = self.ticket.set_running_or_notify_cancel()
            except RuntimeError:  # whoever holds it has given it a result: as if cancelled
                self.has_begun = False
        return self.has_begun

    def takes(self, other: "Job") -> bool:
        """Return whether the other's gradient may be added to this one's: same form, and both are finite."""
        same_form = [part.shape for part in self.gradients] == [part.shape for part in other.gradients]
        return same_form and self.is_finite and other.is_finite

    def add(self, other: "Job") -> None:
        """Add the other's gradient to this one's. Both losses count, with equal weights."""
        with self.adding, np.errstate(over="ignore"):  # the step itself refuses a sum that is infinite
            np.add(self.vector, other.vector, out=self.vector)  # one call: nothing comes between
            self.loss_sum += other.loss_sum
            self.count += other.count

    def call(self) -> tuple[Any, ...]:
        """Return the job as ``target.step_many`` takes it."""
        return self.tenant, self.loss_sum / self.count, *self.gradients

    def fulfil(self, result: TrainingStep | BaseException) -> None:
        """Give the ticket its record or error, unless whoever holds it has given it one."""
        if isinstance(result, StopIteration):  # a future of asyncio takes none
            result = StateError("the step of this job raised StopIteration")
        with contextlib.suppress(InvalidStateError):
            if isinstance(result, BaseException):
                self.ticket.set_exception(result)
            else:
                self.ticket.set_result(result)
