"""One training run: ask the task for loss and gradients, step, evaluate now and then, and keep the time."""

import contextlib
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import Any

from cylora import checks
from cylora.adapter import AdapterSet, Gradients
from cylora.errors import CyloraError, FormatError
from cylora.history import TrainingHistory, TrainingStep
from cylora.tasks.protocol import CheckedTask, RunFailure
from cylora.trainer import LoraTrainer

__all__ = ["TrainingRun"]


class TrainingRun:
    """A task under training. What was learned is in ``task.adapters``, whole after every step.

    Parameters
    ----------
    task : CheckedTask
    trainer : LoraTrainer
        New, or from a checkpoint of this task, whose adapters then hold that checkpoint's parameters.
    eval_every : int >= 0
        Steps between two evaluations while `steps` runs; 0 means none.

    Attributes
    ----------
    trainer : LoraTrainer
    measures : list of (int, dict)
        What the task's ``evaluate`` returned, and after how many steps.
    task_seconds, step_seconds : float
        Time in ``loss_and_gradients`` and in ``LoraTrainer.step``; evaluations are in neither.
    """

    def __init__(self, task: CheckedTask, trainer: LoraTrainer, eval_every: int = 0) -> None:
        self.task, self.trainer = task, trainer
        self.measures: list[tuple[int, dict[str, float]]] = []
        self.task_seconds = 0.0
        self.step_seconds = 0.0
        self._eval_every = eval_every

    @property
    def history(self) -> TrainingHistory:
        """The record of every step so far."""
        return self.trainer.training_history

    @property
    def steps_done(self) -> int:
        """How many steps the adapters have seen."""
        return self.trainer.total_steps()

    def steps(self) -> Iterator[TrainingStep]:
        """Train up to ``config.max_steps``, one step for each record drawn from the iterator.

        Raises
        ------
        TaskError     If the task breaks the protocol.
        RunFailure    If the task raises, or the trainer refuses the loss or the gradients that it gave.
        """
        gradients = Gradients(self.task.adapters)
        while not self.trainer.is_complete():
            step = self.steps_done
            started = perf_counter()
            loss = self.task.loss_and_gradients(step, gradients)
            computed = perf_counter()
            try:
                record = self.trainer.step(loss, self.task.adapters, gradients)
            except CyloraError as error:
                raise RunFailure(f"task {self.task.name!r} cannot be trained on from step {step}: {error}") from error
            finished = perf_counter()
            self.task_seconds += computed - started
            self.step_seconds += finished - computed
            if self._eval_every and self.steps_done % self._eval_every == 0:
                self.evaluate()
            yield record

    def evaluate(self) -> None:
        """Measure the adapters as they are now, or their average if one is kept, unless that has been done.

        Nothing happens where the task cannot evaluate.
        """
        if self.task.can_evaluate and (not self.measures or self.measures[-1][0] != self.steps_done):
            with self.trainer.ema_weights(self.task.adapters) if self._averages else contextlib.nullcontext():
                self.measures.append((self.steps_done, self.task.evaluate()))

    def served_adapters(self) -> AdapterSet:
        """Return what this training is for: the task's adapters, or their average if one is kept."""
        if not self._averages:
            return self.task.adapters
        served = self.trainer.ema_adapters(self.task.adapters)
        assert isinstance(served, AdapterSet)
        return served

    @property
    def _averages(self) -> bool:
        return self.trainer.config.ema_decay is not None

    def progress(self) -> dict[str, Any]:
        """Return measures and times as JSON values, for `restore`."""
        return {
            "measure_names": list(self.measures[0][1]) if self.measures else [],
            "measures": [[step, *named.values()] for step, named in self.measures],
            "task_seconds": self.task_seconds,
            "step_seconds": self.step_seconds,
        }

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Take over what `progress` returned; FormatError if it is something else."""
        keys = ("measure_names", "measures", "task_seconds", "step_seconds")
        names, measures, *seconds = checks.items("the run's progress", progress, keys, FormatError)
        try:
            restored = [(int(s), dict(zip(names, map(float, values), strict=True))) for s, *values in measures]
        except (TypeError, ValueError, OverflowError):
            raise FormatError(f"measures must be [step, a number for each name], got {measures!r:.80}") from None
        rule = checks.finite_at_least(0.0)
        self.task_seconds, self.step_seconds = (
            checks.real(name, value, "finite and >= 0", rule, FormatError)
            for name, value in zip(keys[2:], seconds, strict=True)
        )
        self.measures = restored
