__pyx_capi__: dict[str, object]  # what task.pxd declares, for cimport
