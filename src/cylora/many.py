"""step_many: one call that steps many trainers, each with its own adapter."""

from collections.abc import Iterable
from typing import Any

from cylora.config import thread_count
from cylora.errors import InputError
from cylora.history import TrainingStep
from cylora.optimizer import step_many as carry_out
from cylora.trainer import LoraTrainer

__all__ = ["step_many"]


def step_many(jobs: Iterable[tuple[Any, ...]], *, threads: int | None = None) -> list[TrainingStep | Exception]:
    """Do one step of each of many independent trainers in one call, and return what each came to.

    For thousands of small adapters. Norms and updates run in C without the GIL, and no Python code comes between them.

    Parameters
    ----------
    jobs : iterable of (trainer, loss, adapter, grad_a, grad_b) or (trainer, loss, adapter, gradients)
        What `LoraTrainer.step` of that trainer would be called with. A trainer that comes twice is busy the second
        time. No gradient may lie in another job's parameters.
    threads : int in 1..64, optional
        Most threads to share the jobs between; None is CYLORA_NUM_THREADS, or 1. No bit of any result depends on it.
        Jobs that train the same parameters run one after the other, in their order.

    Returns
    -------
    list
        For each job the TrainingStep that `step` would have returned, or the exception it would have raised. One job's
        error touches no other. As with `step`, what ``on_step`` raises stands there although the step is done.

    Raises
    ------
    ConfigError, InputError
        If ``threads`` is no such number, or ``jobs`` cannot be iterated. Nothing was written.
    KeyboardInterrupt
        While jobs are being checked: nothing was written. In an ``on_step``: all steps are done.
    """
    count = thread_count(threads)
    try:
        given = iter(jobs)
    except TypeError:
        raise InputError(f"jobs must be an iterable of tuples, got {type(jobs).__name__}") from None
    results: list[TrainingStep | Exception] = carry_out(given, LoraTrainer.prepared_step, count)
    return results
