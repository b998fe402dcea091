from collections.abc import Sequence
from typing import Any

from typing_extensions import disjoint_base

@disjoint_base
class KeptState:
    def __init__(self, live: Sequence[Any], copies: Sequence[Any], steps: Any, every: int) -> None: ...
