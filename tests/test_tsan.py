"""The kernels, the pool of threads and publishing under ThreadSanitizer: no report.

cylora is built with GCC's -fsanitize=thread and used by the real interpreter, into which the runtime is preloaded. The
interpreter and NumPy are not instrumented: of what they do, their locks, threads and copies are seen. Nothing is
suppressed.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from worker_tsan import WORKS

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).parent / "worker_tsan.py"
REPORT, FOUND = "WARNING: ThreadSanitizer", 66

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def instrumented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a cylora whose kernels are instrumented."""
    tree = tmp_path_factory.mktemp("tsan")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    flags = "-fsanitize=thread"
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree, env=os.environ | {"CC": "gcc", "LDSHARED": "gcc -shared", "CFLAGS": f"{flags} -g1", "LDFLAGS": flags},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / "src"


def watched(folder: Path, what: str, rounds: int) -> subprocess.CompletedProcess[str]:
    """Run some work under ThreadSanitizer."""
    name = "libtsan.so"
    runtime = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    assert runtime.strip() != name, "GCC has no ThreadSanitizer"
    return subprocess.run(
        [sys.executable, WORKER, what, str(rounds)],
        env=os.environ | {"LD_PRELOAD": runtime.strip(), "PYTHONPATH": str(folder),
                          "TSAN_OPTIONS": f"halt_on_error=0 exitcode={FOUND} history_size=7"},
        capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip


@pytest.mark.parametrize("what", [name for name in WORKS if name != "race"])
def test_no_data_race_is_found(instrumented: Path, what: str, figures: Callable[..., None]) -> None:
    rounds = 500
    done = watched(instrumented, what, rounds)
    assert REPORT not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    figures(work=what, rounds=rounds, seen=done.stdout.strip(), reports=0)


def test_a_data_race_would_be_found(instrumented: Path) -> None:
    """Two trainers on the same parameters: the loops of the kernels are instrumented, and the threads overlap."""
    reports = ""
    for _ in range(20):
        reports += watched(instrumented, "race", 200).stderr
        if REPORT in reports:
            break
    assert "data race" in reports
    assert "_loops.pxi" in reports or "cylora/kernels" in reports
