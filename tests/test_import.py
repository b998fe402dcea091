"""Importing cylora is quiet: what the process had before, it has after."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# NumPy first: what it starts and sets is not cylora's doing.
PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import atexit, faulthandler, gc, json, locale, logging, os, random, resource, signal, threading, warnings
import numpy as np
import fp_state

events, watching = [], True
LOUD = set(
    "socket subprocess ctypes pty shutil tempfile signal http urllib mmap fcntl syslog resource "
    "os.system os.fork os.forkpty os.posix_spawn os.exec os.putenv os.unsetenv os.chdir os.remove os.mkdir os.rename "
    "os.chmod os.kill os.truncate sys.setprofile sys.settrace sys.addaudithook".split()
)

def audit(name, arguments):
    if not watching:
        return
    if name == "open":
        flags = arguments[2]
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            events.append([name, str(arguments[0])])
    elif name.split(".")[0] in LOUD or name in LOUD:
        events.append([name, repr(arguments)])

def link(fd):
    path = f"/proc/self/fd/{{fd}}"
    return os.readlink(path) if os.path.islink(path) else "the listing itself"

def snapshot():
    return {{
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "tasks": len(os.listdir("/proc/self/task")),
        "files": sorted(map(link, os.listdir("/proc/self/fd"))),
        "signals": {{str(s): repr(signal.getsignal(s)) for s in signal.valid_signals()}},
        "mask": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        "timers": [signal.getitimer(t) for t in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)],
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "umask": (lambda mask: (os.umask(mask), mask)[1])(os.umask(0)),
        "numpy errors": np.geterr(),
        "numpy random": repr(np.random.get_state()),
        "random": hash(random.getstate()),
        "floating point": [fp_state.control(), 1e-310 * 1.0, (0.1 + 0.2) * 3],
        "recursion": sys.getrecursionlimit(),
        "switch interval": sys.getswitchinterval(),
        "gc": [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), len(gc.callbacks)],
        "warnings": repr(warnings.filters),
        "hooks": [repr(x) for x in (sys.excepthook, sys.displayhook, sys.unraisablehook, threading.excepthook)],
        "traces": [repr(x) for x in (sys.gettrace(), sys.getprofile())],
        "path": [sys.path, len(sys.meta_path), len(sys.path_hooks)],
        "logging": [[x.level, repr(x.handlers)] for x in (logging.root, logging.getLogger("cylora"))],
        "locale": locale.setlocale(locale.LC_ALL),
        "faulthandler": faulthandler.is_enabled(),
        "exit functions": atexit._ncallbacks(),
        "limits": [resource.getrlimit(r) for r in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_CORE)],
    }}

{before}
first = snapshot()
sys.addaudithook(audit)
import cylora
watching = False
second = snapshot()
print(json.dumps({{
    "changed": {{key: [first[key], second[key]] for key in first if first[key] != second[key]}},
    "events": events,
    "modules": sorted(sys.modules),
}}))
"""


def imported(before: str = "", **environment: str) -> dict:
    """Import cylora in a process of its own and return what that did."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", PROGRAM.format(before=before, tests=str(TESTS))],
        capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return json.loads(done.stdout)


def test_import_changes_nothing_in_the_process() -> None:
    report = imported()
    assert report["changed"] == {}
    assert report["events"] == []


@pytest.mark.parametrize("state", ["flush", "down", "up", "zero"])
def test_import_leaves_the_hosts_floating_point_state(state: str) -> None:
    report = imported(f"import fp_state; fp_state.enter({state!r})")
    assert report["changed"] == {}


def test_import_loads_only_what_it_needs() -> None:
    modules = set(imported()["modules"])
    roots = {name.split(".")[0] for name in modules}
    assert not roots & {
        "torch", "peft", "mpi4py", "transformers", "matplotlib", "tqdm", "tomli_w", "tomllib", "safetensors", "scipy",
        "multiprocessing", "concurrent", "asyncio", "socket", "ssl", "http", "pandas", "Cython",
    }  # fmt: skip
    ours = {name for name in modules if name.startswith("cylora")}
    assert "cylora.trainer" in ours
    parts = {name.split(".")[1] for name in ours if "." in name}
    assert not parts & {"cli", "tasks", "formats", "serving", "integrations"}
    assert len({"cylora.kernels._baseline", "cylora.kernels._x86_64_v3"} & ours) == 1, "exactly one set of loops"


def test_the_report_notices_a_loud_import() -> None:
    """The same report, with the deeds done before the first snapshot moved behind it."""
    loud = """
import builtins
class Loud:
    def find_spec(self, name, path=None, target=None):
        if name == "cylora.errors":
            os.environ["LOUD"] = "1"
            threading.Thread(target=threading.Event().wait, daemon=True, name="loud").start()
            self.file = open("/dev/null", "w")
            signal.signal(signal.SIGUSR1, lambda *a: None)
            fp_state.enter("flush")
            import tempfile
sys.meta_path.insert(0, Loud())
"""
    report = imported(loud)
    assert {"environment", "threads", "tasks", "files", "signals", "floating point"} <= set(report["changed"])
    assert {"open"} <= {name for name, _ in report["events"]}


def test_public_names_are_all_there() -> None:
    import cylora

    for name in cylora.__all__:
        assert getattr(cylora, name) is not None
    assert sorted(cylora.__all__) == list(cylora.__all__)
    assert cylora.__version__.count(".") == 2
