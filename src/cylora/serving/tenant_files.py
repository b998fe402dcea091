"""TenantFolder: one checkpoint file for each tenant in a folder that one process at a time writes to.

(a) A file is replaced as a whole and synced before `save` returns (`formats.durable`): who then drops the copy in
    memory loses nothing, whatever fails.
(b) The process that has the folder open holds the lock of ``store.lock`` in it. A forked child gives its share of that
    lock back, so that it ends with the process that opened the folder.
"""

import contextlib
import errno
import fcntl
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cylora import checks
from cylora.adapter import AdapterSet, LoraAdapter
from cylora.errors import FormatError, StateError
from cylora.formats.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cylora.formats.checkpoint_facts import read_facts
from cylora.formats.container import TensorFile
from cylora.formats.durable import remove_leftovers
from cylora.serving.tenant_names import file_name, tenant_of
from cylora.trainer import LoraTrainer

__all__ = ["TenantFolder"]

LOCK = "store.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some network file systems


class TenantFolder:
    """A folder with a file for each tenant that was written.

    Parameters
    ----------
    folder : path
        Made if it is not there; its parent is.

    Raises
    ------
    StateError   If it is open already, in this process or another one on this machine.
    OSError      As the system reports it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._descriptor: int | None = None
        self.path = Path(folder).absolute()
        self.path.mkdir(exist_ok=True)
        self._descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(self._descriptor, self.path)
            remove_leftovers(self.path, "tenant-")  # else each kill would take a file's space for ever
        except BaseException:
            self.close()
            raise
        OPEN.add(self)

    def tenants(self) -> list[str]:
        """Return whose files are there, sorted. Only their names are looked at."""
        return sorted(tenant for tenant in map(tenant_of, os.listdir(self.path)) if tenant is not None)

    def file(self, tenant: str) -> Path:
        """Return the path of a tenant's file, which may not be there yet."""
        return self.path / file_name(tenant)

    def save(
        self, tenant: str, trainer: LoraTrainer, adapters: LoraAdapter | AdapterSet, extra: Mapping[str, Any]
    ) -> None:
        """Write a tenant's file, atomically and durably, with ``extra`` in it; errors as for `save_checkpoint`."""
        save_checkpoint(trainer, adapters, self.file(tenant), extra={"tenant": tenant, **extra})

    def load(self, tenant: str, **changes: Any) -> Checkpoint:
        """Read a tenant's file; errors as for `load_checkpoint`, also a FormatError if it is another tenant's."""
        path = self.file(tenant)
        checkpoint = load_checkpoint(path, **changes)
        if checkpoint.extra.get("tenant") != tenant:
            got = repr(checkpoint.extra.get("tenant"))
            raise FormatError(f"{path}: the extra value 'tenant' must be {tenant!r}, as the name has it, got {got:.80}")
        checks.integer(f"{path}: the extra value 'version'", checkpoint.extra.get("version"), 0, error=FormatError)
        return checkpoint

    def lacks_schedule(self, tenant: str) -> bool:
        """Return whether a tenant was saved with a function as schedule, which no file holds; reads the header."""
        with TensorFile(self.file(tenant), leading_space=False) as file:
            return read_facts(file).training["schedule"] is None

    def remove(self, tenant: str) -> None:
        """Remove a tenant's file, durably, if there is one; OSError if it cannot be removed."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.file(tenant).unlink(missing_ok=True)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Let others open the folder. Closing twice is fine."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):  # not left to the close: a child forked just now has the descriptor too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def leave_to_parent(self) -> None:
        """Close this process's descriptor of the lock, which its parent goes on holding."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StateError(f"folder must be open in one store at a time, got {folder}, which another has open") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:  # else one process at a time is the caller's affair
            raise


OPEN: weakref.WeakSet[TenantFolder] = weakref.WeakSet()


def _in_child() -> None:
    for folder in list(OPEN):
        folder.leave_to_parent()


os.register_at_fork(after_in_child=_in_child)
