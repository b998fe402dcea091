"""publish_directory, published: immutable versions, and a ``latest`` that always points to a whole one."""

import errno
import fcntl
import gc
import hashlib
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from interrupts import interrupted
from test_durable import FILES, Faults, contents, names, open_descriptors
from worker_publish import files, publish_together, read_once, read_until

from cylora.errors import ConfigError, InputError
from cylora.formats import durable
from cylora.formats.durable import LATEST, create_directory, last_version, publish_directory, published

WORKER = Path(__file__).with_name("worker_publish.py")
OTHER = {"b.bin": b"second" * 10, "a.json": b"First"}


def digest(content: dict[str, bytes]) -> str:
    whole = b"".join(name.encode() + b"\0" + hashlib.sha256(part).digest() for name, part in sorted(content.items()))
    return hashlib.sha256(whole).hexdigest()[:8]


# ------------------------------------------------------------------ naming


def test_publish_names_by_version_and_content_and_points_latest_at_it(tmp_path: Path) -> None:
    folder = publish_directory(tmp_path, "name", 17, FILES)
    assert folder == tmp_path / f"name@v17-{digest(FILES)}"
    assert contents(folder) == FILES
    assert os.readlink(tmp_path / LATEST) == folder.name  # relative: the root can be moved
    assert names(tmp_path) == [LATEST, folder.name]
    assert published(tmp_path, "name") == [folder]


def test_publish_takes_a_relative_str(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert publish_directory(".", "name", 0, {"file": [b"in ", memoryview(b"parts")]}) == published(".", "name")[0]
    assert contents(tmp_path / LATEST) == {"file": b"in parts"}


@pytest.mark.parametrize(
    "changed",
    [
        {"b.bin": b"second" * 10, "a.json": b"First"},
        {"b.bin": b"second" * 10, "A.json": b"first"},
        {"b.bin": b"second" * 10},
        {"b.bin": b"second" * 10, "a.json": b"first", "c": b""},
        {"a.json": b"second" * 10, "b.bin": b"first"},
    ],
    ids=["a byte", "a name", "one less", "one more", "swapped"],
)
def test_the_hash_depends_on_every_name_and_every_byte(tmp_path: Path, changed: dict[str, bytes]) -> None:
    first = publish_directory(tmp_path, "name", 1, FILES).name.rpartition("-")[2]
    assert publish_directory(tmp_path, "name", 2, changed).name.rpartition("-")[2] != first


def test_the_hash_does_not_depend_on_order_or_on_how_a_file_is_cut(tmp_path: Path) -> None:
    parts = {"a.json": [b"fi", b"", b"rst"], "b.bin": memoryview(b"second" * 10)}
    turned = {"a.json": parts["a.json"], "b.bin": [parts["b.bin"]]}
    assert publish_directory(tmp_path, "name", 1, FILES) == publish_directory(tmp_path, "name", 1, turned)


def test_published_sorts_by_number_and_knows_only_whole_names(tmp_path: Path) -> None:
    made = [publish_directory(tmp_path, "name", version, FILES) for version in (10, 9, 100, 0)]
    publish_directory(tmp_path, "name2", 5, FILES)
    publish_directory(tmp_path, "na.me", 5, FILES)
    for stranger in ("name@v7", "name@v7-0123456", "name@v7-0123456G", "xname@v7-01234567", ".name@v7-01234567"):
        (tmp_path / stranger).mkdir()
    (tmp_path / "name@v7-01234567").write_bytes(b"a file")
    (tmp_path / "name@v8-01234567").symlink_to(made[0].name)
    assert published(tmp_path, "name") == [made[3], made[1], made[0], made[2]]
    assert published(tmp_path, "other") == []
    assert [last_version(tmp_path, name) for name in ("name", "name2", "other")] == [100, 5, 0]


def test_published_of_a_missing_root_is_the_systems_error(tmp_path: Path) -> None:
    for look in (published, last_version):
        with pytest.raises(FileNotFoundError):
            look(tmp_path / "none", "name")
    with pytest.raises(FileNotFoundError):
        publish_directory(tmp_path / "none", "name", 1, FILES)
    assert names(tmp_path) == []


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/x", "a/b", ".hidden", "-x", "_x", "a@b", "a b", "a\n", "a\0", "é", "a" * 101, None, b"a"],
)
def test_a_bad_name_is_refused_before_anything_is_written(tmp_path: Path, name: object) -> None:
    with pytest.raises(InputError, match="name must match ") as caught:
        publish_directory(tmp_path, name, 1, FILES)  # type: ignore[arg-type]
    assert str(caught.value).endswith(f", got {name!r}")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["a", "0", "a" * 100, "A-b_c.d", "latest", "a..b"])
def test_a_good_name_is_taken(tmp_path: Path, name: str) -> None:
    folder = publish_directory(tmp_path, name, 10**15, FILES)
    assert folder.name.startswith(f"{name}@v1000000000000000-")
    assert published(tmp_path, name) == [folder]


@pytest.mark.parametrize("version", [-1, 10**15 + 1, 1.0, "1", None, True])
def test_a_bad_version_is_refused(tmp_path: Path, version: object) -> None:
    with pytest.raises(InputError, match="version must be an integer"):
        publish_directory(tmp_path, "name", version, FILES)  # type: ignore[arg-type]
    assert names(tmp_path) == []


@pytest.mark.parametrize("keep", [0, -1, 1.5, "2", False])
def test_a_bad_keep_is_refused(tmp_path: Path, keep: object) -> None:
    with pytest.raises(InputError, match=r"keep \(if not None\) must be an integer") as caught:
        publish_directory(tmp_path, "name", 1, FILES, keep=keep)  # type: ignore[arg-type]
    assert not isinstance(caught.value, ConfigError)
    assert names(tmp_path) == []


def test_the_same_version_with_other_content_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    first = publish_directory(tmp_path, "name", 1, FILES)
    second = publish_directory(tmp_path, "name", 2, FILES)
    with pytest.raises(InputError, match="name must have one content as version 1, got ") as caught:
        publish_directory(tmp_path, "name", 1, OTHER, keep=1)
    assert str(caught.value).endswith(str(first))
    assert names(tmp_path) == [LATEST, first.name, second.name]
    assert os.readlink(tmp_path / LATEST) == second.name
    assert contents(first) == FILES


def test_the_same_content_again_only_repoints_latest(tmp_path: Path) -> None:
    first = publish_directory(tmp_path, "name", 1, FILES)
    before = first.stat().st_ino, [(path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(first.iterdir())]
    second = publish_directory(tmp_path, "name", 2, OTHER)
    assert os.readlink(tmp_path / LATEST) == second.name
    assert publish_directory(tmp_path, "name", 1, FILES) == first
    assert os.readlink(tmp_path / LATEST) == first.name
    after = first.stat().st_ino, [(path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(first.iterdir())]
    assert after == before
    assert names(tmp_path) == [LATEST, first.name, second.name]


# ------------------------------------------------------------------ what is in the way


def test_a_file_at_the_final_name_is_refused(tmp_path: Path) -> None:
    final = tmp_path / f"name@v1-{digest(FILES)}"
    for stranger in ("file", "link"):
        if stranger == "file":
            final.write_bytes(b"other's")
        else:
            final.unlink()
            final.symlink_to("nowhere")
        with pytest.raises(FileExistsError) as caught:
            publish_directory(tmp_path, "name", 1, FILES)
        assert caught.value.filename == str(final)
        assert names(tmp_path) == [final.name]


def test_a_foreign_directory_of_the_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "name@v1-00000000").mkdir()
    with pytest.raises(InputError, match=r"name must have one content as version 1, got .*name@v1-00000000"):
        publish_directory(tmp_path, "name", 1, FILES)
    assert names(tmp_path) == ["name@v1-00000000"]


@pytest.mark.parametrize("target", ["elsewhere", "nowhere", "/etc", "latest", "name@v1-00000000"])
def test_a_latest_that_points_elsewhere_is_replaced_not_followed(tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / LATEST).symlink_to(target)
    folder = publish_directory(tmp_path, "name", 1, FILES, keep=1)
    assert os.readlink(tmp_path / LATEST) == folder.name
    assert names(tmp_path) == ["elsewhere", LATEST, folder.name]
    assert names(tmp_path / "elsewhere") == []


def test_a_directory_named_latest_is_the_systems_error(tmp_path: Path) -> None:
    (tmp_path / LATEST).mkdir()
    with pytest.raises(IsADirectoryError):
        publish_directory(tmp_path, "name", 1, FILES)
    folder = published(tmp_path, "name")[0]  # it is published, but nothing points to it
    assert contents(folder) == FILES
    assert names(tmp_path) == [LATEST, folder.name]
    (tmp_path / LATEST).rmdir()
    assert publish_directory(tmp_path, "name", 1, FILES) == folder
    assert contents(tmp_path / LATEST) == FILES


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000, 0o027])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = publish_directory(tmp_path, "name", 1, FILES)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~umask}


# ------------------------------------------------------------------ keep


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 6, 100])
def test_keep_removes_all_but_the_last(tmp_path: Path, keep: int) -> None:
    others = publish_directory(tmp_path, "other", 1, FILES)
    made = [publish_directory(tmp_path, "name", version, FILES) for version in range(5)]
    made.append(publish_directory(tmp_path, "name", 5, FILES, keep=keep))
    assert published(tmp_path, "name") == made[-keep:]
    assert names(tmp_path) == sorted([LATEST, others.name, *(path.name for path in made[-keep:])])


def set_age(path: Path, seconds: int) -> None:
    """Make a directory look as if published that long ago, whatever the clock's grain."""
    then = path.stat().st_mtime_ns - seconds * 10**9
    os.utime(path, ns=(then, then))


def test_the_last_are_those_published_last_whatever_their_versions(tmp_path: Path) -> None:
    """A reader may be busy with what ``latest`` pointed to a moment ago, also after a return to an older version."""
    made = {version: publish_directory(tmp_path, "name", version, FILES) for version in (5, 6, 7)}
    for version, path in made.items():
        set_age(path, 100 - version)
    low = publish_directory(tmp_path, "name", 1, FILES)
    set_age(low, 50)
    assert publish_directory(tmp_path, "name", 5, FILES, keep=2) == made[5]  # again: it is the last one now
    assert published(tmp_path, "name") == [low, made[5]]
    assert contents(tmp_path / LATEST) == FILES


def test_keep_never_removes_what_latest_points_to(tmp_path: Path) -> None:
    """Not even if the clock was set back."""
    future = publish_directory(tmp_path, "name", 5, FILES)
    set_age(future, -3600)
    now = publish_directory(tmp_path, "name", 6, FILES, keep=1)
    assert published(tmp_path, "name") == [future, now]
    assert os.readlink(tmp_path / LATEST) == now.name


def test_keep_leaves_strangers_alone(tmp_path: Path) -> None:
    (tmp_path / "name@v1-01234567").write_bytes(b"a file")
    (tmp_path / "name@v2-01234567").symlink_to(".")
    publish_directory(tmp_path, "name", 3, FILES)
    last = publish_directory(tmp_path, "name", 4, FILES, keep=1)
    assert names(tmp_path) == [LATEST, "name@v1-01234567", "name@v2-01234567", last.name]


def test_a_version_that_cannot_be_removed_is_a_warning_and_found_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = publish_directory(tmp_path, "name", 1, FILES)
    (old / "a directory of someone else's").mkdir()
    new = publish_directory(tmp_path, "name", 2, OTHER, keep=1)
    assert published(tmp_path, "name") == [new]
    assert contents(tmp_path / LATEST) == OTHER
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("cylora", "WARNING")
    rule = f"{new} is published, but what it replaces could not be removed: "
    assert record.getMessage().startswith(rule)
    assert "a directory of someone else's" in record.getMessage()


def test_a_copy_that_cannot_be_removed_at_once_is_a_warning_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of what was published already, under the same version."""
    first = publish_directory(tmp_path, "name", 1, FILES)
    second = publish_directory(tmp_path, "name", 2, OTHER)
    with monkeypatch.context() as patched:
        faults = Faults(patched, None, 0, is_done=False)
        publish_directory(tmp_path, "name", 1, FILES)
    publish_directory(tmp_path, "name", 2, OTHER)
    with monkeypatch.context() as patched:
        Faults(patched, OSError(errno.EIO, "Input/output error"), faults.calls.index("unlink"), is_done=False)
        assert publish_directory(tmp_path, "name", 1, FILES) == first
    assert names(tmp_path) == [LATEST, first.name, second.name]
    assert contents(tmp_path / LATEST) == FILES
    assert caplog.messages == [
        f"{first} is published, but what it replaces could not be removed: [Errno 5] Input/output error"
    ]


# ------------------------------------------------------------------ what fails


@pytest.mark.parametrize("is_done", [False, True], ids=["instead", "after"])
@pytest.mark.parametrize("make_error", [lambda: OSError(errno.EIO, "Input/output error"), KeyboardInterrupt])
def test_a_failure_at_any_call_leaves_whole_versions_and_no_litter(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    make_error: type[BaseException],
    is_done: bool,
) -> None:
    with monkeypatch.context() as patched:  # how many calls there are
        publish_directory(tmp_path, "count", 1, FILES)
        faults = Faults(patched, None, 0, is_done=is_done)
        publish_directory(tmp_path, "count", 2, OTHER, keep=1)
    last_sync = [when for when, call in enumerate(faults.calls) if call == "fsync"][-2]  # the last one is _prune's
    for when, call in enumerate(faults.calls):
        root = tmp_path / f"{when}"
        root.mkdir()
        old = publish_directory(root, "name", 1, FILES)
        descriptors = open_descriptors()
        raised: BaseException | None = None
        error = make_error()
        caplog.clear()
        with monkeypatch.context() as patched:
            Faults(patched, error, when, is_done=is_done)
            try:
                publish_directory(root, "name", 2, OTHER, keep=1)
            except (OSError, KeyboardInterrupt) as caught:
                raised = caught
        assert raised is error or call == "close" or bool(caplog.records), (when, call, raised)
        is_late = when > last_sync and isinstance(error, OSError)  # what is removed after the version is published
        assert bool(caplog.records) == (is_late and call != "close"), (when, call)
        assert raised is None or not is_late, (when, call)
        assert open_descriptors() == descriptors, (when, call)
        left = {path.name: contents(path) for path in published(root, "name")}
        new = f"name@v2-{digest(OTHER)}"
        assert left in ({old.name: FILES}, {old.name: FILES, new: OTHER}, {new: OTHER}), (when, call)
        assert contents(root / LATEST) in (FILES, OTHER)
        assert names(root) == sorted([LATEST, *left]), (when, call)
        publish_directory(root, "name", 2, OTHER, keep=1)
        assert names(root) == [LATEST, new], (when, call)
        assert contents(root / LATEST) == OTHER


def test_a_file_system_without_locks_is_no_obstacle_and_a_failing_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(number: int) -> None:
        def flock(descriptor: int, operation: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(durable.fcntl, "flock", flock)

    failing(errno.ENOLCK)
    folder = publish_directory(tmp_path, "name", 1, FILES)
    failing(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        publish_directory(tmp_path, "name", 2, FILES)
    assert names(tmp_path) == [LATEST, folder.name]


def test_the_lock_is_given_back_though_a_child_has_the_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = []
    flock = durable.fcntl.flock

    def copied(descriptor: int, operation: int) -> None:
        copies.append(os.dup(descriptor))  # what a fork does to it
        flock(descriptor, operation | durable.fcntl.LOCK_NB)

    monkeypatch.setattr(durable.fcntl, "flock", copied)
    publish_directory(tmp_path, "name", 1, FILES)
    with pytest.raises(InputError, match="one content"):
        publish_directory(tmp_path, "name", 1, OTHER)
    next_publisher = os.open(tmp_path, os.O_RDONLY)
    try:
        flock(next_publisher, durable.fcntl.LOCK_EX | durable.fcntl.LOCK_NB)  # raises if another has the lock
    finally:
        for descriptor in (*copies, next_publisher):
            os.close(descriptor)


@pytest.mark.filterwarnings("ignore:unclosed scandir iterator:ResourceWarning")  # it came between call and ``with``
def test_an_interrupt_at_any_moment_leaves_nothing_locked_nor_to_be_unlocked_later(tmp_path: Path) -> None:
    kept: list[BaseException] = []
    while True:
        root = tmp_path / f"{len(kept)}"
        root.mkdir()
        publish_directory(root, "name", 1, FILES)
        call = partial(publish_directory, root, "name", 2, OTHER, keep=1)
        error = interrupted(call, len(kept) + 1)
        if error is None:
            break
        kept.append(error)
        next_publisher = os.open(root, os.O_RDONLY)
        try:
            fcntl.flock(next_publisher, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if another has the lock
        finally:
            os.close(next_publisher)
        assert contents(root / LATEST) in (FILES, OTHER)
    assert len(kept) > 100
    kept.clear()
    gc.collect()  # here, where that warning is expected; an unlocking would fail, since the descriptor is closed


# ------------------------------------------------------------------ many at once


def test_publishers_of_one_version_get_one_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents_of = [{"file": bytes([index]) * 50} for index in range(4)]
    results: list[object] = []
    together = threading.Barrier(4)
    fill = durable._fill_directory

    def fill_and_wait(name: str, content: dict[str, bytes], parent: int) -> str:
        result = fill(name, content, parent)
        together.wait()
        return result

    monkeypatch.setattr(durable, "_fill_directory", fill_and_wait)

    def work(content: dict[str, bytes]) -> None:
        try:
            results.append(publish_directory(tmp_path, "name", 1, content))
        except InputError as error:
            results.append(error)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents_of]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [result for result in results if isinstance(result, Path)]
    assert len(results) == 4
    assert published(tmp_path, "name") == made
    assert len(made) == 1
    assert names(tmp_path) == [LATEST, made[0].name]


def test_latest_is_not_removed_by_one_publisher_while_another_repoints_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One keeps the highest and has just read what ``latest`` is; the other then points it at a lower version."""
    publish_directory(tmp_path, "name", 5, files("name", 5))
    publish_directory(tmp_path, "name", 9, files("name", 9))
    versions = durable._versions
    other = threading.Thread(target=publish_directory, args=(tmp_path, "name", 5, files("name", 5)))
    in_prune = []

    def slow_versions(name: str, parent: int) -> list[tuple[str, int]]:
        found = versions(name, parent)
        if threading.current_thread() is not other:
            in_prune.append(len(found))
            if len(in_prune) == 2:  # the second look is the one that chooses what goes
                other.start()
                other.join(0.5)  # without the lock it is done by then, with it it waits for us
        return found

    monkeypatch.setattr(durable, "_versions", slow_versions)
    publish_directory(tmp_path, "name", 10, files("name", 10), keep=1)
    other.join()
    assert read_once(tmp_path) is None
    assert os.readlink(tmp_path / LATEST).startswith("name@v5-")


def run_readers(root: Path, publishers: list[str], count: int, keep: int) -> tuple[int, int, list[str]]:
    """Publish ``count`` versions, four at a time, under two reading threads and one reading process."""
    create_directory(root, {})
    publish_directory(root, publishers[0], 0, files(publishers[0], 0))
    process = subprocess.Popen([sys.executable, WORKER, "read", root], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    over = threading.Event()
    results: list[tuple[int, list[str]]] = []
    readers = [
        threading.Thread(target=lambda: results.append(read_until(root, over.is_set)), daemon=True) for _ in range(2)
    ]
    for reader in readers:
        reader.start()
    failed = publish_together(root, publishers, count, keep)
    over.set()
    (root / "stop").touch()
    for reader in readers:
        reader.join()
    said, _ = process.communicate()
    wrong = [problem for _, problems in results for problem in problems] + said.split()[1:]
    assert process.returncode == 0
    return sum(reads for reads, _ in results), int(said.split()[0]), failed + wrong


ONE_NAME = ["name"] * 4
FOUR_NAMES = ["one", "two", "three", "four"]


@pytest.mark.parametrize("publishers", [ONE_NAME, FOUR_NAMES], ids=["versions of their own", "names of their own"])
@pytest.mark.parametrize(
    "count", [120, pytest.param(10_000, marks=pytest.mark.nightly)], ids=["120", "10,000 re-publishes"]
)
def test_readers_see_whole_versions_while_four_publish(
    tmp_path: Path, publishers: list[str], count: int, figures: Callable[..., None]
) -> None:
    keep = 50  # far more than are published while a reader opens two files
    here, there, wrong = run_readers(tmp_path / "root", publishers, count, keep)
    assert wrong == []
    assert min(here, there) >= 3
    figures(published=count, reads=here + there)
    assert read_once(tmp_path / "root") is None
    left = [name for name in names(tmp_path / "root") if name.startswith(".")]
    assert left == []
    for name in set(publishers):
        assert min(keep, count // 4) <= len(published(tmp_path / "root", name)) <= keep + publishers.count(name)


def test_four_processes_publish_into_one_root(tmp_path: Path) -> None:
    command = [sys.executable, WORKER, "publish", tmp_path, "name"]
    processes = [
        subprocess.Popen([*command, str(first), "4", "15", "20"], stdout=subprocess.PIPE, text=True)
        for first in range(4)
    ]
    assert [process.communicate()[0] for process in processes] == [""] * 4
    assert [process.returncode for process in processes] == [0] * 4
    assert read_once(tmp_path) is None
    found = published(tmp_path, "name")
    assert all(contents(path) == files("name", int(path.name[6:].partition("-")[0])) for path in found)
    assert len(found) == 20
    assert len(names(tmp_path)) == len(found) + 1


def test_a_reader_that_opens_through_latest_each_time_does_see_mixtures(tmp_path: Path) -> None:
    """The check can fail: this is the reader the protocol forbids, between two versions on purpose."""
    publish_directory(tmp_path, "name", 1, files("name", 1))
    config = (tmp_path / LATEST / "adapter_config.json").read_bytes()
    publish_directory(tmp_path, "name", 2, files("name", 2))
    weights = (tmp_path / LATEST / "adapter_model.safetensors").read_bytes()
    assert weights[: len(config)] != config
    (tmp_path / os.readlink(tmp_path / LATEST) / "adapter_config.json").write_bytes(config)
    assert str(read_once(tmp_path)).startswith("mixed: ")
    (tmp_path / os.readlink(tmp_path / LATEST) / "adapter_config.json").unlink()
    assert str(read_once(tmp_path)).startswith("missing: ")
