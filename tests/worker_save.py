"""Make one save in a process of its own, between two marks that a tracer sees; tests/test_durable_faults.py starts it.

``worker_save.py KIND ROOT`` prints how many descriptors it left open, then "saved" or the OSError; any other exception
is a fault. The marks are calls of umask, which nothing else here makes.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from training import fill, make_set, make_trainer

from cylora import Gradients
from cylora.formats.checkpoint import save_checkpoint
from cylora.formats.durable import create_directory, publish_directory, replace_file

WORDS = (b"the old ", b"the new ", b"the next ")
ADAPTERS, TRAINER = make_set(), make_trainer()
TRAINER.step(1.0, ADAPTERS, fill(Gradients(ADAPTERS)))
OLD, NEW, NEXT = ({"config": word * 40, "weights": word[::-1] * 90} for word in WORDS)


def write(kind: str, root: Path, content: dict[str, bytes]) -> None:
    """Save ``content`` (of three: OLD, NEW, NEXT, in this order) as this kind."""
    version = [OLD, NEW, NEXT].index(content)
    SAVES[kind](root, content, version)


SAVES: dict[str, Callable[[Path, dict[str, bytes], int], object]] = {
    "file": lambda root, content, version: replace_file(root / "file", list(content.values())),
    "directory": lambda root, content, version: create_directory(root / f"folder{version}", content),
    "publish": lambda root, content, version: publish_directory(root, "name", version, content, keep=1),
    "checkpoint": lambda root, content, version: save_checkpoint(
        TRAINER, ADAPTERS, root / "checkpoint", extra={name: part.decode("latin-1") for name, part in content.items()}
    ),
}


def big(unit: int) -> dict[str, bytes]:
    return {"config": bytes(range(256)) * (unit // 128), "weights": bytes(range(256)) * (unit // 32)}


def tree(root: Path) -> dict[str, bytes | str | None]:
    """Return all that is under ``root``: the bytes of files, the targets of links, None for directories."""
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else None
        if path.is_dir()
        else path.read_bytes()
        for path in root.rglob("*")
    }


def descriptors() -> list[int]:
    """Return those open, by asking for each: listing /dev/fd would open one."""

    def is_open(descriptor: int) -> bool:
        try:
            os.fstat(descriptor)
        except OSError:
            return False
        return True

    return [descriptor for descriptor in range(64) if is_open(descriptor)]


if __name__ == "__main__":
    kind, root = sys.argv[1], Path(sys.argv[2])
    said = "saved"
    before = descriptors()
    os.umask(0o022)
    try:
        write(kind, root, NEW)
    except OSError as error:
        said = f"{type(error).__name__}: {error}"
    os.umask(0o022)
    print(len(descriptors()) - len(before), said)
