from typing import Final

MODULES: Final[dict[str, str]]
isa: Final[str]
variants: Final[tuple[str, ...]]
