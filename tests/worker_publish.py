"""Read or publish adapter directories from a process of its own; tests/test_publish.py starts it.

``read ROOT`` resolves ``latest`` once and opens both files, again and again until ROOT/stop is there; it prints how
often it did and the first thing that was wrong. ``publish ROOT NAME FIRST STEP COUNT KEEP`` publishes FIRST,
FIRST + STEP, and so on. Name and version go into both files, so that a reader can tell a mixture.
"""

import sys
import threading
from collections.abc import Callable
from pathlib import Path

from cylora.formats.durable import publish_directory


def files(name: str, version: int) -> dict[str, bytes]:
    text = f"{name}@v{version}-".encode()
    return {"adapter_config.json": text, "adapter_model.safetensors": text * (1 + version % 400)}


def read_once(root: Path) -> str | None:
    """Follow the protocol of a reader: resolve ``latest`` once, then open both files. Say what was wrong, or None."""
    try:
        folder = (root / "latest").resolve(strict=True)
        config = (folder / "adapter_config.json").read_bytes()
        weights = (folder / "adapter_model.safetensors").read_bytes()
    except OSError as error:
        return f"missing: {error}"
    version = int(folder.name.partition("@v")[2].partition("-")[0])
    expected = files(folder.name.partition("@")[0], version)
    if (config, weights) != (expected["adapter_config.json"], expected["adapter_model.safetensors"]):
        return f"mixed: {folder.name} has {config[:40]!r} and {len(weights)} bytes of {weights[:40]!r}"
    return None


def read_until(root: Path, is_over: Callable[[], bool]) -> tuple[int, list[str]]:
    """Return how often it was read and what was wrong; at least one read begins after the last publication."""
    reads, wrong = 0, []
    while True:
        last = is_over()
        problem = read_once(root)
        reads += 1
        if problem is not None:
            wrong.append(problem)
        if last:
            return reads, wrong


def publish(root: Path, name: str, versions: range, keep: int) -> list[str]:
    """Publish the versions in their order; return what failed."""
    failed = []
    for version in versions:
        try:
            publish_directory(root, name, version, files(name, version), keep=keep)
        except Exception as error:
            failed.append(f"{name}@v{version}: {type(error).__name__}: {error}")
    return failed


def publish_together(root: Path, names: list[str], count: int, keep: int) -> list[str]:
    """Publish ``count`` versions from four threads; a name given to several of them has its versions shared out."""
    failed: list[str] = []

    def work(index: int) -> None:
        stride = names.count(names[index])
        first = 1 + names[:index].count(names[index])
        failed.extend(publish(root, names[index], range(first, first + stride * (count // len(names)), stride), keep))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


if __name__ == "__main__":
    command, root = sys.argv[1], Path(sys.argv[2])
    if command == "read":
        print("ready", flush=True)
        reads, wrong = read_until(root, (root / "stop").exists)
        print(reads, *wrong[:1])
    else:
        first, step, count, keep = map(int, sys.argv[4:])
        print(*publish(root, sys.argv[3], range(first, first + step * count, step), keep), sep="\n", end="")
