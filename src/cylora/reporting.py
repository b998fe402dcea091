"""How a step is reported: to the logger ``cylora``, and to whoever asked."""

import logging
from collections.abc import Callable

from cylora.history import TrainingStep

__all__ = ["reporter"]

logger = logging.getLogger("cylora")


def reporter(on_step: Callable[[TrainingStep], object] | None) -> Callable[[TrainingStep], None]:
    """Return the function that reports a step. It knows no trainer: a cycle would free that one's memory late."""
    if on_step is None:
        return _log

    def report(record: TrainingStep) -> None:
        _log(record)
        on_step(record)

    return report


def _log(record: TrainingStep) -> None:
    if logger.isEnabledFor(logging.INFO):  # asked first: taking the record apart costs more than a small step
        logger.info(
            "step %d: loss %.6g, learning rate %.3g, gradient norm %.4g%s",
            *record[:4],
            ", skipped" if record.skipped else "",
        )
