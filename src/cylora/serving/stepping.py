"""Stepper: have a batch of jobs stepped by one call, and tell everybody who wants to know."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from cylora.errors import ConfigError, StateError
from cylora.history import TrainingStep
from cylora.serving.jobs import Job
from cylora.serving.metrics import ServingMetrics

__all__ = ["OnResult", "StepTarget", "Stepper"]

logger = logging.getLogger("cylora")
OnResult = Callable[[str, TrainingStep | BaseException], object]


class StepTarget(Protocol):
    """What an `OnlineTrainer` trains; an `AdapterStore` is one."""

    def check(self, tenant: str, loss: Any, grad_a: Any, grad_b: Any = None) -> object:
        """Raise what a step would for an unknown tenant or a wrong loss or shape. Called by whoever submits."""
        ...

    def step_many(self, jobs: Iterable[tuple[Any, ...]]) -> list[TrainingStep | Exception]:
        """Do the step of each (tenant, loss, grad_a, grad_b) or (tenant, loss, flat vector); return what each came to.

        Called by the workers. No tenant comes twice in one call, nor in two calls at the same time.
        """
        ...


class Stepper:
    """Does jobs by a target, and reports them. It raises nothing: what goes wrong is the jobs' or the log's.

    Raises
    ------
    ConfigError   If the target, the callback or the metrics are none.
    """

    def __init__(self, target: StepTarget, on_result: OnResult | None, metrics: ServingMetrics | None) -> None:
        if not callable(getattr(target, "check", None)) or not callable(getattr(target, "step_many", None)):
            raise ConfigError(f"target must have methods check and step_many, got {type(target).__name__}")
        if on_result is not None and not callable(on_result):
            raise ConfigError(f"on_result must be callable or None, got {type(on_result).__name__}")
        if metrics is not None and not isinstance(metrics, ServingMetrics):
            raise ConfigError(f"metrics must be a ServingMetrics or None, got {type(metrics).__name__}")
        self._target, self._on_result, self._metrics = target, on_result, metrics

    def carry_out(self, batch: list[Job]) -> dict[str, int]:
        """Step these jobs, each of another tenant, and return how many were done, failed, and had a callback raise."""
        started = time.perf_counter()
        results = self._results(batch)
        seconds = (time.perf_counter() - started) / len(batch)
        counts = {"done": 0, "failed": 0, "callback_errors": 0}
        for job, result in zip(batch, results, strict=True):
            counts["failed" if isinstance(result, BaseException) else "done"] += 1
            try:
                try:
                    self._count(job.tenant, result, seconds)
                finally:
                    job.fulfil(result)
            except BaseException as error:  # SystemExit too: the worker stays
                counts["callback_errors"] += _logged("a ticket's callback", job.tenant, error)
            if self._on_result is not None:
                try:
                    self._on_result(job.tenant, result)
                except BaseException as error:
                    counts["callback_errors"] += _logged("on_result", job.tenant, error)
        return counts

    def _results(self, batch: list[Job]) -> Sequence[TrainingStep | BaseException]:
        try:
            results = [*self._target.step_many([job.call() for job in batch])]
            if len(results) != len(batch):
                raise StateError(f"target.step_many must return {len(batch)} results, got {len(results)}")
            for result in results:
                if not isinstance(result, (TrainingStep, Exception)):
                    name = type(result).__name__
                    raise StateError(f"target.step_many must return TrainingSteps and Exceptions, got {name}")
            return results
        except BaseException as error:
            return [error] * len(batch)

    def _count(self, tenant: str, result: TrainingStep | BaseException, seconds: float) -> None:
        if self._metrics is None:
            return
        if isinstance(result, BaseException):
            self._metrics.error(tenant, result)
        else:
            self._metrics.step(tenant, result, seconds)


def _logged(what: str, tenant: str, error: BaseException) -> int:
    """Log what a callback raised, and return how many errors that is."""
    logger.error("%s raised %s for tenant %r", what, type(error).__name__, tenant, exc_info=error)
    return 1
