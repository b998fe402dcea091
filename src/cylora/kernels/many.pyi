from collections.abc import Callable, Iterable
from typing import Any

def step_many(jobs: Iterable[Any], prepared: Callable[..., tuple[Any, ...]], threads: int) -> list[Any]: ...
