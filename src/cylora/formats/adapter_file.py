"""Save a set of adapters as one safetensors file: ``<name>.a_matrix`` and ``<name>.b_matrix``, float32.

The metadata has one key, ``cylora``, whose value is JSON: ``version`` and ``step``, and under ``adapters`` the
``rank``, ``alpha`` and ``use_rslora`` of each name. One key, because safetensors writes several in random order, and
equal adapters should make equal bytes.
"""

import json
import os

import numpy as np
from safetensors.numpy import save

from cylora import __version__
from cylora.adapter import AdapterSet
from cylora.errors import InputError
from cylora.formats.durable import replace_file

__all__ = ["save_adapters"]


def save_adapters(path: str | os.PathLike[str], adapters: AdapterSet, *, step: int) -> None:
    """Write ``adapters`` to the safetensors file ``path``, atomically.

    Parameters
    ----------
    path : the file to create or replace.
    adapters : read only. Every weight is finite, and there is at least one adapter.
    step : how many training steps these weights have seen.

    Raises
    ------
    InputError   If there is no adapter, or a weight is not finite. Nothing is written.
    OSError      If the file cannot be written. The old one, if any, is untouched.
    """
    if not len(adapters):
        raise InputError("adapters must hold at least one adapter, got none")
    tensors: dict[str, np.ndarray] = {}
    described: dict[str, dict[str, object]] = {}
    for name, adapter in adapters.items():
        for field, matrix in (("a_matrix", adapter.a_matrix), ("b_matrix", adapter.b_matrix)):
            finite = np.isfinite(matrix)
            if not finite.all():
                row, column = np.argwhere(~finite)[0]
                raise InputError(
                    f"{name}.{field} must be finite to be saved, got {matrix[row, column]} at [{row}, {column}]"
                )
            tensors[f"{name}.{field}"] = matrix
        config = adapter.config
        described[name] = {"rank": config.rank, "alpha": config.alpha, "use_rslora": config.use_rslora}
    facts = {"version": __version__, "step": step, "adapters": described}
    replace_file(path, save(tensors, metadata={"cylora": json.dumps(facts, sort_keys=True)}))
