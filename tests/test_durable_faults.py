"""Saves that are killed, that meet a failing system call, or that find the disk full: old or new, whole, no litter.

strace stops a real process at a chosen system call. A first run records the calls of a save; then each is killed or
failed in a run of its own. To be killed on entering a call is to be killed after the one before it; the mark after the
last call is one point more. What is no system call of a save (the start of Python, say) is left alone.
"""

import dataclasses
import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from worker_save import NEW, NEXT, OLD, SAVES, big, tree, write

WORKER = Path(__file__).with_name("worker_save.py")
FULL = Path(__file__).with_name("worker_full.py")
MARK = "umask"
KINDS = list(SAVES)
ERRORS = ["EIO", "ENOSPC", "EDQUOT", "EINTR", "EMFILE", "EACCES", "EROFS", "EXDEV"]
CALL = re.compile(r"(?P<name>[a-z_0-9]+)\((?P<rest>.*)", re.DOTALL)
# The last rename is what makes a save take effect. A publish that removes an old version renames once more.
RENAMES = {"publish": 2}


@dataclasses.dataclass(frozen=True)
class Point:
    """A system call of a save: the ``when``-th of its name in the whole process."""

    name: str
    when: int
    is_after: bool  # the rename that makes the save take effect

    def __str__(self) -> str:
        return f"{self.name} {self.when}"


def traced(kind: str, root: Path, log: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], str]:
    command = ["strace", "-qq", "-o", log, *options, sys.executable, "-B", WORKER, kind, root]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return run, log.read_text(errors="replace")


def points_of(kind: str, folder: Path) -> list[Point]:
    """Record one save and return its system calls and the mark after them."""
    prepared(kind, folder / "recorded")
    for _ in range(2):  # the first may still find the interpreter's caches cold
        prepared(kind, folder / "recorded")
        run, log = traced(kind, folder / "recorded", folder / "log")
        assert (run.returncode, run.stdout) == (0, "0 saved\n"), run.stderr
    points: list[Point] = []
    counts: dict[str, int] = {}
    renames = marks = 0
    for line in log.splitlines():
        call = CALL.match(line)
        if call is None:
            continue
        name = call["name"]
        counts[name] = counts.get(name, 0) + 1
        if marks == 1:
            points.append(Point(name, counts[name], renames >= RENAMES.get(kind, 1)))
        marks += name == MARK
        renames += marks == 1 and name.startswith("rename")
    assert marks == 2
    assert {point.name for point in points} >= {"openat", "write", "fsync", "close", MARK}, points
    return points


def prepared(kind: str, root: Path) -> None:
    """Make ``root`` hold what a save of OLD leaves, and nothing else."""
    subprocess.run(["rm", "-rf", root], check=True)
    root.mkdir()
    write(kind, root, OLD)


def expected(kind: str, root: Path, *contents: dict[str, bytes]) -> dict[str, bytes | str | None]:
    prepared(kind, root)
    for content in contents:
        write(kind, root, content)
    return tree(root)


def without_unlinked_version(kind: str, found: dict[str, bytes | str | None]) -> dict[str, bytes | str | None]:
    """Leave out versions that ``latest`` does not point to: they may be there already, or still, but always whole."""
    if kind != "publish":
        return found
    latest = str(found["latest"])
    rest = {path: thing for path, thing in found.items() if path == "latest" or path.partition("/")[0] == latest}
    others = {path.partition("/")[0] for path in found.keys() - rest.keys()}
    for other in others:
        inside = {path.partition("/")[2]: thing for path, thing in found.items() if path.startswith(f"{other}/")}
        assert inside in (OLD, NEW), other
    return rest


def is_temporary(path: str) -> bool:
    return path.startswith(".") and path.partition("/")[0].endswith(".tmp")


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_kill_at_every_system_call_leaves_old_or_new(tmp_path: Path, kind: str, figures: Callable[..., None]) -> None:
    points = points_of(kind, tmp_path)
    old, new, following = (expected(kind, tmp_path / "expected", *contents) for contents in ((), (NEW,), (NEW, NEXT)))
    root = tmp_path / "root"
    for point in points:
        prepared(kind, root)
        run, log = traced(
            kind, root, tmp_path / "log", "-e", f"trace={MARK},{point.name}",
            "-e", f"inject={point.name}:signal=KILL:when={point.when}",
        )  # fmt: skip
        assert "+++ killed by SIGKILL +++" in log, (point, run)
        assert log.count(f"{MARK}(") == 1 + (point.name == MARK), point
        found = {path: thing for path, thing in tree(root).items() if not is_temporary(path)}
        whole = without_unlinked_version(kind, new if point.is_after else old)
        assert without_unlinked_version(kind, found) == whole, point
        write(kind, root, NEXT)
        found = {path: thing for path, thing in tree(root).items() if not is_temporary(path)}
        if kind == "directory":  # each save has a name of its own
            found.update(new)
        assert found == following, point
    figures(kind=kind, points=len(points))


@pytest.mark.nightly
@pytest.mark.parametrize("error", [*ERRORS, "a write of nothing"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_failing_system_call_leaves_old_or_new_and_no_litter(
    tmp_path: Path, kind: str, error: str, figures: Callable[..., None]
) -> None:
    points = points_of(kind, tmp_path)[:-1]
    old, new, following = (expected(kind, tmp_path / "expected", *contents) for contents in ((), (NEW,), (NEW, NEXT)))
    root = tmp_path / "root"
    fault = f"error={error}"
    if error == "a write of nothing":
        points, fault = [point for point in points if point.name == "write"], "retval=0"
    raised = 0
    for point in points:
        prepared(kind, root)
        run, log = traced(
            kind, root, tmp_path / "log", "-e", f"trace={MARK},{point.name}",
            "-e", f"inject={point.name}:{fault}:when={point.when}",
        )  # fmt: skip
        _, inside, _ = re.split(rf"{MARK}\(.*\n", log)
        assert inside.count("(INJECTED)") == 1, (point, log)
        assert run.returncode == 0, (point, run)
        leaked, _, said = run.stdout.strip().partition(" ")
        assert int(leaked) == (point.name == "close"), point  # a close that is not carried out leaves its own
        found = tree(root)
        assert not [path for path in found if is_temporary(path)], (point, said)
        if said == "saved" and point.name == "lseek":  # the next listing begins where this one ended: nothing to remove
            assert without_unlinked_version(kind, found) == without_unlinked_version(kind, new), point
        elif said == "saved":
            assert found == new, point
        else:
            raised += 1
            whole = without_unlinked_version(kind, new if point.is_after else old)
            assert without_unlinked_version(kind, found) == whole, (point, said)
        write(kind, root, NEXT)
        found = tree(root)
        if kind == "directory":
            found.update(new)
        assert found == following, (point, said)
    figures(kind=kind, error=error, faults=len(points), raised=raised)
    assert raised >= 2  # few after EINTR: Python tries most calls again


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_the_old_one(tmp_path: Path, kind: str, figures: Callable[..., None]) -> None:
    """A tmpfs of a few pages and inodes, in a mount namespace of its own."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = ["unshare", *user, "--mount", sys.executable, "-B", FULL, tmp_path, kind]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    failed, saved = map(int, run.stdout.split())
    figures(kind=kind, found_full=failed, saved=saved)
    assert failed >= 5
    assert saved >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_size_limit_leaves_the_old_one(tmp_path: Path, kind: str) -> None:
    """Python ignores SIGXFSZ, so the system takes what still fits (a short write) and then says EFBIG."""
    root = tmp_path / "root"
    prepared(kind, root)
    old = tree(root)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1, 100, 8191, 8192, 8193, 32767, 32768 + 8191):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            try:
                SAVES[kind](root, big(4096), 1)
                caught = None
            except OSError as error:
                caught = error
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if caught is None:
            assert kind in ("directory", "publish")
            assert limit >= 32768
            break
        assert caught.errno == errno.EFBIG
        assert tree(root) == old, limit
    write(kind, root, NEXT)
    assert not [path for path in tree(root) if is_temporary(path)]
