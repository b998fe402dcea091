"""replace_file, create_directory: the whole new one or the whole old one, and never any litter."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cylora.errors import InputError
from cylora.formats import durable
from cylora.formats.durable import create_directory, publish_directory, remove_leftovers, replace_file

FILES = {"b.bin": b"second" * 10, "a.json": b"first"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def kind(descriptor: int) -> str:
    return "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"


# ------------------------------------------------------------------ one file


@pytest.mark.parametrize("content", [b"", b"x", b"long " * 100_000], ids=["empty", "one byte", "500 kB"])
def test_replace_file_writes_the_content_and_nothing_beside_it(tmp_path: Path, content: bytes) -> None:
    for _ in range(2):  # a new file, then one that is there
        replace_file(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
        assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("step", [None, 3, 5], ids=["whole", "3 bytes", "5 bytes"])
def test_replace_file_joins_buffers_of_every_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int | None
) -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    parts = [b"head", memoryview(b"--tail")[2:], memoryview(matrix), b"", memoryview(np.zeros((0, 3), np.float32))]
    write = os.write
    if step is not None:  # a short write inside a float32 must go on from that byte
        monkeypatch.setattr(durable.os, "write", lambda descriptor, content: write(descriptor, content[:step]))
    replace_file(tmp_path / "file", [*parts, memoryview(matrix.reshape(-1)), b"end"])
    assert (tmp_path / "file").read_bytes() == b"headtail" + 2 * matrix.tobytes() + b"end"


def test_replace_file_takes_a_str_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    replace_file("file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["x" * 255, "\N{SNOWMAN}" * 85, "\N{GRINNING FACE}" * 63])
def test_a_name_as_long_as_the_system_allows_is_taken(tmp_path: Path, name: str) -> None:
    replace_file(tmp_path / name, b"new")
    assert contents(tmp_path) == {name: b"new"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000, 0o027])
def test_mode_follows_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        replace_file(tmp_path / "file", b"new")
        create_directory(tmp_path / "folder", FILES)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((tmp_path / "folder" / "a.json").stat().st_mode) == 0o666 & ~umask


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".file.1.0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / ".a\nfolder.22.0123456789abcdef.tmp").mkdir()
    (tmp_path / ".a\nfolder.22.0123456789abcdef.tmp" / "inside").write_bytes(b"half")
    (tmp_path / ".link.3.0123456789abcdef.tmp").symlink_to("file")
    kept = ["file", ".f.tmp", ".f.1.0123456789abcde.tmp", "f.1.0123456789abcdef.tmp", ".f.1.0123456789ABCDEF.tmp"]
    for name in kept:
        (tmp_path / name).write_bytes(b"whole")
    remove_leftovers(tmp_path, "other")
    assert len(names(tmp_path)) == len(kept) + 3
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(kept)
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    replace_file(tmp_path / "link", b"new")
    assert (tmp_path / "elsewhere").read_bytes() == b"old"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_bytes() == b"new"


def test_a_linked_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    replace_file(tmp_path / "link" / "file", b"new")
    assert contents(tmp_path / "real") == {"file": b"new"}


def test_a_folder_at_the_target_is_the_systems_error(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"]


def test_a_missing_folder_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "none" / "file", b"new")
    assert names(tmp_path) == []


def test_the_folder_may_be_moved_while_the_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    fsync = os.fsync

    def move_then_sync(descriptor: int) -> None:
        if kind(descriptor) == "file":
            (tmp_path / "folder").rename(tmp_path / "moved")
        fsync(descriptor)

    monkeypatch.setattr(durable.os, "fsync", move_then_sync)
    replace_file(tmp_path / "folder" / "file", b"new")
    assert contents(tmp_path / "moved") == {"file": b"new"}


def test_a_write_of_nothing_is_an_error_not_an_endless_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = iter([0] * 10)
    monkeypatch.setattr(durable.os, "write", lambda descriptor, content: next(nothing))
    with pytest.raises(OSError, match="the system wrote 0 bytes and gave no reason"):
        replace_file(tmp_path / "file", b"new")
    assert names(tmp_path) == []


def test_a_buffer_with_gaps_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="C-contiguous"):
        replace_file(tmp_path / "file", [b"head", memoryview(np.zeros((4, 4), np.float32)[:, ::2])])
    assert names(tmp_path) == []


# ------------------------------------------------------------------ one directory


@pytest.mark.parametrize("is_there", [False, True], ids=["free", "an empty directory"])
def test_create_directory_writes_the_files_and_nothing_beside_them(tmp_path: Path, is_there: bool) -> None:
    if is_there:
        (tmp_path / "folder").mkdir()
    create_directory(tmp_path / "folder", FILES)
    assert contents(tmp_path / "folder") == FILES
    assert names(tmp_path) == ["folder"]


def test_create_directory_takes_a_str_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create_directory("folder/", {"file": [b"in ", memoryview(b"parts")]})
    assert contents(tmp_path / "folder") == {"file": b"in parts"}


@pytest.mark.parametrize("there", ["file", "full directory", "link to a directory", "dangling link"])
def test_create_directory_refuses_what_is_there(tmp_path: Path, there: str) -> None:
    target = tmp_path / "folder"
    (tmp_path / "other").mkdir()
    if there == "file":
        target.write_bytes(b"old")
    elif there == "full directory":
        target.mkdir()
        (target / "old").write_bytes(b"old")
    else:
        target.symlink_to("other" if there == "link to a directory" else "nowhere")
    with pytest.raises(FileExistsError) as caught:
        create_directory(target, FILES)
    assert caught.value.filename == str(target)
    assert caught.value.errno == errno.EEXIST
    assert names(tmp_path) == ["folder", "other"]
    assert names(tmp_path / "other") == []
    if there == "file":
        assert target.read_bytes() == b"old"
    elif there == "full directory":
        assert contents(target) == {"old": b"old"}
    else:
        assert target.is_symlink()


@pytest.mark.parametrize("file", ["", ".", "..", "/", "a/b", "../a", "/etc/a", "a/", "a\0b"])
def test_a_files_name_is_one_name(tmp_path: Path, file: str) -> None:
    for act in (
        lambda: create_directory(tmp_path / "folder", {"good": b"", file: b""}),
        lambda: publish_directory(tmp_path, "a", 1, {"good": b"", file: b""}),
    ):
        with pytest.raises(InputError, match="a file's name must be one without directories, got ") as caught:
            act()
        assert repr(file) in str(caught.value)
        assert names(tmp_path) == []


def test_a_name_that_cannot_be_encoded_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        create_directory(tmp_path / "folder", {"good": b"x", "\ud800": b""})
    assert names(tmp_path) == []


# ------------------------------------------------------------------ the order of things


def test_everything_is_synced_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def recorded_fsync(descriptor: int) -> None:
        calls.append(f"sync {kind(descriptor)}")
        fsync(descriptor)

    def recorded(real: Callable[..., None]) -> Callable[..., None]:
        def act(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
            assert src_dir_fd == dst_dir_fd
            assert "/" not in source + target
            calls.append("rename")
            real(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

        return act

    monkeypatch.setattr(durable.os, "fsync", recorded_fsync)
    monkeypatch.setattr(durable.os, "replace", recorded(replace))
    monkeypatch.setattr(durable.os, "rename", recorded(rename))
    replace_file(tmp_path / "file", b"new")
    assert calls == ["sync file", "rename", "sync folder"]
    calls.clear()
    create_directory(tmp_path / "folder", FILES)
    assert calls == ["sync file", "sync file", "sync folder", "rename", "sync folder"]


# ------------------------------------------------------------------ what fails


ERRORS = [
    pytest.param(lambda: OSError(errno.ENOSPC, "No space left on device"), id="ENOSPC"),
    pytest.param(lambda: OSError(errno.EIO, "Input/output error"), id="EIO"),
    pytest.param(KeyboardInterrupt, id="Ctrl-C"),
]
# The calls in their order (the first opens the parent) up to the last rename.
FILE_CALLS = ["open", "open", "write", "fsync", "close", "replace"]
DIRECTORY_CALLS = ["open", "mkdir", "open", *2 * ["open", "write", "fsync", "close"], "fsync", "close", "rename"]
CLOSE_OF_THE_FOLDER = len(DIRECTORY_CALLS) - 2  # nothing was written through it: its error is passed over


class Faults:
    """Fail the n-th of the recorded calls, before or after the system has carried it out; record the calls' names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, when: int, *, is_done: bool):
        self.calls: list[str] = []
        for call in ("open", "mkdir", "write", "fsync", "close", "replace", "rename", "symlink", "rmdir", "unlink"):
            monkeypatch.setattr(durable.os, call, self._counted(call, getattr(os, call), error, when, is_done))

    def _counted(
        self, call: str, real: Callable[..., object], error: BaseException | None, when: int, is_done: bool
    ) -> Callable[..., object]:
        def act(*arguments: object, **named: object) -> object:
            self.calls.append(call)
            if len(self.calls) - 1 != when or error is None:
                return real(*arguments, **named)
            if call == "close" or is_done:
                result = real(*arguments, **named)
                if call == "open":
                    real_close(result)  # type: ignore[arg-type]
            raise error

        real_close = os.close
        return act


def cases(calls: list[str]) -> list[object]:
    return [pytest.param(when, id=f"{when} {call}") for when, call in enumerate(calls)]


def test_the_calls_listed_are_the_calls_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        faults = Faults(patched, None, 0, is_done=False)
        replace_file(tmp_path / "file", b"new")
    assert faults.calls == [*FILE_CALLS, "fsync", "close"]
    with monkeypatch.context() as patched:
        faults = Faults(patched, None, 0, is_done=False)
        create_directory(tmp_path / "folder", FILES)
    assert faults.calls == [*DIRECTORY_CALLS, "fsync", "close"]


@pytest.mark.parametrize("is_done", [False, True], ids=["instead", "after"])
@pytest.mark.parametrize("make_error", ERRORS)
@pytest.mark.parametrize("when", cases(FILE_CALLS))
def test_a_failed_call_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int, make_error: Callable[[], BaseException], is_done: bool
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    error = make_error()
    descriptors = open_descriptors()
    with monkeypatch.context() as patched:
        Faults(patched, error, when, is_done=is_done)
        with pytest.raises(type(error)) as caught:
            replace_file(tmp_path / "file", b"new")
    assert caught.value is error
    is_replaced = is_done and FILE_CALLS[when] == "replace"
    assert contents(tmp_path) == {"file": b"new" if is_replaced else b"old"}
    assert open_descriptors() == descriptors
    replace_file(tmp_path / "file", b"next")
    assert contents(tmp_path) == {"file": b"next"}


@pytest.mark.parametrize("is_done", [False, True], ids=["instead", "after"])
@pytest.mark.parametrize("make_error", ERRORS)
@pytest.mark.parametrize("when", [case for case in cases(DIRECTORY_CALLS) if case.values != (CLOSE_OF_THE_FOLDER,)])
def test_a_failed_call_leaves_nothing_of_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int, make_error: Callable[[], BaseException], is_done: bool
) -> None:
    error = make_error()
    descriptors = open_descriptors()
    with monkeypatch.context() as patched:
        Faults(patched, error, when, is_done=is_done)
        with pytest.raises(type(error)) as caught:
            create_directory(tmp_path / "folder", FILES)
    assert caught.value is error
    assert open_descriptors() == descriptors
    if is_done and DIRECTORY_CALLS[when] == "rename":
        assert names(tmp_path) == ["folder"]
    else:
        assert names(tmp_path) == []
        create_directory(tmp_path / "folder", FILES)
    assert contents(tmp_path / "folder") == FILES


def test_ctrl_c_at_the_close_of_the_folder_leaves_nothing_and_an_error_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        Faults(patched, KeyboardInterrupt(), CLOSE_OF_THE_FOLDER, is_done=True)
        with pytest.raises(KeyboardInterrupt):
            create_directory(tmp_path / "folder", FILES)
    assert names(tmp_path) == []
    with monkeypatch.context() as patched:
        Faults(patched, OSError(errno.EIO, "Input/output error"), CLOSE_OF_THE_FOLDER, is_done=True)
        create_directory(tmp_path / "folder", FILES)
    assert contents(tmp_path / "folder") == FILES


@pytest.mark.parametrize("make_error", ERRORS)
def test_a_failed_sync_of_the_folder_is_raised_with_the_new_ones_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_error: Callable[[], BaseException]
) -> None:
    for act, last in (
        (lambda: replace_file(tmp_path / "file", b"new"), len(FILE_CALLS)),
        (lambda: create_directory(tmp_path / "folder", FILES), len(DIRECTORY_CALLS)),
    ):
        error = make_error()
        with monkeypatch.context() as patched:
            faults = Faults(patched, error, last, is_done=False)
            with pytest.raises(type(error)) as caught:
                act()
        assert caught.value is error
        assert faults.calls[last] == "fsync"
        assert "fsync" not in faults.calls[last + 1 :]  # never tried again
    assert (tmp_path / "file").read_bytes() == b"new"
    assert contents(tmp_path / "folder") == FILES
    assert names(tmp_path) == ["file", "folder"]


def test_nothing_but_the_last_sync_can_fail_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for act, renamed in (
        (lambda: replace_file(tmp_path / "file", b"new"), len(FILE_CALLS)),
        (lambda: create_directory(tmp_path / "folder", FILES), len(DIRECTORY_CALLS)),
    ):
        with monkeypatch.context() as patched:
            faults = Faults(patched, OSError(errno.EIO, "Input/output error"), renamed + 1, is_done=False)
            act()
        assert faults.calls[renamed:] == ["fsync", "close"]


def test_the_first_error_is_reported_even_if_cleaning_up_fails_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "file").write_bytes(b"old")
    with monkeypatch.context() as patched:
        patched.setattr(durable.os, "unlink", fail)
        Faults(patched, OSError(errno.ENOSPC, "No space left on device"), FILE_CALLS.index("write"), is_done=False)
        patched.setattr(durable.os, "unlink", fail)
        with pytest.raises(OSError, match="No space left on device"):
            replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("is_link", [False, True])
def test_nothing_is_written_through_a_temporary_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_link: bool
) -> None:
    monkeypatch.setattr(durable.secrets, "token_hex", lambda size: "0" * size)
    (tmp_path / "other").write_bytes(b"other's")
    for name, act in (
        ("file", lambda: replace_file(tmp_path / "file", b"new")),
        ("folder", lambda: create_directory(tmp_path / "folder", FILES)),
    ):
        temporary = tmp_path / f".{name}.{os.getpid()}.00000000.tmp"
        if is_link:
            temporary.symlink_to(tmp_path / "other")
        else:
            temporary.write_bytes(b"other's")
        with pytest.raises(FileExistsError):
            act()
        assert temporary.read_bytes() == b"other's"  # and it is not removed either: it is not ours
        assert not (tmp_path / name).exists()
