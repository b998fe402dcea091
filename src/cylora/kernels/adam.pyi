from collections.abc import Callable, Sequence
from typing import Any

from typing_extensions import disjoint_base

def _count_fork() -> None: ...
@disjoint_base
class PreparedAdam:
    @property
    def t(self) -> int: ...
    @property
    def busy(self) -> bool: ...
    @property
    def reporting(self) -> bool: ...
    @property
    def nonfinite_index(self) -> int: ...
    @property
    def nonfinite_value(self) -> float: ...
    def __init__(
        self,
        parameters: Any,
        moments: tuple[int, Any, Any, Any, Any],
        *,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        l2: bool,
        max_grad_norm: float,
        norm_limit: float,
        max_rate: float = 1e6,
        t: int = 0,
        threads: int = 1,
        skips: bool = False,
        shape_a: tuple[int, int] = (-1, -1),
        shape_b: tuple[int, int] = (-1, -1),
        parts: Sequence[tuple[int, int, float, float]] | None = None,
        average: Any = None,
        average_weight: float = 0.0,
    ) -> None: ...
    def attach(
        self, schedule: Callable[[int], float], steady_from: int | None, record_type: type, history: Any
    ) -> None: ...
    def attach_report(self, report: Callable[[Any], object], every: int) -> None: ...
    def attach_pending(self, sums: Any, pending: Any) -> None: ...
    def exclusively(self, function: Callable[[], Any]) -> Any: ...
    def retire(self) -> None: ...
    def apply(self, gradient: Any, rate: float) -> float: ...
    def run_step(self, loss: Any, grad_a: Any, grad_b: Any, accumulated: bool = False) -> Any: ...
    def accumulate(self, total: Any, loss: Any, grad_a: Any, grad_b: Any, weight: float) -> None: ...
