"""AdapterSnapshot: adapters as they were at one step, which nobody can change."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import NoReturn, Self

from cylora.adapter import AdapterSet, LoraAdapter
from cylora.errors import InputError
from cylora.flat import FloatArray

__all__ = ["AdapterSnapshot"]


@dataclass(frozen=True, eq=False)
class AdapterSnapshot:
    """Adapters as they were at one step: read-only, whole, and the same for as long as anybody keeps them.

    `AdapterPublisher.publish` makes them. They are safe to use from any thread. What is taken from them (an array, a
    view, a tensor of torch over one) stays what it is, too.

    Parameters
    ----------
    version : int
        1 for a publisher's first; each later one has a higher number.
    step : int or None
        Steps that the trainer had done, skipped ones included; None without a trainer.
    adapters : LoraAdapter or AdapterSet
        Over read-only memory: they can be applied, exported and copied (``adapters.with_parameters(snapshot.vector)``,
        to train from there), not stepped or written to.
    norm : float
        L2 norm of all parameters.
    restored_from : int or None
        The version that a rollback published again as this one.

    Raises
    ------
    InputError
        If the adapters' memory is writable.
    """

    version: int
    step: int | None
    adapters: LoraAdapter | AdapterSet
    norm: float
    restored_from: int | None = None
    _content_hash: str | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if self.adapters.flat.vector.flags.writeable:
            raise InputError(f"adapters must be over read-only memory, got {self.adapters!r} over writable")

    @property
    def vector(self) -> FloatArray:
        """All parameters in the adapters' order, float32 (parameters,), read-only, 64-byte aligned."""
        return self.adapters.flat.vector

    @property
    def content_hash(self) -> str:
        """The sha256, in hexadecimal digits, of layout, configs and the bytes of the parameters.

        Versions of the same content have the same. It is computed when first asked for, since that takes some 25 times
        as long as the copy (2.3 ms for a million parameters, without the GIL).
        """
        if self._content_hash is None:  # two threads may both compute it: to the same result
            digest = hashlib.sha256(_description(self.adapters).encode())
            digest.update(self.vector.data)
            object.__setattr__(self, "_content_hash", digest.hexdigest())
        return self._content_hash  # type: ignore[return-value]

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("an AdapterSnapshot is not pickled: send its adapters, which arrive as a trainable copy")


def _description(adapters: LoraAdapter | AdapterSet) -> str:
    """Return a line for each adapter: its name, sizes and config, as JSON."""
    members = adapters.items() if isinstance(adapters, AdapterSet) else [(None, adapters)]
    configs: dict[int, str] = {}  # by identity: the adapters of a set mostly share one, which takes 15 us
    lines = []
    for name, one in members:
        if id(one.config) not in configs:
            configs[id(one.config)] = json.dumps(one.config.to_dict())
        lines.append(f"[{json.dumps(name)}, {one.d_in}, {one.d_out}, {configs[id(one.config)]}]\n")
    return "".join(lines)
