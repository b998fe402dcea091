"""What a run says of itself: the machine, the tables, the JSON document."""

import datetime
import os
import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from limits import BYTES_PER_PARAMETER, Limits
from oracle import NORM_TOLERANCE, TOLERANCES
from roster import CYLORA, PEERS, version_of
from turns import FAILED, LEFT_OUT, MISSING, OK, WRONG, Result

import cylora
from cylora import optimizer

Cells = list[list[str]]


def cpu_name() -> str:
    """Read the model name from Linux; elsewhere whatever Python knows."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def compiler() -> str:
    """Name the compiler that built the kernels, from the comment it left in them."""
    for library in Path(cylora.__file__).parent.glob("kernels/*.so"):
        found = re.search(rb"(GCC: \([^)\0]*\) [\d.]+|clang version [\d.]+)", library.read_bytes())
        if found:
            return found[1].decode()
    return "unknown"


def describe_machine(threads: Iterable[int]) -> dict[str, str | int]:
    """Collect what a figure needs beside it."""
    libraries = sorted({name for peer in PEERS for name in peer.needs} - {"numpy"})
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cylora": cylora.__version__,
        "isa": optimizer.isa,
        "compiler": compiler(),
        "threads": " and ".join(map(str, threads)),
        "numpy": np.__version__,
        **{name: version_of(name) or MISSING for name in libraries},
        "command": " ".join(["python", "bench/peers.py", *sys.argv[1:]]),
    }


def laid_out(rows: Cells, *, markdown: bool, left: int = 1) -> str:
    """Align rows of which the first is the head; the first ``left`` columns to the left."""
    if markdown:
        rules = ["---" if i < left else "---:" for i in range(len(rows[0]))]
        return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rules, *rows[1:]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def ratio_table(results: list[Result], *, markdown: bool) -> str:
    """Lay out one subject, cache and number of threads: cylora's microseconds, then who takes how many times as long.

    Below it, why a cell has no figure.
    """
    cases = list(dict.fromkeys(r.case for r in results))
    peers = list(dict.fromkeys(r.peer for r in results))
    base = {r.case: r.median_us for r in results if r.peer == CYLORA}
    found = {(r.peer, r.case): r for r in results}
    rows = [["parameters", *cases]]
    rows.append([f"{CYLORA}, us", *(microseconds(base[case]) for case in cases)])
    notes = []
    for peer in peers:
        if peer == CYLORA:
            continue
        cells = []
        for case in cases:
            r = found[peer, case]
            if r.status == OK:
                if (r.norm_error or 0) > NORM_TOLERANCE:
                    notes.append(f"{peer}, {case}: counted, but its norm, a float32 sum, is off by {r.norm_error:.2g}")
                ratio = times(r.median_us / base[case])
                cells.append(ratio if markdown else f"{ratio} ({microseconds(r.median_us)})")
            else:
                cells.append({WRONG: "WRONG", FAILED: "failed", MISSING: MISSING, LEFT_OUT: "-"}[r.status])
                notes.append(
                    f"{peer}, {case}: {r.status}: {r.note}" if r.status in (WRONG, FAILED) else f"{peer}: {r.note}"
                )
        rows.append([peer, *cells])
    text = laid_out(rows, markdown=markdown)
    return "\n".join([text, *([""] if notes else []), *dict.fromkeys(notes)])


def microseconds(value: float) -> str:
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 2 else f"{ratio:.1f}x" if ratio < 20 else f"{ratio:.0f}x"


def target_table(rows: list[dict[str, str | float | None]], *, markdown: bool) -> str:
    """Lay out `targets.verdicts`."""
    cells = [["case", "cylora's form", "against", "threads", "wanted", "measured", "reached"]]
    for row in rows:
        measured = "-" if row["measured"] is None else times(row["measured"])
        wanted = f"{row['wanted']:g}x"
        cells.append(
            [row["case"], row["cylora"], row["against"], str(row["threads"]), wanted, measured, row["reached"]]
        )
    return laid_out(cells, markdown=markdown, left=3)


def footprint_table(found: dict[str, dict[str, float | str]], *, markdown: bool) -> str:
    """Lay out `footprint.footprints`."""
    rows = [["peer", "imports", "import, ms", "import, MiB", "holds, bytes/parameter", "a step adds, bytes/parameter"]]
    for name, figures in found.items():
        if "note" in figures:
            rows.append([name, figures["note"], "-", "-", "-", "-"])
            continue
        numbers = [f"{figures[key]:,.0f}" for key in ("import_ms", "import_mib")]
        numbers += [f"{figures[key]:.1f}" for key in ("held_bytes_per_parameter", "step_adds_bytes_per_parameter")]
        rows.append([name, figures["imports"], *numbers])
    return laid_out(rows, markdown=markdown, left=2)


def limit_table(found: dict[int, Limits], *, markdown: bool) -> str:
    """Lay out `limits.limits` of each number of threads."""
    rows = [["threads", "divider, ns/parameter", "memory, ns/parameter", "GB/s"]]
    for threads, figures in found.items():
        divider = "needs numba" if figures["divider_ns"] is None else f"{figures['divider_ns']:.3f}"
        memory = figures["memory_ns"]
        rows.append([str(threads), divider, f"{memory:.3f}", f"{BYTES_PER_PARAMETER / memory:.0f}"])
    return laid_out(rows, markdown=markdown)


def how_checked(results: list[Result]) -> str:
    """Say what "right" means for each kind of state that was measured."""
    lines = []
    for state in dict.fromkeys(r.state for r in results if r.status == OK):
        worst = max(
            (r.error for r in results if r.status == OK and r.state == state and r.error is not None), default=0
        )
        tolerance = TOLERANCES[state]
        lines.append(
            f"{state} state: after three steps each parameter within 3 x {tolerance.element:g} learning rates of the "
            f"float64 oracle, plus float32's roundings and what the error of a peer's own norm adds (largest found: "
            f"{worst:.2g}), their mean within 3 x {tolerance.bias:g}; after the timed "
            f"steps within {tolerance.drift:g} of the way on average, {tolerance.worst_drift:g} at most"
        )
    turns, disturbed = sum(r.turns for r in results), sum(r.disturbed_turns for r in results)
    lines.append(f"{disturbed:,} of {turns:,} turns were disturbed by other processes of this machine")
    return "\n".join(lines)
