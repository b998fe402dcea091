"""The kernels stay inside their buffers: inaccessible pages lie directly before and after each of them.

In a process of its own, so that a fault is a failed test that says at which length.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker_guard.py")


def run(what: str, isa: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "CYLORA_ISA": isa}
    return subprocess.run(
        [sys.executable, str(WORKER), what], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_kernels_touch_nothing_outside_their_buffers(isa: str) -> None:
    """Every length from 0 to 4,200, each buffer start-aligned and end-aligned; what lies beside it keeps its canary."""
    done = run("sweep", isa)
    last = done.stdout.splitlines()[-1].rpartition("\r")[2] if done.stdout else "nothing"
    assert done.returncode == 0, f"at {last}, exit {done.returncode}:\n{done.stderr[-3000:]}"
    assert last == f"done: 4201 lengths on {isa}"


def test_kernel_not_made_ready_raises_instead_of_crashing(isa: str) -> None:
    """A history or pending micro-batches that were never attached are no memory to write to."""
    done = run("unattached", isa)
    assert (done.returncode, done.stdout) == (0, "refused 4\n"), done.stderr[-3000:]


@pytest.mark.parametrize("where", ["overrun", "underrun"])
def test_kernel_reading_one_element_outside_dies(isa: str, where: str) -> None:
    """The guard itself: without it the test above could not fail."""
    done = run(where, isa)
    assert done.stdout.split() == ["reading"]
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS)
    assert "Segmentation fault" in done.stderr or "Bus error" in done.stderr
