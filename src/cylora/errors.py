"""The exceptions cylora raises. Each is a CyloraError and also the built-in type a caller would expect."""

__all__ = [
    "ConfigError",
    "CyloraError",
    "DeadlineError",
    "DivergenceError",
    "DroppedError",
    "FormatError",
    "InputError",
    "NonFiniteGradientError",
    "PublishError",
    "StateError",
    "StoreError",
    "TaskError",
    "TrainerBusyError",
]


class CyloraError(Exception):
    """Base of every exception that cylora raises on purpose."""


class ConfigError(CyloraError, ValueError):
    """A field of a configuration breaks its rule."""


class InputError(CyloraError, ValueError):
    """An argument handed to a call (an array, a loss, a weight) breaks its rule. Nothing was written."""


class NonFiniteGradientError(InputError):
    """A gradient is NaN, infinite, or too large for its square to fit float32. Nothing was written.

    The message may come as a function that makes it. A loop that catches these errors and goes on never reads them, and
    making one takes several times as long as a small step.
    """

    def __str__(self) -> str:
        message = self.args[0] if len(self.args) == 1 else None
        return str(message()) if callable(message) else super().__str__()


class DivergenceError(InputError):
    """A loss or gradient norm is far above what it was lately. Nothing was written."""


class TrainerBusyError(CyloraError, RuntimeError):
    """The trainer is inside a step: another thread's, or the one whose callback made this call."""


class StateError(CyloraError, ValueError):
    """A state does not fit: another adapter than the bound one, or a state dict with wrong content."""


class PublishError(CyloraError, RuntimeError):
    """A snapshot was refused, by the publisher or by a server that was to load it. What was published before stays."""


class StoreError(CyloraError, RuntimeError):
    """A store has no room for a tenant, or could not write what it has. Nothing that was learned is lost."""


class DeadlineError(CyloraError, TimeoutError):
    """What was waited for did not happen in the time given: room in a queue, the end of what was submitted."""


class DroppedError(CyloraError, RuntimeError):
    """A submitted job was given up before its step began: for a newer one, or because its trainer closed."""


class FormatError(CyloraError, ValueError):
    """A file or text does not parse; the message names the place, the key and the rule."""


class TaskError(CyloraError, ValueError):
    """A training task breaks the task protocol."""
