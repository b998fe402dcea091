"""LoraTrainer: one call for each step, which happens wholly or not at all."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

from cylora import checks, schedule
from cylora.accumulation import MAX_WEIGHT, MIN_WEIGHT, Accumulation
from cylora.adapter import AdapterSet, Gradients, LoraAdapter
from cylora.config import LoraTrainingConfig
from cylora.early_stopping import EarlyStopping
from cylora.errors import ConfigError, InputError, StateError, TrainerBusyError
from cylora.flat import FloatArray
from cylora.history import TrainingHistory, TrainingStep
from cylora.locks import call_locked
from cylora.optimizer import Adam, check_rate
from cylora.overrides import AdamParams
from cylora.parts import max_rate
from cylora.reporting import reporter
from cylora.state import TrainerState, check_config, check_layout, state_from_dict, state_to_dict
from cylora.watch import Watch

__all__ = ["LoraTrainer"]

UNBOUND = "the adapter, since nothing has bound this trainer to one yet"
PAUSE = 1e-4  # seconds between looks at a step under way
NO_MICRO_BATCH = "at least one accumulated micro-batch, got none"
_Result = TypeVar("_Result")


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
        self._report = reporter(on_step)
        self._history = TrainingHistory(self.config.history_limit)
        self._watch = Watch.for_training(self.config, self._history)
        self._adapters: LoraAdapter | AdapterSet | None = None
        self._open: LoraAdapter | AdapterSet | None = None  # them, unless a hold is waiting: then a step waits, too
        self._adam: Adam | None = None
        self._restored: TrainerState | None = None  # loaded before the first step, until then
        self._bound_at: tuple[int, int] | None = None  # steps and micro-batches there were when the adapters came
        self._accumulation = Accumulation()
        self._lock, self._lock_process = threading.RLock(), os.getpid()
        self._renewed: dict[tuple[int, int], Any] = {}  # locks of forked children
        self._kept_waiting: list[None] = []  # an entry for each step that waits for a hold; appending is atomic

    # ------------------------------------------------------------------ stepping

    def step(self, loss: float, adapter: LoraAdapter | AdapterSet, grad_a: Any, grad_b: Any = None) -> TrainingStep:
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
        DivergenceError
            If loss or norm are far above what they were lately and ``config.divergence`` is "raise".
        InputError, StateError, TrainerBusyError
            If an argument is wrong, the adapter is not the trainer's, or a step is under way.
        """
        adam = self._adam  # looked up first: should another thread replace it, the old one refuses
        if adam is None or adapter is not self._open:
            adam = self._ready(adapter)
        if grad_b is None:
            grad_a = self._vector_of(grad_a)
        record: TrainingStep = adam.run_step(loss, grad_a, grad_b)
        return record

    def step_with(
        self, overrides: AdamParams, loss: float, adapter: LoraAdapter | AdapterSet, grad_a: Any, grad_b: Any = None
    ) -> TrainingStep:
        """Do what `step` does with other constants, for this step alone. Other arguments and errors as there.

        A verb of its own: one more argument of `step` would take a fiftieth of a small step from everybody.
        """
        adam = self._ready(adapter)
        gradient = self._vector_of(grad_a) if grad_b is None else grad_a
        record: TrainingStep = adam.run_overridden(loss, gradient, grad_b, False, adam.overridden(overrides))
        return record

    def prepared_step(
        self, loss: float, adapter: LoraAdapter | AdapterSet, grad_a: Any, grad_b: Any = None
    ) -> tuple[Adam, float, Any, Any]:
        """Return what `step` would hand to the kernel, for `cylora.step_many`. Arguments and errors as for `step`."""
        if not isinstance(self, LoraTrainer):  # called as a function, with a job's items
            raise InputError(f"a job must begin with a LoraTrainer, got {type(self).__name__}")
        adam = self._adam
        if adam is None or adapter is not self._open:
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

    def step_accumulated(
        self, adapter: LoraAdapter | AdapterSet | None = None, overrides: AdamParams | None = None
    ) -> TrainingStep:
        """Do one step with the weighted mean of the micro-batches since the last one, and return its record.

        ``adapter`` is needed only where the micro-batches came with a loaded state and this trainer has no adapter yet.
        ``overrides``: other constants for this step alone.
        """
        adapter = self._adapters if adapter is None else adapter
        if adapter is None:
            raise StateError(f"step_accumulated needs {UNBOUND if self.accumulated else NO_MICRO_BATCH}")
        adam = self._ready(adapter)
        gradient = self._accumulation.gradient
        record: TrainingStep
        if overrides is None:
            record = adam.run_step(None, gradient, None, True)
        else:
            record = adam.run_overridden(None, gradient, None, True, adam.overridden(overrides))
        return record

    def optim_step(self, params: AdamParams | None = None, **constants: float | None) -> TrainingStep:
        """Do what `step_accumulated` does, under the Tinker API's name and with its arguments.

        ``optim_step(learning_rate=1e-4)`` is ``optim_step(AdamParams(learning_rate=1e-4))``; other constants are beta1,
        beta2, eps, weight_decay and grad_clip_norm. What is not given is the trainer's own, its schedule's rate too.
        """
        if constants and params is not None:
            raise InputError(f"params or constants must be given, not both, got {', '.join(constants)} too")
        known = [field.name for field in fields(AdamParams)]
        for name in constants:
            if name not in known:
                raise InputError(f"optim_step takes {', '.join(known)}, got {name!r}")
        return self.step_accumulated(overrides=AdamParams(**constants) if constants else params)

    def discard_accumulated(self) -> None:
        """Forget the accumulated micro-batches. The trainer stays the one of the adapters they were of."""

        def discard() -> None:
            is_bound = self._bound is not None
            self._accumulation.discard()
            self._bound_at = None if is_bound else self._progress()  # as many again are not none at all

        self._while_idle(discard)

    @property
    def accumulated(self) -> int:
        """Micro-batches waiting for `step_accumulated`."""
        return self._accumulation.count

    # ------------------------------------------------------------------ the average of the weights

    def ema_adapters(self, adapter: LoraAdapter | AdapterSet | None = None) -> LoraAdapter | AdapterSet:
        """Return new adapters that hold the average of the weights, to be served or saved.

        ``adapter`` is needed only where this trainer has none yet, as after `load_checkpoint`.
        """
        bound, adam, average = self._averaging("ema_adapters", adapter)
        copied: LoraAdapter | AdapterSet = adam.exclusively(lambda: bound.with_parameters(average))
        return copied

    def ema_weights(self, adapter: LoraAdapter | AdapterSet | None = None) -> AbstractContextManager[None]:
        """Let the adapters hold the average of the weights inside a ``with``, to evaluate them; no step begins there.

        ``adapter`` as for `ema_adapters`. Afterwards they hold their own weights again, to the bit, and whatever was
        written to them meanwhile is lost.
        """
        _, adam, average = self._averaging("ema_weights", adapter)
        lent: AbstractContextManager[None] = adam.lending(average)
        return lent

    def _averaging(
        self, what: str, adapter: LoraAdapter | AdapterSet | None
    ) -> tuple[LoraAdapter | AdapterSet, Adam, FloatArray]:
        adapter = self._adapters if adapter is None else adapter
        if adapter is None:
            raise StateError(f"{what} needs {UNBOUND}")
        adam = self._ready(adapter)
        if adam.ema is None:
            raise StateError(f"{what} needs ema_decay in the config, got None")
        return adapter, adam, adam.ema

    # ------------------------------------------------------------------ binding

    def _ready(self, adapter: LoraAdapter | AdapterSet | None) -> Adam:
        """Check that this adapter may be stepped now, bind to it if it is the first, and return its optimizer."""
        if self._calling_back:
            raise TrainerBusyError("this trainer is busy: on_step may read it, but not step it")
        if not isinstance(adapter, (LoraAdapter, AdapterSet)):
            raise InputError(f"adapter must be a LoraAdapter or an AdapterSet, got {type(adapter).__name__}")
        with self._in_line() if self._open is None else self._binding:
            if self._adam is None:
                self._bind(adapter)
            elif adapter is not self._adapters and self._bound is None:
                self._adam.exclusively(lambda: self._bind(adapter))
            if adapter is not self._adapters:
                first = f"the one of the first step, {self._adapters!r}"
                raise StateError(f"adapter must be {first}, got another, {adapter!r}")
            return self._adam  # type: ignore[return-value]

    @contextmanager
    def _in_line(self) -> Iterator[None]:
        """Take the lock for a step, and let the next hold see that one is waiting for it."""
        try:
            self._kept_waiting.append(None)
            with self._binding:
                self._open = self._adapters  # no hold is waiting under this lock, nor in a forked child
                yield
        finally:
            self._kept_waiting.clear()  # of others, too: who holds without a pause finds a step under way next

    def _bind(self, adapter: LoraAdapter | AdapterSet) -> None:
        self._check_fit(adapter)
        adam = self._optimizer(adapter, self._state(), self._watch)
        replaced, progress = self._adam, self._progress()
        self._adam, self._adapters, self._open = adam, adapter, adapter
        self._restored, self._bound_at = None, progress
        if replaced is not None:
            replaced.retire()

    def _check_fit(self, adapter: LoraAdapter | AdapterSet) -> None:
        check_layout(self._state(), adapter.flat.layout, self.config, f"{adapter!r}")

    @property
    def _binding(self) -> Any:
        """The lock of binding and of the state. Re-entrant: a signal handler may ask for the state under it."""
        if self._lock_process != os.getpid():  # forked: whoever held it may not exist in this process
            self._renew_lock()
        return self._lock

    def _renew_lock(self) -> None:
        """Have a lock of this process's own: the same for all threads that come here at once."""
        former, process = self._lock_process, os.getpid()
        if former != process:
            self._lock = self._renewed.setdefault((former, process), threading.RLock())
            self._kept_waiting = []
            self._lock_process = process  # last: who sees it finds the lock

    @property
    def _calling_back(self) -> bool:
        return self._adam is not None and self._adam.reporting

    def _progress(self) -> tuple[int, int]:
        return self.total_steps(), self.accumulated

    def bound_optimizer(self) -> Adam | None:
        """Return the optimizer of the adapters this trainer has for good, or None. One that was replaced refuses."""
        return None if self._bound is None else self._adam

    @property
    def _bound(self) -> LoraAdapter | AdapterSet | None:
        """The adapters for good; None also where every step of the first ones was refused."""
        return None if self._progress() == self._bound_at else self._adapters

    def _optimizer(self, adapter: LoraAdapter | AdapterSet, state: TrainerState, watch: Watch | None) -> Adam:
        adam = Adam.for_training(adapter.flat, self.config, state.adam, state.ema)
        adam.attach(self._rate, schedule.steady_from(self.config), TrainingStep, state.history)
        adam.attach_pending(*state.accumulation.buffers())
        adam.attach_report(self._report, self.config.log_every)
        if watch is not None:
            adam.attach_guard(watch.norm_limit, watch.refusal, self.config.divergence in ("skip", "rollback"))
        if self.config.divergence == "rollback":
            adam.keep_good(state.good, self.config.rollback_every)
        return adam

    def _vector_of(self, gradients: Any) -> Any:
        """Return the flat vector of a Gradients of the bound layout; anything else is for the kernel to judge."""
        if not isinstance(gradients, Gradients):
            return gradients
        layout = self._adapters.flat.layout  # type: ignore[union-attr]
        if gradients.layout is not layout and gradients.layout != layout:
            raise InputError(f"grad_a must be a Gradients made for {self._adapters!r}, got one of another layout")
        return gradients.vector

    def _while_idle(self, function: Callable[[], _Result], timeout: float | None = None) -> _Result:
        """Call ``function`` while no step is under way, and let none begin meanwhile.

        Other threads that do the same, and a step under way, are waited for up to ``timeout`` seconds together. With
        None the former are waited for as long as they take, the latter not at all.
        """
        seconds = 0.0 if timeout is None else timeout
        deadline, binding = time.monotonic() + seconds, self._binding
        while seconds > 0 and self._kept_waiting and time.monotonic() < deadline:
            time.sleep(PAUSE)  # holds without a pause would keep steps away

        def alone() -> _Result:
            adam = self._adam
            if adam is None:
                return function()
            if seconds > 0:
                # The next step then waits at the lock. A thread that steps without a pause holds the GIL between two
                # steps, so looking alone would never find a gap.
                self._open = None
            try:
                return _exclusively(adam, function, deadline)
            finally:
                self._open = self._adapters

        left = None if timeout is None else max(0.0, deadline - time.monotonic())
        return call_locked(binding, alone, left, "this trainer is busy: another thread held it all the time")

    # ------------------------------------------------------------------ what happened so far

    @property
    def training_history(self) -> TrainingHistory:
        """The records of all steps."""
        return self._history

    def current_lr(self) -> float:
        """Return the rate the next step will use."""
        rate, adam = self._rate(self.total_steps()), self._adam
        return check_rate(rate, max_rate(self.config, None)) if adam is None else adam.to_rate(rate)

    def total_steps(self) -> int:
        """Return the number of steps done, skipped ones included."""
        return self._history.total_steps

    def skipped_steps(self) -> int:
        """Return the number of steps that changed nothing: their gradient was not finite, or far above the usual."""
        return self._history.skipped_steps()

    def is_complete(self) -> bool:
        """Return whether ``config.max_steps`` steps are done, or the loss has run out of patience. More are allowed."""
        if self.total_steps() >= self.config.max_steps:
            return True
        stopping = None if self._watch is None else self._watch.stopping()
        return stopping is not None and stopping.is_over

    def early_stopping(self) -> EarlyStopping | None:
        """Return best loss, its step and whether it is time to stop, as of now; None without a patience."""
        return None if self._watch is None else self._watch.stopping()

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
        return self._while_idle(lambda: state_to_dict(self._state()))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned. On an error nothing has changed."""
        self._refuse_in_callback()

        def take_over() -> None:
            bound = self._bound
            self._take_over(state_from_dict(state, None if bound is None else bound.flat.vector.size))

        self._while_idle(take_over)

    def hold(
        self,
        adapters: LoraAdapter | AdapterSet,
        function: Callable[[TrainerState], _Result],
        *,
        timeout: float | None = None,
    ) -> _Result:
        """Return ``function(live state)``, called while no step is under way; none begins meanwhile.

        A step that another thread tries meanwhile waits or is a TrainerBusyError; a hold while one is under way, or
        another hold, is one, after ``timeout`` seconds of waiting for their end. With None it is one at once while a
        step is under way, and other holds are waited for as long as they take. ``adapters`` must be the trainer's, or
        such that it could become so: anything else is a StateError.
        """
        if timeout is not None:
            timeout = checks.real("timeout (if not None)", timeout, ">= 0", lambda x: x >= 0, InputError)

        def checked() -> _Result:
            if adapters is not self._adapters and self._bound is None:
                self._check_fit(adapters)
            elif adapters is not self._adapters:
                raise StateError(f"adapters must be the trainer's, {self._adapters!r}, got another, {adapters!r}")
            return function(self._state())

        return self._while_idle(checked, timeout)

    def is_held_here(self) -> bool:
        """Return whether this thread is inside a call of this trainer that keeps others waiting, such as `hold`."""
        return bool(self._binding._is_owned())

    def adopt(self, state: TrainerState) -> None:
        """Take over these parts themselves; nobody else may keep them. On an error nothing has changed."""
        self._refuse_in_callback()
        self._while_idle(lambda: self._take_over(state))

    def _refuse_in_callback(self) -> None:
        if self._calling_back:
            raise TrainerBusyError("this trainer is busy: on_step may read it, but not change it")

    def _state(self) -> TrainerState:
        watch = None if self._watch is None else self._watch.state()
        state = TrainerState(None, self._history, self._accumulation, watch=watch)
        if self._adam is not None and self._adam.t:  # else it is as the adapters make it
            adam = self._adam
            return state._replace(adam=adam.state(), ema=adam.ema, good=adam.good)
        if self._adam is None and self._restored is not None:
            restored = self._restored
            return state._replace(adam=restored.adam, ema=restored.ema, good=restored.good)
        return state

    def _take_over(self, state: TrainerState) -> None:
        check_config(state, self.config)
        adapters = self._bound
        if adapters is not None:
            check_layout(state, adapters.flat.layout, self.config, f"{adapters!r}")
        watch = Watch.for_training(self.config, state.history, state.watch)
        adam = None if adapters is None else self._optimizer(adapters, state, watch)
        restored, replaced, self._bound_at = state if adam is None else None, self._adam, None
        history, accumulation = state.history, state.accumulation
        # Nothing can interrupt from here on: CPython lets signals and threads in at calls and backward jumps only.
        self._history, self._accumulation, self._watch = history, accumulation, watch
        self._adam, self._adapters, self._restored = adam, adapters, restored
        if replaced is not None:
            replaced.retire()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a LoraTrainer is not copied or pickled: load its state_dict() into a new one")


def _exclusively(adam: Adam, function: Callable[[], _Result], deadline: float) -> _Result:
    """Call ``function`` between two steps, after waiting for the end of one that is under way."""
    is_begun = False

    def begin() -> _Result:
        nonlocal is_begun
        is_begun = True
        return function()

    while True:
        try:
            result: _Result = adam.exclusively(begin)
            return result
        except TrainerBusyError:
            if is_begun or time.monotonic() >= deadline:
                raise
        time.sleep(PAUSE)
