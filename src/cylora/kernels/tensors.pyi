from collections.abc import Sequence
from typing import Any

from typing_extensions import disjoint_base

@disjoint_base
class PreparedTensors:
    @property
    def norm(self) -> float: ...
    @property
    def stepped(self) -> list[Any]: ...
    @property
    def nonfinite(self) -> tuple[int, int, float] | None: ...
    def __init__(
        self,
        exchange: Any,
        plain: Any,
        tensors: tuple[Any, ...],
        groups: tuple[int, ...],
        entries: tuple[dict[str, Any], ...],
        *,
        linked: Sequence[int] = (),
        threads: int = 1,
    ) -> None: ...
    def apply(
        self,
        lists: list[list[Any]],
        state: dict[Any, Any],
        rules: list[tuple[float, float, float, float, float, bool]],
        max_norm: float,
        norm_limit: float,
    ) -> bool | None: ...
