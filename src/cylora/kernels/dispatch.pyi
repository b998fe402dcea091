from typing import Final

__pyx_capi__: dict[str, object]  # what dispatch.pxd declares, for cimport

MODULES: Final[dict[str, str]]
isa: Final[str]
variants: Final[tuple[str, ...]]
