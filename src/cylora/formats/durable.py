"""Put a file or a directory in place whole, or leave what was there: no reader and no power failure sees half of one.

Everything cylora writes goes through here.

(a) The bytes go to a new file (or a new directory of files) beside the target, since renaming works only within one
    file system; they are synced; one rename gives them the name; the parent directory is synced. Only then does the
    call return.
(b) The parent is opened first and every name is taken relative to it, so that after the rename nothing can fail but
    that last sync. Modes follow the umask. Symbolic links at the target are replaced, never followed.
(c) A sync that failed is not tried again: the kernel may already have dropped the pages and would report success.
(d) Publishers of one root take turns (an advisory lock of the root) from the look at what is there to the last removal;
    otherwise one could remove the version that another is about to point ``latest`` at. Readers need no lock.
(e) A version is published once ``latest`` points to it, to stay: what cannot be removed afterwards is a warning, since
    a caller who got an error would take the version for not published.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cylora import checks
from cylora.errors import InputError

__all__ = [
    "LATEST",
    "Content",
    "check_name",
    "content_digest",
    "create_directory",
    "directory_digest",
    "last_version",
    "publish_directory",
    "published",
    "remove_leftovers",
    "replace_file",
]

logger = logging.getLogger("cylora")

Content = bytes | Sequence[bytes | memoryview]  # a whole file, or its parts in their order

LATEST = "latest"
MAX_VERSION = 10**15
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PUBLISHED = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,99})@v(?P<version>[0-9]{1,16})-(?P<digest>[0-9a-f]{8})")
LEFTOVER = re.compile(r"\..*\.[0-9]+\.[0-9a-f]{16}\.tmp", re.DOTALL)  # as _temporary names them
# O_EXCL and O_NOFOLLOW: never write through something another process put there. 0o666 lets the umask decide.
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def replace_file(path: str | os.PathLike[str], content: Content) -> None:
    """Write ``content`` to ``path``, atomically and durably.

    Parameters
    ----------
    path : the file to create or replace; its directory exists.
    content : the whole of the file, or buffers that make it up in this order; read only.

    Raises
    ------
    OSError
        As the system reports it. The temporary file is gone and the old file, if any, is untouched; only if the very
        last call, the sync of the directory, fails is the new file in place, though perhaps not after a power failure.
    """
    target = Path(path)
    with _opened(target.parent) as parent:
        with _temporary(target.name, parent, _unlink) as temporary:
            _fill(os.open(temporary, NEW_FILE, 0o666, dir_fd=parent), content)
            os.replace(temporary, target.name, src_dir_fd=parent, dst_dir_fd=parent)
        os.fsync(parent)


def create_directory(path: str | os.PathLike[str], files: Mapping[str, Content]) -> None:
    """Make the directory ``path`` with these files in it, atomically and durably.

    Parameters
    ----------
    path : does not exist, or is an empty directory; its parent exists.
    files : name to content; no name has a directory in it.

    Raises
    ------
    FileExistsError   If there is something at ``path``.
    OSError           As the system reports it. Nothing of the new directory is left (but see `replace_file`).
    """
    target = Path(path).absolute()  # "." has no name of its own
    _check_names(files)
    with _opened(target.parent) as parent:
        with _temporary(target.name, parent, _remove_directory) as temporary:
            _fill_directory(temporary, files, parent)
            _rename_new(temporary, target.name, parent, str(target))
        os.fsync(parent)


def publish_directory(
    root: str | os.PathLike[str], name: str, version: int, files: Mapping[str, Content], *, keep: int | None = None
) -> Path:
    """Make ``root/<name>@v<version>-<hash>`` with these files in it, then point ``root/latest`` at it.

    The name carries version and content hash since servers cache by name and path. A published directory is never
    changed; publishing the same content as the same version again only repoints ``latest``.

    Parameters
    ----------
    root : an existing directory.
    name : letters, digits, ``.``, ``_`` and ``-``, beginning with a letter or digit, at most 100.
    version : int in 0..10^15, not yet published with other content.
    files : name to content; no name has a directory in it.
    keep : int >= 1, optional
        Afterwards remove all versions of this name but the ``keep`` published last, never the one ``latest`` points
        to. A reader that resolved ``latest`` earlier may still be reading: keep more than are published while a reader
        loads. What cannot be removed is a warning to the logger ``cylora``.

    Returns
    -------
    Path
        The published directory.

    Raises
    ------
    InputError   If an argument breaks its rule, or the version is published with other content.
    OSError      As the system reports it. ``latest`` points to the old version; only if the sync after that fails does
                 it point to the new one, though perhaps not after a power failure.
    """
    name = check_name(name)
    version = checks.integer("version", version, 0, MAX_VERSION, InputError)
    keep = None if keep is None else checks.integer("keep (if not None)", keep, 1, error=InputError)
    _check_names(files)
    folder = Path(root)
    is_published = False

    def put_in_place(temporary: str, final: str, parent: int) -> None:
        nonlocal is_published
        taken = [found for found, number in _versions(name, parent) if number == version]
        if not taken:
            _rename_new(temporary, final, parent, str(folder / final))
        elif taken != [final]:
            raise InputError(f"{name} must have one content as version {version}, got {folder / taken[0]}")
        os.utime(final, dir_fd=parent)  # so that _prune knows the order, whatever the versions are
        os.fsync(parent)  # the directory before the link to it
        _point(LATEST, final, parent)
        os.fsync(parent)
        is_published = True
        if keep is not None:
            _prune(name, keep, parent)
        if taken:
            _remove_directory(temporary, parent)

    try:
        with _opened(folder) as parent, _temporary(name, parent, _remove_directory) as temporary:
            final = f"{name}@v{version}-{_fill_directory(temporary, files, parent)[:8]}"
            _alone(parent, lambda: put_in_place(temporary, final, parent))
    except OSError as error:
        if not is_published:
            raise
        logger.warning("%s is published, but what it replaces could not be removed: %s", folder / final, error)
    return folder / final


def check_name(name: object) -> str:
    """Return a name that `publish_directory` takes; InputError if it is none."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(f"name must match {NAME.pattern}, got {name!r}")
    return name


def published(root: str | os.PathLike[str], name: str) -> list[Path]:
    """Return the published directories of ``name`` under ``root``, oldest first; OSError if it cannot be read."""
    folder = Path(root)
    with _opened(folder) as parent:
        return [folder / found for found, _ in _versions(name, parent)]


def last_version(root: str | os.PathLike[str], name: str) -> int:
    """Return the highest version of ``name`` published under ``root``, 0 if there is none; OSError as `published`."""
    with _opened(Path(root)) as parent:
        return max((number for _, number in _versions(name, parent)), default=0)


def directory_digest(digests: Mapping[str, bytes]) -> str:
    """Return the hash that a published directory is named by: of its files' names and their sha256, sorted by name."""
    whole = b"".join(os.fsencode(name) + b"\0" + digest for name, digest in sorted(digests.items()))
    return hashlib.sha256(whole).hexdigest()


def content_digest(files: Mapping[str, Content]) -> str:
    """Return the hash that a directory with these files would be published by."""
    digests = {}
    for name, content in files.items():
        digest = hashlib.sha256()
        for part in _parts(content):
            digest.update(part)
        digests[name] = digest.digest()
    return directory_digest(digests)


def remove_leftovers(folder: str | os.PathLike[str], prefix: str = "") -> None:
    """Remove what killed processes left half written in ``folder``, of files whose names begin with ``prefix``.

    For a folder into which nobody else writes such files now.
    """
    with _opened(Path(folder)) as parent:
        for name in os.listdir(parent):
            if LEFTOVER.fullmatch(name) and name.startswith(f".{prefix}"):
                if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                    _remove_directory(name, parent)
                else:
                    _unlink(name, parent)


# ------------------------------------------------------------------ parts


@contextlib.contextmanager
def _opened(directory: str | Path, parent: int | None = None) -> Iterator[int]:
    """Give a descriptor of a directory: the caller's path, which may be a link, or a name of ours in ``parent``."""
    descriptor = os.open(directory, DIRECTORY | (0 if parent is None else os.O_NOFOLLOW), dir_fd=parent)
    try:
        yield descriptor
    finally:
        with contextlib.suppress(OSError):  # nothing was written through it, so there is nothing to lose
            os.close(descriptor)


def _alone(parent: int, function: Callable[[], object]) -> None:
    """Call ``function`` while no other publisher of this directory does.

    With no context manager of Python code: one that is interrupted at the wrong moment unlocks only when nobody keeps
    the exception any more, and then by a descriptor that may be another file's.
    """
    is_locked = False
    try:
        try:
            fcntl.flock(parent, fcntl.LOCK_EX)
            is_locked = True
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise  # some network file systems have no locks: one publisher at a time is then its callers' affair
        function()
    finally:  # not left to the close: a child forked meanwhile has the descriptor too and would keep the lock
        if is_locked:
            fcntl.flock(parent, fcntl.LOCK_UN)


@contextlib.contextmanager
def _temporary(name: str, parent: int, remove: Callable[[str, int], None]) -> Iterator[str]:
    """Give a free name beside the target; if the body fails, remove what it made there.

    The body makes it, since Ctrl-C (KeyboardInterrupt) may come while the system is making it.
    """
    temporary = f".{name[:50]}.{os.getpid()}.{secrets.token_hex(8)}.tmp"  # 50 characters are at most 200 bytes of 255
    try:
        yield temporary
    except BaseException as error:
        is_foreign = isinstance(error, FileExistsError) and temporary in (error.filename, error.filename2)
        if not is_foreign:
            with contextlib.suppress(OSError):  # the first error is the one to report
                remove(temporary, parent)
        raise


def _fill(descriptor: int, content: Content, digest: Any = None) -> None:
    """Write every byte, sync, and close, whatever happens."""
    try:
        for part in _parts(content):
            rest = memoryview(part)
            rest = rest.cast("B") if rest.nbytes else rest[:0]  # bytes, or a short write would skip whole elements
            if digest is not None:
                digest.update(rest)
            while rest:  # os.write itself retries after EINTR (PEP 475) but may write less than it was given
                written = os.write(descriptor, rest)
                if written == 0:  # a system that takes nothing and reports no error would keep us here for ever
                    raise OSError(errno.EIO, "the system wrote 0 bytes and gave no reason")
                rest = rest[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parts(content: Content) -> Sequence[bytes | memoryview]:
    return (content,) if isinstance(content, bytes) else content


def _check_names(files: Mapping[str, Content]) -> None:
    for file in files:
        if file in ("", ".", "..") or "/" in file or "\0" in file:
            raise InputError(f"a file's name must be one without directories, got {file!r}")


def _fill_directory(name: str, files: Mapping[str, Content], parent: int) -> str:
    """Make a directory, synced with all its files; return the sha256 of its content."""
    os.mkdir(name, 0o777, dir_fd=parent)
    digests: dict[str, bytes] = {}
    with _opened(name, parent) as inside:
        for file, content in sorted(files.items()):
            own = hashlib.sha256()
            _fill(os.open(file, NEW_FILE, 0o666, dir_fd=inside), content, own)
            digests[file] = own.digest()
        os.fsync(inside)
    return directory_digest(digests)


def _rename_new(temporary: str, name: str, parent: int, shown: str) -> None:
    """Rename a directory to a name that is free (an empty directory may have it, which the rename replaces)."""
    try:
        os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), shown) from None
        raise


def _point(link: str, target: str, parent: int) -> None:
    with _temporary(link, parent, _unlink) as temporary:
        os.symlink(target, temporary, dir_fd=parent)
        os.replace(temporary, link, src_dir_fd=parent, dst_dir_fd=parent)


def _versions(name: str, parent: int) -> list[tuple[str, int]]:
    with os.scandir(parent) as entries:
        directories = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    matches = [match for match in map(PUBLISHED.fullmatch, directories) if match and match["name"] == name]
    return sorted(((match[0], int(match["version"])) for match in matches), key=lambda pair: pair[1])


def _prune(name: str, keep: int, parent: int) -> None:
    current = os.readlink(LATEST, dir_fd=parent)
    versions = sorted(_versions(name, parent), key=lambda pair: os.stat(pair[0], dir_fd=parent).st_mtime_ns)
    old = [found for found, _ in versions[:-keep] if found != current]
    with contextlib.ExitStack() as stack:
        doomed = [stack.enter_context(_temporary(found, parent, _remove_directory)) for found in old]
        for found, hidden in zip(old, doomed, strict=True):
            os.rename(found, hidden, src_dir_fd=parent, dst_dir_fd=parent)
        if doomed:  # or after a power failure one might be half removed under its published name
            os.fsync(parent)
        for hidden in doomed:
            _remove_directory(hidden, parent)


def _remove_directory(name: str, parent: int) -> None:
    with _opened(name, parent) as inside:
        for file in os.listdir(inside):
            _unlink(file, inside)
    os.rmdir(name, dir_fd=parent)


def _unlink(name: str, parent: int) -> None:
    os.unlink(name, dir_fd=parent)
