"""Measure cylora against its peers in one run and print the ratios: ``python bench/report.py``.

All peers of a case take short turns in shuffled order in one process, on one thread, garbage collection off. A figure
is the median over the turns, and beside it the fastest turn; a ratio compares medians of the same run. Every peer is
checked against a float64 oracle before its turns and once more after them; a wrong result ends the run.

Warm means that a case's own arrays are the last thing the cache has seen. ``--cold`` sweeps 96 MiB through the cache
before each single call, as a forward and backward pass would.
"""

import os

# Read when NumPy loads: its dot product would otherwise take a second thread for itself.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import argparse
import datetime
import gc
import json
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from cases import CASES, Case, case_named
from peers import CYLORA, SUBJECTS
from timing import Stopwatch

import cylora
from cylora import optimizer

SWEEP_BYTES = 96 * 2**20
# Everything is allocated this many times: where arrays come to lie changes a median by up to a third.
PLACEMENTS = 3
# A turn during which another process had the core is done again.
ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Result:
    """One peer on one case."""

    subject: str
    case: str
    parameters: int
    peer: str
    cache: str
    median_us: float
    min_us: float
    turns: int
    calls_per_turn: int
    error: float
    correct: bool


def measure(subject_name: str, case: Case, *, turns: int, turn_seconds: float, cold: bool) -> list[Result]:
    """Check every peer of a subject, let them take turns, check what they left behind."""
    subject = SUBJECTS[subject_name]
    errors = {name: subject.check(case, build(case)) for name, build in subject.peers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in subject.peers}
    per_turn = dict.fromkeys(subject.peers, 1)
    for _ in range(PLACEMENTS):
        names = random.sample(list(subject.peers), len(subject.peers))
        built = {name: subject.peers[name](case) for name in names}
        watches = {name: Stopwatch(*subject.timed(case, peer)) for name, peer in built.items()}
        if not cold:
            per_turn = {name: watch.calls_lasting(turn_seconds) for name, watch in watches.items()}
        for name, taken in take_turns(watches, per_turn, turns // PLACEMENTS, cold=cold):
            seconds[name].append(taken)
        for name, peer in built.items():
            subject.check_after(case, peer, watches[name].calls)
    return [
        Result(
            subject=subject_name,
            case=case.name,
            parameters=case.parameters,
            peer=name,
            cache="cold" if cold else "warm",
            median_us=statistics.median(seconds[name]) * 1e6,
            min_us=min(seconds[name]) * 1e6,
            turns=len(seconds[name]),
            calls_per_turn=per_turn[name],
            error=errors[name],
            correct=True,
        )
        for name in subject.peers
    ]


def take_turns(
    watches: dict[str, Stopwatch], per_turn: dict[str, int], turns: int, *, cold: bool
) -> Iterator[tuple[str, float]]:
    """Yield (peer, seconds per call) of turns in shuffled order."""
    sweep = np.zeros(SWEEP_BYTES // 8, np.int64) if cold else None
    order = list(watches)
    gc.collect()
    gc.disable()
    try:
        for name in order:
            watches[name].seconds(1)  # page faults
        for _ in range(turns):
            random.shuffle(order)
            for name in order:
                for _ in range(ATTEMPTS):
                    if sweep is not None:
                        sweep += 1
                    else:
                        watches[name].seconds(1)  # what the turn before left in the cache belongs to another peer
                    seconds = watches[name].seconds(per_turn[name])
                    if not watches[name].was_disturbed:
                        break
                yield name, seconds
    finally:
        gc.enable()


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


def describe_machine() -> dict[str, str | int]:
    """Collect what a figure needs beside it."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cylora": cylora.__version__,
        "isa": optimizer.isa,
        "compiler": compiler(),
        "command": " ".join(["python", "bench/report.py", *sys.argv[1:]]),
    }


def as_table(results: list[Result], *, markdown: bool) -> str:
    """Lay out one subject: cylora's microseconds, then how many times as long each peer takes."""
    cases = list(dict.fromkeys(r.case for r in results))
    peers = [name for name in dict.fromkeys(r.peer for r in results) if name != CYLORA]
    rows = [["parameters", "cylora, us", *peers]]
    for case in cases:
        mine = {r.peer: r for r in results if r.case == case}
        base = mine[CYLORA]
        row = [case, f"{base.median_us:,.2f}" if base.median_us < 100 else f"{base.median_us:,.0f}"]
        for name in peers:
            ratio = mine[name].median_us / base.median_us
            row.append(
                f"{ratio:.1f}x"
                if markdown
                else f"{ratio:6.2f}x  ({mine[name].median_us:,.1f}; min {mine[name].min_us / base.min_us:.2f}x)"
            )
        rows.append(row)
    if markdown:
        rows.insert(1, ["---:"] * len(rows[0]))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def draw(results: list[Result], machine: dict[str, str | int], path: Path) -> None:
    """Draw the peers' ratios over size, one panel per subject."""
    import matplotlib  # noqa: PLC0415 - last, so that the table needs none

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    groups = list(dict.fromkeys((r.subject, r.cache) for r in results))
    figure, panels = plt.subplots(1, len(groups), figsize=(5.2 * len(groups), 4.8), squeeze=False, sharey=True)
    peers = list(dict.fromkeys(r.peer for r in results if r.peer != CYLORA))
    colors = {peer: f"C{i}" for i, peer in enumerate(peers)}
    for panel, (subject, cache) in zip(panels[0], groups, strict=True):
        chosen = [r for r in results if (r.subject, r.cache) == (subject, cache)]
        base = {r.case: r.median_us for r in chosen if r.peer == CYLORA}
        for peer in dict.fromkeys(r.peer for r in chosen if r.peer != CYLORA):
            points = sorted((r.parameters, r.median_us / base[r.case], r.case) for r in chosen if r.peer == peer)
            single = [p for p in points if " x " not in p[2]]
            panel.plot([p[0] for p in single], [p[1] for p in single], "o-", label=peer, color=colors[peer])
            models = [p for p in points if " x " in p[2]]
            panel.plot([p[0] for p in models], [p[1] for p in models], "D", mfc="none", color=colors[peer])
        panel.axhline(1.0, color="0.5", linewidth=1)
        panel.set_xscale("log")
        panel.set_yscale("log")
        ticks = [0.5, 1, 2, 3, 5, 10, 20, 50]
        panel.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.set_title(f"{subject}, {cache} cache")
        panel.legend(loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=2, frameon=False, fontsize=8)
        panel.set_xlabel("parameters (hollow: a model of many matrices)")
    panels[0][0].set_ylabel("time of the peer / time of cylora")
    figure.suptitle("{cpu}, Python {python}, NumPy {numpy}, {isa}, one thread, {date}".format(**machine), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), metavar="NAME")
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES], metavar="SIZE")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns, for a first look")
    parser.add_argument("--cold", action="store_true", help="sweep the cache before each call")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument(
        "--png",
        type=Path,
        metavar="FILE",
        default=Path(__file__).with_suffix(".png"),
        help="where to draw ratio over size (default: bench/report.png)",
    )
    options = parser.parse_args(argv)
    try:
        options.cases = [case_named(name) for name in options.cases]
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse(argv)
    random.seed(options.seed)
    machine = describe_machine()
    turns, turn_seconds = (9, 0.002) if options.quick else (42, 0.005)
    print("  ".join(f"{key}: {value}" for key, value in machine.items()), end="\n\n")
    results: list[Result] = []
    started = time.perf_counter()
    for subject in options.subjects:
        for case in options.cases:
            big = case.parameters > 4_000_000
            print(f"{subject} {case.name} ...", end="\r", file=sys.stderr, flush=True)
            results += measure(
                subject, case, turns=turns // 2 if big else turns, turn_seconds=turn_seconds, cold=options.cold
            )
        table = as_table([r for r in results if r.subject == subject], markdown=options.markdown)
        print(f"{subject}, {'cold' if options.cold else 'warm'} cache: time over cylora's\n\n{table}\n", flush=True)
    print(f"every result within its tolerance of the float64 oracle; {time.perf_counter() - started:.0f} s")
    if options.json:
        document = {"machine": machine, "results": [asdict(r) for r in results]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    draw(results, machine, options.png)
    print(f"drawn: {options.png}", file=sys.stderr)


if __name__ == "__main__":
    main()
