from typing import final

__pyx_capi__: dict[str, object]  # what dlpack.pxd declares, for cimport

@final
class Tensor: ...
