"""A model of power loss: whatever a disk may hold after it, the target is whole, old or new.

The calls run on a real directory and are recorded. After each, every state that a disk may then be in is made up:

- a file holds what its last fsync covered, then any prefix of the bytes since; or the new length is there with zeros
  where the data is not;
- a directory has the changes its last fsync covered, then any subset of those since, in whatever order: a rename may be
  there without the creation before it, and it may be there by half, with the old name still present;
- the sync of a file says nothing about its name, and that of a directory nothing about its parent. A symbolic link and
  its target are one thing, as in every journaling file system.

So an fsync left out or moved shows up as a state in which something is lost. The variants at the end prove it.
"""

import dataclasses
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cylora.formats import durable
from cylora.formats.durable import create_directory, publish_directory, replace_file

Tree = dict[str, Any]  # a name to bytes (a file), str (a link) or Tree
Frozen = Any  # a Tree that can be hashed


def frozen(thing: bytes | str | Tree) -> Frozen:
    return tuple(sorted((name, frozen(part)) for name, part in thing.items())) if isinstance(thing, dict) else thing


# ------------------------------------------------------------------ the model


@dataclasses.dataclass(eq=False)
class File:
    synced: bytes = b""
    written: bytes = b""  # since then, appended
    step: ClassVar[int] = 1  # between the lengths that are tried

    def states(self) -> Iterator[bytes]:
        yield self.synced + self.written
        for length in range(0, len(self.written), self.step):
            yield self.synced + self.written[:length]
            yield self.synced + self.written[:length] + bytes(len(self.written) - length)


@dataclasses.dataclass(eq=False)
class Link:
    target: str


Names = dict[str, Any]  # what a directory holds: a name to a File, a Link or a Directory
Change = Callable[[Names], None]


@dataclasses.dataclass(eq=False)
class Directory:
    synced: Names = dataclasses.field(default_factory=dict)
    changes: list[tuple[Change, ...]] = dataclasses.field(default_factory=list)  # since; the ways each may be there

    @property
    def now(self) -> Names:
        return self.after([ways[0] for ways in self.changes])

    def after(self, changes: list[Change]) -> Names:
        entries = dict(self.synced)
        for change in changes:
            change(entries)
        return entries

    def states(self) -> Iterator[Names]:
        """Give every set of entries, each once."""
        seen = set()
        for chosen in itertools.product(*((None, *ways) for ways in self.changes)):
            entries = self.after([change for change in chosen if change is not None])
            key = frozenset((name, id(thing)) for name, thing in entries.items())
            if key not in seen:
                seen.add(key)
                yield entries


def add(name: str, thing: Any) -> tuple[Change, ...]:
    return (lambda entries: entries.update({name: thing}),)


def remove(name: str) -> tuple[Change, ...]:
    return (lambda entries: entries.pop(name, None),)


def move(source: str, target: str, thing: Any) -> tuple[Change, ...]:
    def whole(entries: Names) -> None:
        if entries.get(source) is thing:
            del entries[source]
        entries[target] = thing

    return whole, *add(target, thing)


def trees(directory: Directory) -> Iterator[Tree]:
    """Give every tree that a disk may hold of this directory."""
    for entries in directory.states():
        parts = [list(possible(thing)) for thing in entries.values()]
        for chosen in itertools.product(*parts):
            yield dict(zip(entries, chosen, strict=True))


def possible(thing: Any) -> Iterator[bytes | str | Tree]:
    if isinstance(thing, Directory):
        return trees(thing)
    return iter([thing.target]) if isinstance(thing, Link) else thing.states()


# ------------------------------------------------------------------ the recorder


class Recorder:
    """Stands in for the module ``os`` in ``durable``: carries each call out and keeps the model in step with it.

    ``look(root)`` is called after every change. ``passes(what, count)`` says whether a sync takes effect: True, False
    (never) or "late" (after the next rename).
    """

    def __init__(self, root: Path, look: Callable[[Directory], None], passes: Callable[[str, int], Any]) -> None:
        self.root = self.read(root)
        self.path = root
        self.look = look
        self.passes = passes
        self.open_: dict[int, File | Directory] = {}
        self.held: list[Callable[[], None]] = []
        self.syncs = 0

    def read(self, folder: Path) -> Directory:
        """Take over what is there already, all of it synced."""
        found = Directory()
        for path in folder.iterdir():
            if path.is_symlink():
                found.synced[path.name] = Link(os.readlink(path))
            else:
                found.synced[path.name] = self.read(path) if path.is_dir() else File(path.read_bytes())
        return found

    def __getattr__(self, name: str) -> Any:
        harmless = ("fsencode", "fspath", "getpid", "strerror", "readlink", "scandir", "listdir", "stat", "utime")
        assert name.isupper() or name in harmless, name
        return getattr(os, name)

    def changed(self, directory: Directory, ways: tuple[Change, ...]) -> None:
        directory.changes.append(ways)
        self.look(self.root)

    def directory(self, descriptor: int) -> Directory:
        found = self.open_[descriptor]
        assert isinstance(found, Directory)
        return found

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        descriptor = os.open(path, flags, mode, dir_fd=dir_fd)
        if dir_fd is None:
            assert Path(path) == self.path
            self.open_[descriptor] = self.root
        elif flags & os.O_CREAT:
            self.open_[descriptor] = File()
            self.changed(self.directory(dir_fd), add(path, self.open_[descriptor]))
        else:
            self.open_[descriptor] = self.directory(dir_fd).now[path]
        return descriptor

    def write(self, descriptor: int, content: memoryview) -> int:
        written = os.write(descriptor, content[: max(1, len(content) // 2)])  # a disk may take it in pieces
        file = self.open_[descriptor]
        assert isinstance(file, File)
        file.written += bytes(content[:written])
        self.look(self.root)
        return written

    def fsync(self, descriptor: int) -> None:
        assert stat.S_ISDIR(os.fstat(descriptor).st_mode) == isinstance(self.open_[descriptor], Directory)
        thing = self.open_[descriptor]
        what = "file" if isinstance(thing, File) else "root" if thing is self.root else "folder"

        def take_effect() -> None:
            if isinstance(thing, File):
                thing.synced, thing.written = thing.synced + thing.written, b""
            else:
                thing.synced, thing.changes = thing.now, []

        passes = self.passes(what, self.syncs)
        self.syncs += 1
        if passes == "late":
            self.held.append(take_effect)
        elif passes:
            take_effect()
        self.look(self.root)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)
        del self.open_[descriptor]

    def mkdir(self, name: str, mode: int, *, dir_fd: int) -> None:
        os.mkdir(name, mode, dir_fd=dir_fd)
        self.changed(self.directory(dir_fd), add(name, Directory()))

    def symlink(self, target: str, name: str, *, dir_fd: int) -> None:
        os.symlink(target, name, dir_fd=dir_fd)
        self.changed(self.directory(dir_fd), add(name, Link(target)))

    def rename(self, source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        os.rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        directory = self.directory(src_dir_fd)
        assert self.directory(dst_dir_fd) is directory
        self.changed(directory, move(source, target, directory.now[source]))
        for take_effect in self.held:
            take_effect()
        self.held.clear()

    replace = rename

    def unlink(self, name: str, *, dir_fd: int) -> None:
        os.unlink(name, dir_fd=dir_fd)
        self.changed(self.directory(dir_fd), remove(name))

    def rmdir(self, name: str, *, dir_fd: int) -> None:
        os.rmdir(name, dir_fd=dir_fd)
        self.changed(self.directory(dir_fd), remove(name))


# ------------------------------------------------------------------ what is saved, and what must hold


@dataclasses.dataclass
class Save:
    """One kind of save: what is on the disk before it, the call, and what is wrong with a tree (or None)."""

    prepare: Callable[[Path], object]
    act: Callable[[Path], object]
    wrong: Callable[[Tree, bool], str | None]  # the second: the call has returned


OLD, NEW = b"the old content of it", b"what is new, and longer than the old one was"
OLD_FILES = {"config": OLD, "weights": OLD[::-1]}
NEW_FILES = {"config": NEW, "weights": NEW[::-1] + b"end"}


def file_wrong(tree: Tree, is_done: bool) -> str | None:
    allowed = [NEW] if is_done else [OLD, NEW]
    return None if tree.get("file") in allowed else f"file is {tree.get('file')!r}"


def new_file_wrong(tree: Tree, is_done: bool) -> str | None:
    allowed = [NEW] if is_done else [None, NEW]
    return None if tree.get("file") in allowed else f"file is {tree.get('file')!r}"


def directory_wrong(tree: Tree, is_done: bool) -> str | None:
    allowed = [NEW_FILES] if is_done else [None, NEW_FILES]
    return None if tree.get("folder") in allowed else f"folder is {tree.get('folder')!r}"


def published_wrong(tree: Tree, is_done: bool) -> str | None:
    """Every published version is whole, ``latest`` points to one of them, and to the new one when the call returned."""
    for name, thing in tree.items():
        if match := durable.PUBLISHED.fullmatch(name):
            whole = NEW_FILES if match["version"] == "9" else OLD_FILES
            if thing != whole:
                return f"{name} is {thing!r}"
    latest = tree.get("latest")
    if latest not in tree and not (latest is None and not is_done and "was there" not in tree):
        return f"latest points to {latest!r}, there are {sorted(tree)}"
    if is_done and not latest.startswith("name@v9-"):
        return f"latest points to {latest!r}"
    return None


def publish_old(root: Path, versions: range) -> None:
    for version in versions:
        publish_directory(root, "name", version, OLD_FILES)
    (root / "was there").write_bytes(b"")


SAVES = {
    "file": Save(
        lambda root: (root / "file").write_bytes(OLD), lambda root: replace_file(root / "file", NEW), file_wrong
    ),
    "new file": Save(
        lambda root: None, lambda root: replace_file(root / "file", [NEW[:20], b"", NEW[20:]]), new_file_wrong
    ),
    "directory": Save(lambda root: None, lambda root: create_directory(root / "folder", NEW_FILES), directory_wrong),
    "directory over an empty one": Save(
        lambda root: (root / "folder").mkdir(),
        lambda root: create_directory(root / "folder", NEW_FILES),
        lambda tree, is_done: None if tree.get("folder") == {} and not is_done else directory_wrong(tree, is_done),
    ),
    "first publish": Save(
        lambda root: None, lambda root: publish_directory(root, "name", 9, NEW_FILES, keep=1), published_wrong
    ),
    "publish": Save(
        lambda root: publish_old(root, range(2)),
        lambda root: publish_directory(root, "name", 9, NEW_FILES),
        published_wrong,
    ),
    "publish and remove": Save(
        lambda root: publish_old(root, range(3)),
        lambda root: publish_directory(root, "name", 9, NEW_FILES, keep=1),
        published_wrong,
    ),
    "publish again": Save(
        lambda root: (publish_directory(root, "name", 9, NEW_FILES), publish_old(root, range(2))),
        lambda root: publish_directory(root, "name", 9, NEW_FILES, keep=1),
        published_wrong,
    ),
}


def every(what: str, count: int) -> bool:
    return True


class LostError(Exception):
    """A disk may hold something that is neither old nor new."""


def power_loss(
    monkeypatch: pytest.MonkeyPatch, root: Path, save: Save, passes: Callable[[str, int], Any] = every
) -> tuple[set[Frozen], list[str]]:
    """Return the distinct states of the disk after each call, and what was synced; raise at the first that is wrong."""
    root.mkdir()
    save.prepare(root)
    states: set[Frozen] = set()
    syncs: list[str] = []

    def recorded(what: str, count: int) -> Any:
        syncs.append(what)
        return passes(what, count)

    def look(directory: Directory, is_done: bool = False) -> None:
        for tree in trees(directory):
            states.add((is_done, frozen(tree)))
            if problem := save.wrong(tree, is_done):
                raise LostError(problem)

    with monkeypatch.context() as patched:
        recorder = Recorder(root, look, recorded)
        patched.setattr(durable, "os", recorder)
        save.act(root)
        look(recorder.root, is_done=True)
    assert recorder.open_ == {}
    assert tree_now(recorder.read(root)) == tree_now(recorder.root)  # the model kept in step with the directory
    return states, syncs


def tree_now(thing: Any) -> bytes | str | Tree:
    if isinstance(thing, Directory):
        return {name: tree_now(part) for name, part in thing.now.items()}
    return thing.target if isinstance(thing, Link) else thing.synced + thing.written


# ------------------------------------------------------------------ the tests


def test_no_power_loss_leaves_half_of_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: Callable[..., None]
) -> None:
    total = 0
    for name, save in SAVES.items():
        states, _ = power_loss(monkeypatch, tmp_path / name, save)
        total += len(states)
    figures(states=total)
    assert total >= 5000


FILE_SAVES = ["file", "new file"]
PUBLISHES = ["first publish", "publish", "publish and remove"]
DIRECTORY_SAVES = ["directory", "directory over an empty one", *PUBLISHES]
VARIANTS: dict[str, tuple[Callable[[str, int], Any], list[str]]] = {
    "no sync of files": (lambda what, _: what != "file", FILE_SAVES + DIRECTORY_SAVES),
    "no sync of the new folder": (lambda what, _: what != "folder", DIRECTORY_SAVES),
    "no sync of the parent": (lambda what, _: what != "root", [*FILE_SAVES, *DIRECTORY_SAVES, "publish again"]),
    "no sync at all": (lambda what, _: False, [*FILE_SAVES, *DIRECTORY_SAVES, "publish again"]),
    "rename before the sync of the file": (lambda what, _: what != "file" or "late", FILE_SAVES + DIRECTORY_SAVES),
    "rename before the sync of the folder": (lambda what, _: what != "folder" or "late", DIRECTORY_SAVES),
    "link before the sync of the parent": (lambda what, _: what != "root" or "late", PUBLISHES),
}


@pytest.mark.parametrize(
    ("variant", "name"), [(variant, name) for variant, (_, names) in VARIANTS.items() for name in names]
)
def test_a_sync_left_out_or_moved_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, name: str
) -> None:
    monkeypatch.setattr(File, "step", 30)
    with pytest.raises(LostError, match=r" (is|points to) "):
        power_loss(monkeypatch, tmp_path / "root", SAVES[name], VARIANTS[variant][0])


@pytest.mark.parametrize("name", FILE_SAVES + DIRECTORY_SAVES)
def test_no_sync_is_one_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(File, "step", 30)
    _, syncs = power_loss(monkeypatch, tmp_path / "all", SAVES[name])
    for left_out in range(len(syncs)):
        with pytest.raises(LostError, match=r" (is|points to) "):
            power_loss(monkeypatch, tmp_path / f"{left_out}", SAVES[name], lambda _, count, out=left_out: count != out)


def test_the_model_gives_every_state_of_a_file_and_of_a_directory() -> None:
    file = File(b"ab", b"cd")
    assert set(file.states()) == {b"ab", b"abc", b"abcd", b"ab\0\0", b"abc\0"}
    folder = Directory({"old": Link("1")}, [add("tmp", file), move("tmp", "old", file), remove("old")])
    link = folder.synced["old"]
    states = list(folder.states())
    assert len(states) == 6
    for expected in (
        {"old": link},
        {"old": link, "tmp": file},  # created, not renamed
        {"old": file},
        {"old": file, "tmp": file},  # renamed by half
        {"tmp": file},  # created and unlinked, with the rename between them lost
        {},
    ):
        assert expected in states
