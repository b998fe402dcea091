"""What `cylora info` prints: the facts a bug report or a benchmark figure needs."""

import importlib.metadata
import os
import platform
from pathlib import Path

import numpy as np

from cylora import __version__
from cylora.config import thread_count
from cylora.optimizer import isa, variants

__all__ = ["EXTRAS", "system_facts"]

EXTRAS = ("tqdm", "matplotlib", "tomli-w")  # distributions of the extra "train"


def system_facts() -> dict[str, str]:
    """Return name and value of each fact, in the order to print them."""
    return {
        "cylora": __version__,
        "instruction set": f"{isa} (built: {', '.join(variants)})",
        "threads": f"{thread_count(None)} unless a config says otherwise ({_usable_cpus()} CPUs usable)",
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "NumPy": f"{np.__version__} ({_blas()})",
        "extra 'train'": ", ".join(f"{name} {_version(name)}" for name in EXTRAS),
        "CPU": _cpu_model(Path("/proc/cpuinfo")),
        "platform": platform.platform(),
    }


def _usable_cpus() -> int:
    # Python on macOS has no affinity to ask about.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _blas() -> str:
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _cpu_model(cpuinfo: Path) -> str:
    """Return the model's name as Linux gives it, or else what Python knows."""
    try:
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, colon, value = line.partition(":")
            if colon and name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
