"""Fill a small file system step by step and save into what is left; tests/test_durable_faults.py starts it.

``worker_full.py MOUNT KIND`` runs in a mount namespace of its own, where it may mount a tmpfs. It prints how many saves
the disk was too full for and how many it was not, or an AssertionError says what was lost.
"""

import contextlib
import errno
import subprocess
import sys
from pathlib import Path

from worker_save import NEXT, OLD, SAVES, big, tree

PAGE = 4096
SIZE, FILES = 96, 40  # pages, inodes


def save(kind: str, root: Path, content: dict[str, bytes], version: int) -> bool:
    """Return whether it could be done; the only reason not to is that there is no space."""
    try:
        SAVES[kind](root, content, version)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


def fill(mount: Path, kind: str, pages: int, files: int) -> bool | None:
    """Save with that much of the disk taken. Return whether it could be done, None if there was nothing to lose."""
    root = mount / "root"
    root.mkdir()
    if not save(kind, root, OLD, 0):
        return None
    before = tree(root)
    with contextlib.suppress(OSError):  # the whole disk is taken
        for index in range(files):
            (mount / f"empty{index}").touch()
        (mount / "ballast").write_bytes(bytes(PAGE * pages))
    is_saved = save(kind, root, big(PAGE), 1)
    if not is_saved:
        after = tree(root)
        published = {path for path in after if "@v1-" in path}  # it may be there, whole, without a link to it
        assert {path: after[path] for path in after.keys() - published} == before, sorted(after)
        assert len(published) in (0, 3), published
    for path in mount.iterdir():
        if path != root:
            path.unlink()
    assert save(kind, root, NEXT, 2)
    assert not [path for path in tree(root) if path.startswith(".")]
    return is_saved


def main(mount: Path, kind: str) -> None:
    saved = []
    for pages, files in [*((pages, 0) for pages in range(SIZE - 20, SIZE + 1)), *((0, n) for n in range(26, FILES))]:
        options = f"size={PAGE * SIZE},nr_inodes={FILES}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", mount], check=True)
        try:
            saved.append(fill(mount, kind, pages, files))
        finally:
            subprocess.run(["umount", mount], check=True)
    print(saved.count(False), saved.count(True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
