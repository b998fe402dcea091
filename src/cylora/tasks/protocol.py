"""The task protocol: what `cylora train` needs from a task, and every check of what it gets.

A task is what the user knows and cylora does not: the frozen model, the data and the loss. This is a whole one, a
frozen linear map that is to become another::

    import numpy as np
    from cylora import AdapterSet

    class Nudge:
        def __init__(self, lora_config, seed):
            rng = np.random.default_rng(seed)
            self.x = rng.standard_normal((256, 16), dtype=np.float32)
            self.base = rng.standard_normal((4, 16), dtype=np.float32)
            self.wanted = self.x @ (self.base + rng.standard_normal((4, 16), dtype=np.float32)).T
            self.adapters = AdapterSet({"linear": (16, 4)}, lora_config, seed=seed)

        def loss_and_gradients(self, step, gradients):
            adapter = self.adapters["linear"]
            error = self.x @ self.base.T + adapter.apply(self.x) - self.wanted
            adapter.gradients(self.x, error / len(self.x), out=gradients["linear"])
            return 0.5 * float((error**2).sum(axis=1).mean())

Saved as nudge.py, it runs with ``cylora train --task nudge:Nudge --learning-rate 0.01``.
"""

import importlib
import inspect
import math
import numbers
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from cylora.adapter import AdapterSet, Gradients
from cylora.config import LoraConfig
from cylora.errors import ConfigError, CyloraError, TaskError

__all__ = ["BUILTIN_TASKS", "CheckedTask", "RunFailure", "Task", "TaskFactory", "load_factory", "training_defaults"]

BUILTIN_TASKS = {"digits": "cylora.tasks.digits:DigitsTask"}

# Where a traceback is not in the user's code: this package, installed libraries, the standard library.
_NOT_THE_USERS = (str(Path(__file__).parent.parent), *map(sysconfig.get_path, ("purelib", "platlib", "stdlib")))
_Result = TypeVar("_Result")


class Task(Protocol):
    """What a factory returns.

    Two more attributes are used where a task has them.

    ``evaluate() -> Mapping[str, float]``
        Named measures of the present adapters, on data that is not trained on. The same names at every call, none of
        them ``step``.
    ``total_parameters : int``
        The parameters of the whole model, frozen ones and adapters together.
    """

    @property
    def adapters(self) -> AdapterSet:
        """The adapters to train, the same object at every access."""
        ...

    def loss_and_gradients(self, step: int, gradients: Gradients) -> float:
        """Write dL/dA and dL/dB of every adapter into ``gradients``, which arrives zeroed, and return the loss L.

        ``step`` counts from 0. A task that draws its batch from (seed, step) alone can be resumed at any step.
        """
        ...


class TaskFactory(Protocol):
    """What ``--task module:factory`` names: a class or a function. It raises ConfigError for a config it cannot use.

    An attribute ``training_defaults``, where it has one, maps fields of LoraTrainingConfig to this task's defaults
    (``lora_config`` to a mapping of LoraConfig's fields); the user's file and options go before them.
    """

    def __call__(self, lora_config: LoraConfig, seed: int) -> Task:
        """Make the task; equal arguments make equal tasks."""
        ...


class RunFailure(CyloraError, RuntimeError):
    """The run cannot go on although its inputs are right: the task's own code raised, say. ``__cause__`` says what."""


def load_factory(name: str) -> TaskFactory:
    """Find a task factory by the name of a built-in task or by ``module:factory``.

    Raises
    ------
    TaskError   If the name does not parse, the module cannot be imported, or it has no such callable.
    """
    module_name, colon, attribute = BUILTIN_TASKS.get(name, name).partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise TaskError(f"task must be {', '.join(map(repr, BUILTIN_TASKS))} or 'module:factory', got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise TaskError(f"task {name!r}: module {module_name!r} cannot be imported: {_describe(error)}") from error
    factory = getattr(module, attribute, None)
    if factory is None:
        raise TaskError(f"task {name!r}: module {module_name!r} has no {attribute!r}")
    if not callable(factory):
        raise TaskError(f"task {name!r}: {attribute!r} must be callable, got {type(factory).__name__}")
    return cast(TaskFactory, factory)


def training_defaults(name: str, factory: TaskFactory) -> dict[str, Any]:
    """Return the factory's own defaults for fields of LoraTrainingConfig; none where it has no such attribute."""
    defaults = getattr(factory, "training_defaults", {})
    for label, value in (("training_defaults", defaults), ("training_defaults['lora_config']", _nested(defaults))):
        if not isinstance(value, Mapping):
            raise TaskError(f"task {name!r}: {label} must be a mapping, got {type(value).__name__}")
    return dict(defaults)


class CheckedTask:
    """A task whose every answer is checked before anything believes it.

    Parameters
    ----------
    name : how messages call the task.
    factory, lora_config, seed : ``factory(lora_config, seed)`` makes the task.

    Raises
    ------
    ConfigError    As the factory raises it.
    TaskError      If what it returns breaks the protocol.
    RunFailure     If it raises anything else.
    """

    def __init__(self, name: str, factory: TaskFactory, lora_config: LoraConfig, seed: int) -> None:
        self.name = name
        try:
            inspect.signature(factory).bind(lora_config, seed)
        except ValueError:  # a built-in that does not tell
            pass
        except TypeError as error:
            raise self._broken("the factory must take (lora_config, seed)", str(error)) from None
        task = self._call("the factory", factory, lora_config, seed)
        self._task = task
        adapters = self._call("adapters", getattr, task, "adapters", None)
        if not isinstance(adapters, AdapterSet):
            raise self._broken("adapters must be an AdapterSet", type(adapters).__name__)
        self.adapters: AdapterSet = adapters
        self._loss = self._call("loss_and_gradients", getattr, task, "loss_and_gradients", None)
        if not callable(self._loss):
            raise self._broken("loss_and_gradients must be a method", type(self._loss).__name__)
        self._evaluate = self._call("evaluate", getattr, task, "evaluate", None)
        if self._evaluate is not None and not callable(self._evaluate):
            raise self._broken("evaluate must be a method", type(self._evaluate).__name__)
        self.total_parameters: int | None = self._call("total_parameters", getattr, task, "total_parameters", None)
        self._check_total()
        self._measures: list[str] | None = None

    @property
    def can_evaluate(self) -> bool:
        """True if the task has an ``evaluate``."""
        return self._evaluate is not None

    def loss_and_gradients(self, step: int, gradients: Gradients) -> float:
        """Let the task fill ``gradients`` (zeroed first) and return its loss, a real number, finite or not."""
        gradients.zero_()
        loss = self._call(f"loss_and_gradients at step {step}", self._loss, step, gradients)
        if getattr(self._task, "adapters", None) is not self.adapters:
            raise self._broken("adapters must be the same object at every access", f"another after step {step}")
        number = _real(loss)
        if number is None:
            raise self._broken(f"loss_and_gradients must return a number at step {step}", repr(loss))
        return number

    def evaluate(self) -> dict[str, float]:
        """Return the task's measures; empty for a task without ``evaluate``."""
        if self._evaluate is None:
            return {}
        measures = self._call("evaluate", self._evaluate)
        if not isinstance(measures, Mapping):
            raise self._broken("evaluate must return a mapping of names to numbers", type(measures).__name__)
        checked: dict[str, float] = {}
        for key, value in measures.items():
            if not isinstance(key, str) or not key.isprintable() or not key:
                raise self._broken("evaluate must name its measures by printable strings", repr(key))
            if key == "step":
                raise self._broken("evaluate must not name a measure like the count of steps beside it", repr(key))
            number = _real(value)
            if number is None or not math.isfinite(number):
                raise self._broken(f"evaluate must return finite numbers, {key!r} too", repr(value))
            checked[key] = number
        if self._measures is None:
            self._measures = list(checked)
        if self._measures != list(checked):
            raise self._broken(f"evaluate must always return the measures {self._measures}", str(list(checked)))
        return checked

    def _check_total(self) -> None:
        total, trainable = self.total_parameters, self.adapters.param_count()
        if total is None:
            return
        if not isinstance(total, numbers.Integral) or isinstance(total, bool):
            raise self._broken("total_parameters must be an integer", repr(total))
        if total < trainable:
            raise self._broken(f"total_parameters must count the {trainable} of the adapters too", repr(total))

    def _call(self, what: str, function: Callable[..., _Result], *arguments: object) -> _Result:
        try:
            return function(*arguments)
        except (ConfigError, TaskError):
            raise
        except (Exception, SystemExit) as error:
            raise RunFailure(f"task {self.name!r} failed in {what}: {_describe(error)}") from error

    def _broken(self, rule: str, got: str) -> TaskError:
        return TaskError(f"task {self.name!r}: {rule}, got {got}")


def _nested(defaults: object) -> object:
    return defaults.get("lora_config", {}) if isinstance(defaults, Mapping) else {}


def _real(value: object) -> float | None:
    """Return ``value`` as a float if it is a real number that has one; True and False are not numbers here."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _describe(error: BaseException) -> str:
    """Name an exception, the first line of its text, and the innermost line of the user's own code on its way."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    text = str(error).strip().splitlines()
    summary = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    places = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_THE_USERS) and Path(frame.filename).exists()
    ]
    return f"{summary} ({places[-1][0]}:{places[-1][1]})" if places else summary
