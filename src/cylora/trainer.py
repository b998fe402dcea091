"""LoraTrainer: one call for each step, which happens wholly or not at all."""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

from cylora import checks, schedule
from cylora.accumulation import MAX_WEIGHT, MIN_WEIGHT, Accumulation
from cylora.adapter import AdapterSet, Gradients, LoraAdapter
from cylora.config import LoraTrainingConfig
from cylora.errors import ConfigError, InputError, StateError, TrainerBusyError
from cylora.history import TrainingHistory, TrainingStep
from cylora.optimizer import Adam, AdamState, check_rate

__all__ = ["LoraTrainer", "TrainerState"]

STATE_VERSION = 1
NO_MICRO_BATCH = "at least one accumulated micro-batch, got none"
_Result = TypeVar("_Result")
logger = logging.getLogger("cylora")


class TrainerState(NamedTuple):
    """The parts a trainer continues from, themselves and no copies: for those who write and read files."""

    adam: AdamState | None
    history: TrainingHistory
    accumulation: Accumulation


class LoraTrainer:
    """Train one LoraAdapter, or all of an AdapterSet, from losses and gradients the caller computes.

    A step clips the gradients by their global norm over all A and B together, updates the parameters in place with Adam
    at the scheduled rate, and records itself. After a step that raises, parameters, moments, counters and history are
    byte for byte what they were.

    Parameters
    ----------
    config : LoraTrainingConfig, optional
    on_step : callable, optional
        Called with the TrainingStep after every ``config.log_every`` steps. It may read the trainer, not step it. What
        it raises reaches the caller of `step`; the step itself is done by then.

    Notes
    -----
    The trainer belongs to the adapters of its first step that succeeds. One thread steps it at a time: a second one
    gets a TrainerBusyError. Several trainers run in parallel, since all but small steps release the GIL. A forked child
    may go on with a trainer, unless another thread was stepping it at the fork: then every call is a StateError.
    """

    def __init__(
        self, config: LoraTrainingConfig | None = None, *, on_step: Callable[[TrainingStep], object] | None = None
    ) -> None:
        if config is not None and not isinstance(config, LoraTrainingConfig):
            raise ConfigError(f"config must be a LoraTrainingConfig, got {type(config).__name__}")
        if on_step is not None and not callable(on_step):
            raise ConfigError(f"on_step must be callable or None, got {type(on_step).__name__}")
        self.config = LoraTrainingConfig() if config is None else config
        self._rate = schedule.from_config(self.config)
        self._report = _reporter(on_step)
        self._history = TrainingHistory(self.config.history_limit)
        self._adapters: LoraAdapter | AdapterSet | None = None
        self._adam: Adam | None = None
        self._restored: AdamState | None = None  # loaded before the first step, until then
        self._bound_at: tuple[int, int] | None = None  # steps and micro-batches there were when the adapters came
        self._accumulation = Accumulation()
        self._lock, self._lock_process = threading.RLock(), os.getpid()

    # ------------------------------------------------------------------ stepping

    def step(
        self, loss: float, adapter: LoraAdapter | AdapterSet, grad_a: Any, grad_b: Any = None
    ) -> TrainingStep:
        """Do one step and return its record.

        Parameters
        ----------
        loss : float
            Recorded; NaN and infinities too.
        adapter : LoraAdapter or AdapterSet
            Updated in place.
        grad_a : array (rank, d_in), C-contiguous; or a Gradients of the layout of ``adapter``
            dL/dA, read only, where it lies. Also taken flat, as a vector. float32, float16 or bfloat16: whatever
            `grad_norm` takes, so NumPy's arrays and torch's tensors on the CPU.
        grad_b : array (d_out, rank), C-contiguous; omitted with a Gradients
            dL/dB, likewise.

        Raises
        ------
        NonFiniteGradientError
            If a gradient is not finite and ``config.nonfinite`` is "raise". The message names matrix and element.
        InputError, StateError, TrainerBusyError
            If an argument is wrong, the adapter is not the trainer's, or a step is under way.
        """
        adam = self._adam  # looked up first: should another thread replace it, the old one refuses
        if adam is None or adapter is not self._adapters:
            adam = self._ready(adapter)
        if grad_b is None:
            grad_a = self._vector_of(grad_a)
        record: TrainingStep = adam.run_step(loss, grad_a, grad_b)
        return record

    def prepared_step(
        self, loss: float, adapter: LoraAdapter | AdapterSet, grad_a: Any, grad_b: Any = None
    ) -> tuple[Adam, float, Any, Any]:
        """Return what `step` would hand to the kernel, for `cylora.step_many`. Arguments and errors as for `step`."""
        if not isinstance(self, LoraTrainer):  # called as a function, with a job's items
            raise InputError(f"a job must begin with a LoraTrainer, got {type(self).__name__}")
        adam = self._adam
        if adam is None or adapter is not self._adapters:
            adam = self._ready(adapter)
        return adam, loss, self._vector_of(grad_a) if grad_b is None else grad_a, grad_b

    def accumulate(
        self,
        loss: float,
        adapter: LoraAdapter | AdapterSet,
        grad_a: Any,
        grad_b: Any = None,
        *,
        weight: float = 1.0,
    ) -> None:
        """Add one micro-batch to the step that `step_accumulated` will do. Arguments and errors as for `step`.

        That step uses the mean of the gradients and of the losses, weighted by ``weight`` (in [1e-30, 1e30]; the number
        of tokens, say). A micro-batch that raises has added nothing; one that is not finite always raises, also where
        ``config.nonfinite`` is "skip".
        """
        weight = checks.real("weight", weight, "in [1e-30, 1e30]", lambda x: MIN_WEIGHT <= x <= MAX_WEIGHT, InputError)
        with self._binding:  # two threads must not make a buffer each
            adam = self._ready(adapter)
            buffer = self._accumulation.buffer(adapter.flat.vector.size)
        if grad_b is None:
            grad_a = self._vector_of(grad_a)
        adam.accumulate(buffer, loss, grad_a, grad_b, weight)

    def step_accumulated(self, adapter: LoraAdapter | AdapterSet | None = None) -> TrainingStep:
        """Do one step with the weighted mean of the micro-batches since the last one, and return its record.

        ``adapter`` is needed only where the micro-batches came with a loaded state and this trainer has no adapter yet.
        """
        adapter = self._adapters if adapter is None else adapter
        if adapter is None:
            needed = "the adapter, since nothing has bound this trainer to one yet"
            raise StateError(f"step_accumulated needs {needed if self.accumulated else NO_MICRO_BATCH}")
        adam = self._ready(adapter)
        record: TrainingStep = adam.run_step(None, self._accumulation.gradient, None, True)
        return record

    def discard_accumulated(self) -> None:
        """Forget the accumulated micro-batches."""
        self._while_idle(self._accumulation.discard)

    @property
    def accumulated(self) -> int:
        """Micro-batches waiting for `step_accumulated`."""
        return self._accumulation.count

    # ------------------------------------------------------------------ binding

    def _ready(self, adapter: LoraAdapter | AdapterSet | None) -> Adam:
        """Check that this adapter may be stepped now, bind to it if it is the first, and return its optimizer."""
        if self._calling_back:
            raise TrainerBusyError("this trainer is busy: on_step may read it, but not step it")
        if not isinstance(adapter, (LoraAdapter, AdapterSet)):
            raise InputError(f"adapter must be a LoraAdapter or an AdapterSet, got {type(adapter).__name__}")
        with self._binding:
            if self._adam is None:
                self._bind(adapter)
            elif adapter is not self._adapters and self._progress() == self._bound_at:
                self._adam.exclusively(lambda: self._bind(adapter))  # every step of the first one was refused
            if adapter is not self._adapters:
                first = f"the one of the first step, {self._adapters!r}"
                raise StateError(f"adapter must be {first}, got another, {adapter!r}")
            return self._adam  # type: ignore[return-value]

    def _bind(self, adapter: LoraAdapter | AdapterSet) -> None:
        self._check_fit(adapter)
        adam = self._optimizer(adapter, self._history, self._accumulation, self._state().adam)
        replaced, progress = self._adam, self._progress()
        self._adam, self._adapters, self._restored, self._bound_at = adam, adapter, None, progress
        if replaced is not None:
            replaced.retire()

    def _check_fit(self, adapter: LoraAdapter | AdapterSet) -> None:
        state, gradient = self._state().adam, self._accumulation.gradient
        if state is not None and state.layout != adapter.flat.layout:
            raise StateError(f"adapter must have the layout of the loaded state, {state.layout}, got {adapter!r}")
        if self.accumulated and gradient is not None and gradient.size != adapter.flat.vector.size:
            raise StateError(f"adapter must have the {gradient.size} parameters of the loaded state, got {adapter!r}")

    @property
    def _binding(self) -> Any:
        """The lock of binding and of the state. Re-entrant: a signal handler may ask for the state under it."""
        if self._lock_process != os.getpid():  # forked: whoever held it may not exist in this process
            self._lock, self._lock_process = threading.RLock(), os.getpid()
        return self._lock

    @property
    def _calling_back(self) -> bool:
        return self._adam is not None and self._adam.reporting

    def _progress(self) -> tuple[int, int]:
        return self.total_steps(), self.accumulated

    def _optimizer(
        self,
        adapter: LoraAdapter | AdapterSet,
        history: TrainingHistory,
        accumulation: Accumulation,
        state: AdamState | None,
    ) -> Adam:
        adam = Adam.for_training(adapter.flat, self.config, state)
        adam.attach(self._rate, schedule.steady_from(self.config), TrainingStep, history)
        adam.attach_pending(*accumulation.buffers())
        adam.attach_report(self._report, self.config.log_every)
        return adam

    def _vector_of(self, gradients: Any) -> Any:
        """Return the flat vector of a Gradients of the bound layout; anything else is for the kernel to judge."""
        if not isinstance(gradients, Gradients):
            return gradients
        layout = self._adapters.flat.layout  # type: ignore[union-attr]
        if gradients.layout is not layout and gradients.layout != layout:
            raise InputError(f"grad_a must be a Gradients made for {self._adapters!r}, got one of another layout")
        return gradients.vector

    def _while_idle(self, function: Callable[[], _Result]) -> _Result:
        """Call ``function`` while no step is under way, and let none begin meanwhile."""
        with self._binding:
            result: _Result = function() if self._adam is None else self._adam.exclusively(function)
            return result

    # ------------------------------------------------------------------ what happened so far

    @property
    def training_history(self) -> TrainingHistory:
        """The records of all steps."""
        return self._history

    def current_lr(self) -> float:
        """Return the rate the next step will use."""
        return check_rate(self._rate(self.total_steps()), self.config)

    def total_steps(self) -> int:
        """Return the number of steps done, skipped ones included."""
        return self._history.total_steps

    def skipped_steps(self) -> int:
        """Return the number of steps that changed nothing because their gradient was not finite."""
        return self._history.skipped_steps()

    def is_complete(self) -> bool:
        """Return whether ``config.max_steps`` steps are done. More are allowed."""
        return self.total_steps() >= self.config.max_steps

    def average_loss(self) -> float:
        """Return the mean of all losses; 0.0 with none."""
        return self._history.average_loss()

    def last_step(self) -> TrainingStep | None:
        """Return the newest record, or None."""
        return self._history.last_step()

    def convergence_rate(self) -> float | None:
        """Return (first loss - last loss) / first loss; None with fewer than two steps or a first loss of zero."""
        return self._history.convergence_rate()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the parameters and the config, as plain numbers and arrays (copies).

        Loaded into a trainer of the same config, with the same parameters, it continues to the same bits. ``adam`` is
        None while no step has been applied, ``accumulated`` while no micro-batch is pending.
        """
        return self._while_idle(lambda: _to_dict(self._state()))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned. On an error nothing has changed."""
        self._refuse_in_callback()
        self._while_idle(lambda: self._take_over(self._from_dict(state)))

    def hold(self, adapters: LoraAdapter | AdapterSet, function: Callable[[TrainerState], _Result]) -> _Result:
        """Return ``function(live state)``, called while no step is under way; none begins meanwhile.

        A step that another thread tries meanwhile waits or is a TrainerBusyError; a hold while one is under way is one.
        ``adapters`` must be the trainer's, or such that it could become so: anything else is a StateError.
        """

        def checked() -> _Result:
            if adapters is not self._adapters and (self._adam is None or self._progress() == self._bound_at):
                self._check_fit(adapters)
            elif adapters is not self._adapters:
                raise StateError(f"adapters must be the trainer's, {self._adapters!r}, got another, {adapters!r}")
            return function(self._state())

        return self._while_idle(checked)

    def adopt(self, state: TrainerState) -> None:
        """Take over these parts themselves; nobody else may keep them. On an error nothing has changed."""
        self._refuse_in_callback()
        self._while_idle(lambda: self._take_over(state))

    def _refuse_in_callback(self) -> None:
        if self._calling_back:
            raise TrainerBusyError("this trainer is busy: on_step may read it, but not change it")

    def _state(self) -> TrainerState:
        state = self._restored if self._adam is None else self._adam.state()
        return TrainerState(None if state is None or state.t == 0 else state, self._history, self._accumulation)

    def _from_dict(self, state: Mapping[str, Any]) -> TrainerState:
        keys = ("version", "adam", "history", "accumulated")
        version, adam_dict, history_dict, accumulated = checks.items("state", state, keys, StateError)
        if version != STATE_VERSION:
            raise StateError(f"state version must be {STATE_VERSION}, got {version!r}")
        history = TrainingHistory.from_state_dict(history_dict)
        restored = None if adam_dict is None else AdamState.from_dict(adam_dict)
        size = None if restored is None else restored.moments.size
        if self._adapters is not None:
            size = self._adapters.flat.vector.size
        return TrainerState(restored, history, Accumulation.from_state_dict(accumulated, size))

    def _take_over(self, state: TrainerState) -> None:
        restored, history, accumulation = state
        gradient = accumulation.gradient
        if self._adapters is not None and accumulation.count and gradient is not None:
            checks.array("accumulated gradient", gradient, "float32", self._adapters.flat.vector.shape, StateError)
        if history.limit != self.config.history_limit:
            raise StateError(f"history limit must be {self.config.history_limit}, as configured, got {history.limit}")
        if restored is not None and restored.t > history.total_steps:
            raise StateError(f"adam t must be at most the {history.total_steps} steps of the history, got {restored.t}")
        if restored is not None and restored.moments.dtype != self.config.state_dtype:
            got = restored.moments.dtype
            raise StateError(f"adam dtype must be {self.config.state_dtype!r}, as configured, got {got!r}")
        if restored is not None and self._adapters is not None and restored.layout != self._adapters.flat.layout:
            raise StateError(f"adam layout must be that of {self._adapters!r}, got {restored.layout}")
        adam = None
        if self._adapters is not None:
            adam = self._optimizer(self._adapters, history, accumulation, restored)
            restored = None
        replaced, self._bound_at = self._adam, None
        # Nothing can interrupt from here on: CPython lets signals and threads in at calls and backward jumps only.
        self._history, self._accumulation, self._adam, self._restored = history, accumulation, adam, restored
        if replaced is not None:
            replaced.retire()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a LoraTrainer is not copied or pickled: load its state_dict() into a new one")


def _to_dict(state: TrainerState) -> dict[str, Any]:
    return {
        "version": STATE_VERSION,
        "adam": None if state.adam is None else state.adam.to_dict(),
        "history": state.history.state_dict(),
        "accumulated": state.accumulation.state_dict(),
    }


def _reporter(on_step: Callable[[TrainingStep], object] | None) -> Callable[[TrainingStep], None]:
    """Return the function that reports a step. It knows no trainer: a cycle would free that one's memory late."""

    def report(record: TrainingStep) -> None:
        if logger.isEnabledFor(logging.INFO):  # asked first: taking the record apart costs more than a small step
            logger.info(
                "step %d: loss %.6g, learning rate %.3g, gradient norm %.4g%s",
                *record[:4],
                ", skipped" if record.skipped else "",
            )
        if on_step is not None:
            on_step(record)

    return report
