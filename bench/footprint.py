"""What a peer costs beside time: its import, and the memory it holds. Each figure comes from a fresh process.

``python bench/footprint.py NAME`` measures one peer in this process and prints JSON; `footprints` asks for many.
"""

import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CASE = "10,485,760"


def _kilobytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def _measure(name: str, *, holds: bool) -> dict[str, float]:
    """Import the peer's library, and if ``holds`` build a case, step twice and see what stays."""
    from roster import peer_named  # noqa: PLC0415 - imports nothing but the standard library

    peer = peer_named(name, "trainer")
    before = _kilobytes("VmRSS")
    started = time.perf_counter()
    for module in peer.imports:
        importlib.import_module(module)
    figures = {"import_ms": (time.perf_counter() - started) * 1e3, "import_mib": (_kilobytes("VmRSS") - before) / 1024}
    if not holds:
        return figures
    from cases import case_named, gradient  # noqa: PLC0415 - these import NumPy and cylora

    build, case = peer.load(), case_named(CASE)
    small = case_named("8,192")
    warm = build(small, 1)  # what the library allocates once
    warm.load(gradient(small, 0, warm.dtype))
    warm.call(*warm.args)
    del warm
    before = _kilobytes("VmRSS")
    built = build(case, 1)
    built.load(gradient(case, 0, built.dtype))
    built.call(*built.args)
    held = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    built.call(*built.args)
    per = 1024 / case.parameters
    return figures | {
        "held_bytes_per_parameter": (held - before) * per,
        "step_adds_bytes_per_parameter": max(0, _kilobytes("VmHWM") - held) * per,
    }


def footprints(names: list[str], tries: int, log: Any) -> dict[str, dict[str, float | str]]:
    """Measure each peer's import ``tries`` times (the median counts) and once what it holds."""
    from roster import environment, peer_named  # noqa: PLC0415 - this module is imported by the measured process too

    def run(name: str, *options: str) -> dict[str, float]:
        command = [sys.executable, __file__, name, *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=True, env=environment(1))
        return json.loads(done.stdout.splitlines()[-1])

    found: dict[str, dict[str, float | str]] = {}
    for name in names:
        peer = peer_named(name, "trainer")
        if peer.missing:
            found[name] = {"note": f"{', '.join(peer.missing)}: not installed"}
            continue
        try:
            imports = [run(name, "--import-only") for _ in range(tries)]
            medians = {key: statistics.median(i[key] for i in imports) for key in imports[0]}
            found[name] = {"imports": ", ".join(peer.imports)} | run(name) | medians
        except subprocess.CalledProcessError as error:
            found[name] = {"note": f"failed with exit code {error.returncode}"}
    return found


if __name__ == "__main__":
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no figure
    print(json.dumps(_measure(sys.argv[1], holds="--import-only" not in sys.argv)), file=output)
