"""Training tasks: the protocol by which `cylora train` runs a task, and the one that is built in (`digits`)."""

from cylora.tasks.protocol import Task, TaskFactory

__all__ = ["Task", "TaskFactory"]
