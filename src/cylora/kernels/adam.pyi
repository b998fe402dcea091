from collections.abc import Callable
from typing import Any

from typing_extensions import disjoint_base

@disjoint_base
class PreparedAdam:
    @property
    def t(self) -> int: ...
    @property
    def busy(self) -> bool: ...
    @property
    def nonfinite_index(self) -> int: ...
    @property
    def nonfinite_value(self) -> float: ...
    def __init__(
        self,
        parameters: Any,
        m: Any,
        v: Any,
        *,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        l2: bool,
        max_grad_norm: float,
        norm_limit: float,
        t: int = 0,
        shape_a: tuple[int, int] = (-1, -1),
        shape_b: tuple[int, int] = (-1, -1),
    ) -> None: ...
    def attach(
        self, schedule: Callable[[int], float], steady_from: int | None, record_type: type, history: Any
    ) -> None: ...
    def attach_pending(self, sums: Any, pending: Any) -> None: ...
    def exclusively(self, function: Callable[[], Any]) -> Any: ...
    def retire(self) -> None: ...
    def apply(self, gradient: Any, rate: float) -> float: ...
    def run_step(self, loss: Any, grad_a: Any, grad_b: Any, accumulated: bool = False) -> Any: ...
    def accumulate(self, total: Any, loss: Any, grad_a: Any, grad_b: Any, weight: float) -> None: ...
