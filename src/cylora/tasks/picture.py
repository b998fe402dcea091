"""Draw a run: loss, learning rate, gradient norm and the task's measures over the steps."""

from cylora import plotting
from cylora.tasks.run import TrainingRun

__all__ = ["draw"]


def draw(run: TrainingRun, title: str, max_grad_norm: float) -> bytes:
    """Return a PNG of the run so far; ``max_grad_norm`` is drawn as the line above which gradients were clipped."""
    curves = run.history.curves(measures=run.measures, max_grad_norm=max_grad_norm)
    return plotting.png(plotting.draw([curves], title=title))
