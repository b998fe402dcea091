"""Put a whole file in place, or leave what was there: no reader and no power failure ever sees half of one."""

import errno
import os
import secrets
from pathlib import Path

__all__ = ["replace_file"]


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path``, atomically and durably.

    The bytes go to a new file in the same directory (renaming works only within one file system), are synced, and
    take the name by one rename, which is synced in turn. The mode follows the umask. A symbolic link at ``path`` is
    replaced, not followed.

    Parameters
    ----------
    path : the file to create or replace; its directory exists.
    content : the whole of the file.

    Raises
    ------
    OSError
        As the system reports it. The temporary file is gone and the old file, if any, is untouched; only if the very
        last call, the sync of the directory, fails is the new file in place, though perhaps not after a power failure.
        A failed sync is never tried again: the kernel may already have dropped the pages and would report success.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
    # O_EXCL and O_NOFOLLOW: never write through something another process put there. 0o666 lets the umask decide.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o666)
    try:
        try:
            _write_all(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
    except BaseException:  # KeyboardInterrupt too: a second Ctrl-C must not leave litter behind
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def _write_all(descriptor: int, content: bytes) -> None:
    """Write every byte; ``os.write`` itself retries after EINTR (PEP 475) but may write less than it was given."""
    rest = memoryview(content)
    while rest:
        written = os.write(descriptor, rest)
        if written == 0:  # a system that takes nothing and reports no error would keep us here for ever
            raise OSError(errno.EIO, "the system wrote 0 bytes and gave no reason")
        rest = rest[written:]


def _sync_directory(directory: Path) -> None:
    """Make a rename in ``directory`` survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
