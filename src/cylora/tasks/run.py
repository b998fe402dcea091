"""One training run: ask the task for loss and gradients, step, evaluate now and then, and keep the time."""

from collections.abc import Callable, Iterator
from time import perf_counter

from cylora.adapter import Gradients
from cylora.config import LoraTrainingConfig
from cylora.errors import CyloraError
from cylora.history import TrainingHistory, TrainingStep
from cylora.tasks.protocol import CheckedTask, RunFailure
from cylora.trainer import LoraTrainer

__all__ = ["TrainingRun"]


class TrainingRun:
    """A task under training. What was learned is in ``task.adapters``, whole after every step.

    Parameters
    ----------
    task : CheckedTask
    config : LoraTrainingConfig
    eval_every : int >= 0
        Steps between two evaluations while `steps` runs; 0 means none.
    on_step : callable or None
        Gets the record of every ``config.log_every``-th step.

    Attributes
    ----------
    measures : list of (int, dict)
        What the task's ``evaluate`` returned, and after how many steps.
    task_seconds, step_seconds : float
        Time in ``loss_and_gradients`` and in ``LoraTrainer.step``; evaluations are in neither.
    """

    def __init__(
        self,
        task: CheckedTask,
        config: LoraTrainingConfig,
        *,
        eval_every: int = 0,
        on_step: Callable[[TrainingStep], None] | None = None,
    ) -> None:
        self.task = task
        self.measures: list[tuple[int, dict[str, float]]] = []
        self.task_seconds = 0.0
        self.step_seconds = 0.0
        self._eval_every = eval_every
        self._trainer = LoraTrainer(config, on_step=on_step)

    @property
    def history(self) -> TrainingHistory:
        """The record of every step so far."""
        return self._trainer.training_history

    @property
    def steps_done(self) -> int:
        """How many steps the adapters have seen."""
        return self._trainer.total_steps()

    def steps(self) -> Iterator[TrainingStep]:
        """Train up to ``config.max_steps``, one step for each record drawn from the iterator.

        Raises
        ------
        TaskError     If the task breaks the protocol.
        RunFailure    If the task raises, or the trainer refuses the loss or the gradients that it gave.
        """
        gradients = Gradients(self.task.adapters)
        while not self._trainer.is_complete():
            step = self.steps_done
            started = perf_counter()
            loss = self.task.loss_and_gradients(step, gradients)
            computed = perf_counter()
            try:
                record = self._trainer.step(loss, self.task.adapters, gradients)
            except CyloraError as error:
                raise RunFailure(f"task {self.task.name!r} cannot be trained on from step {step}: {error}") from error
            finished = perf_counter()
            self.task_seconds += computed - started
            self.step_seconds += finished - computed
            if self._eval_every and self.steps_done % self._eval_every == 0:
                self.evaluate()
            yield record

    def evaluate(self) -> None:
        """Measure the adapters as they are now, unless that has been done or the task cannot."""
        if self.task.can_evaluate and (not self.measures or self.measures[-1][0] != self.steps_done):
            self.measures.append((self.steps_done, self.task.evaluate()))
