"""replace_file: the whole new file or the whole old one, and never any litter."""

import errno
import os
import stat
from pathlib import Path

import pytest

from cylora.formats import durable
from cylora.formats.durable import replace_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", [b"", b"x", b"long " * 100_000], ids=["empty", "one byte", "500 kB"])
def test_replace_file_writes_the_content_and_nothing_beside_it(tmp_path: Path, content: bytes) -> None:
    for _ in range(2):  # a new file, then one that is there
        replace_file(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
        assert names(tmp_path) == ["file"]


def test_replace_file_takes_a_str_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    replace_file("file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000, 0o027])
def test_mode_follows_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        replace_file(tmp_path / "file", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    replace_file(tmp_path / "link", b"new")
    assert (tmp_path / "elsewhere").read_bytes() == b"old"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_bytes() == b"new"


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(durable.os, "write", lambda descriptor, content: write(descriptor, content[:3]))
    replace_file(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_file_is_synced_before_and_its_folder_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(durable.os, "fsync", recorded_fsync)
    monkeypatch.setattr(durable.os, "replace", recorded_replace)
    replace_file(tmp_path / "file", b"new")
    assert calls == ["sync file", "rename", "sync folder"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "close", "replace"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()],
    ids=["ENOSPC", "EIO", "Ctrl-C"],
)
def test_a_failed_call_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    real_close = os.close

    def fail(*arguments: object) -> None:
        if call == "close":
            real_close(arguments[0])  # type: ignore[arg-type]
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(durable.os, call, fail)
        with pytest.raises(type(error)) as caught:
            replace_file(tmp_path / "file", b"new")
    assert caught.value is error
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_failed_sync_of_the_folder_is_raised_with_the_new_file_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fail_on_folder(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(durable.os, "fsync", fail_on_folder)
    with pytest.raises(OSError, match="Input/output error"):
        replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_a_write_of_nothing_is_an_error_not_an_endless_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable.os, "write", lambda descriptor, content: 0)
    with pytest.raises(OSError, match="the system wrote 0 bytes and gave no reason"):
        replace_file(tmp_path / "file", b"new")
    assert names(tmp_path) == []


@pytest.mark.parametrize("is_link", [False, True])
def test_nothing_is_written_through_a_temporary_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_link: bool
) -> None:
    monkeypatch.setattr(durable.secrets, "token_hex", lambda size: "0" * size)
    temporary = tmp_path / f".file.{os.getpid()}.00000000.tmp"
    (tmp_path / "other").write_bytes(b"other's")
    if is_link:
        temporary.symlink_to(tmp_path / "other")
    else:
        temporary.write_bytes(b"other's")
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "file", b"new")
    assert temporary.read_bytes() == b"other's"  # and it is not removed either: it is not ours
    assert not (tmp_path / "file").exists()


def test_a_missing_folder_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "none" / "file", b"new")
