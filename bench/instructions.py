"""Count the instructions of kernels and small steps: ``python bench/instructions.py`` compares with instructions.json.

A count, unlike a time, is the same on a busy machine, so it can decide about a change. It knows nothing of how long an
instruction takes: a division counts like an addition, a cache miss not at all. That is what peers.py is for.

Exit code 1: a figure has grown by more than its tolerance, or there are none to compare with. Figures that fell by more
than 5 % are pointed out. After a change that is meant to cost what it costs, or a new compiler, ``--update`` writes
instructions.json anew: the figures of this machine's kind, the others stay.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from counted import PER_PARAMETER

import cylora
from cylora import optimizer

COMMITTED = Path(__file__).with_name("instructions.json")
GROWTH = 0.02
# Per call 2 % would hide what matters: some look-ups of an attribute. Another folder moves it by up to 0.3 %.
CALL_GROWTH, CALL_SLACK = 0.005, 12.0
# Another interpreter, Cython or NumPy brings other instructions of its own to a call, not to a loop.
FOREIGN_GROWTH = 0.1
IMPROVEMENT = 0.05
# Which hashes collide in which table depends on the seed, which entries of the interpreter's caches on addresses. What
# has grown is counted again with others, and the least figure holds: more work is more with every seed.
SEEDS = (0, 1, 2)
VALGRIND = ("valgrind", "-q", "--tool=callgrind", "--dump-before=getppid", "--combine-dumps=yes", "--dump-line=no")
MISSING = "valgrind is needed to count instructions: apt-get install valgrind"

Figures = dict[str, float]


def count(isa: str, seed: int) -> Figures:
    """Run counted.py inside callgrind and return instructions per parameter or per call of each case."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        plan, output = Path(folder, "plan.json"), Path(folder, "callgrind.out")
        command = [*VALGRIND, f"--callgrind-out-file={output}", sys.executable, "-X", "utf8"]
        run = subprocess.run(
            [*command, str(Path(__file__).with_name("counted.py")), str(plan)],
            env=kept
            | {"CYLORA_ISA": isa, "PYTHONHASHSEED": str(seed), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode != 0 or not plan.exists():
            raise SystemExit(f"counting on {isa} failed with exit code {run.returncode}:\n{run.stdout}{run.stderr}")
        stretches = json.loads(plan.read_text())
        totals = [int(total) for total in re.findall(r"^totals: (\d+)", output.read_text(), re.MULTILINE)]
    if len(totals) != len(stretches) + 1:  # and what comes after the last mark
        raise SystemExit(f"callgrind must have written {len(stretches) + 1} parts, got {len(totals)}:\n{run.stderr}")
    return slopes(zip(stretches, totals, strict=False))


def slopes(parts) -> Figures:
    """Return, for each case, the least count of the larger amount less that of the smaller one, for one unit."""
    counts: dict[str, dict[int, int]] = {}
    for stretch, total in parts:
        if stretch is not None:
            name, amount = stretch
            least = counts.setdefault(name, {})
            least[amount] = min(total, least.get(amount, total))
    figures = {}
    for name, least in counts.items():
        small, large = sorted(least)
        figures[name] = round((least[large] - least[small]) / (large - small), 3 if name in PER_PARAMETER else 1)
    return figures


def least_of(runs: list[Figures]) -> Figures:
    """Return the least figure of each case."""
    return {name: min(run[name] for run in runs) for name in runs[0]}


def allowed(name: str, committed: float, *, same_tools: bool) -> float:
    """Return the largest count that still passes."""
    if name in PER_PARAMETER:
        return committed * (1 + GROWTH)
    return committed * (1 + (CALL_GROWTH if same_tools else FOREIGN_GROWTH)) + CALL_SLACK


def grown(found: Figures, committed: Figures, *, same_tools: bool) -> list[str]:
    """Name the cases that exceed what is allowed, or that are new."""
    limits = {name: allowed(name, committed.get(name, -1e9), same_tools=same_tools) for name in found}
    return [name for name, figure in found.items() if not figure <= limits[name]]


# ------------------------------------------------------------------ what figures belong to


def from_kernels(pattern: bytes) -> str:
    """Find what the compilers left in the built kernels."""
    for library in sorted(Path(cylora.__file__).parent.glob("kernels/*.so")):
        if found := re.search(pattern, library.read_bytes()):
            return found[1].decode()
    return "unknown"


def kind_of_machine(isa: str) -> str:
    """Return the key of the committed figures: what decides which instructions there are."""
    compiler = from_kernels(rb"(GCC: \([^)\0]*\) \d+|clang version \d+)").replace("clang version", "clang: ()")
    name, version = compiler.split(":")[0], compiler.split()[-1]
    return f"{platform.machine()}, {name} {version}, Python {'.'.join(platform.python_version_tuple()[:2])}, {isa}"


def versions() -> dict[str, str]:
    """Return what else may move a figure; noted beside them."""
    return {
        "python": f"{platform.python_version()}, {platform.python_compiler()}",
        "compiler": from_kernels(rb"(GCC: \([^)\0]*\) [\d.]+|clang version [\d.]+)"),
        "cython": from_kernels(rb"_cython_(\d+_\d+\w*)").replace("_", "."),
        "numpy": np.__version__,
        "libc": " ".join(platform.libc_ver()),
        "valgrind": subprocess.check_output(["valgrind", "--version"], text=True).strip(),
    }


def instruction_sets() -> list[str]:
    """Return those built that this CPU runs; the one CYLORA_ISA asks for, if it does."""
    if os.environ.get("CYLORA_ISA"):
        return [optimizer.isa]
    return [isa for isa in optimizer.variants if isa in ("baseline", optimizer.isa)]


# ------------------------------------------------------------------ the run


def table(isa: str, found: Figures, committed: Figures, *, everything: bool, same_tools: bool = True) -> str:
    """Lay out what has grown, what fell, and if asked for the rest."""
    lines = []
    for name, figure in found.items():
        before = committed.get(name)
        change = "new" if before is None else f"{100 * (figure / before - 1):+.1f} %"
        verdict = ""
        if before is None or figure > allowed(name, before, same_tools=same_tools):
            verdict = "GREW" if before is not None else "NOT IN THE FILE"
        elif figure < before * (1 - IMPROVEMENT):
            verdict = "fell: --update tightens the figure"
        if verdict or everything:
            unit = "parameter" if name in PER_PARAMETER else "call"
            was = "-" if before is None else f"{before:,.12g}"
            lines.append(f"  {name:<48} {was:>10} {figure:>12,.12g} per {unit:<10} {change:>9}  {verdict}".rstrip())
    lines += [f"  {name}: in the file, but no longer counted: --update" for name in committed if name not in found]
    return "\n".join([f"{isa}: {len(found)} figures", *lines])


def compare(isa: str, first: Figures, entry: dict | None, *, everything: bool) -> bool:
    """Print one instruction set's figures; return whether they pass."""
    if entry is None:
        print(table(isa, first, {}, everything=True))
        key = kind_of_machine(isa)
        print(f"NOTHING TO COMPARE WITH: {COMMITTED.name} has no figures for {key!r}; --update adds these")
        return False
    committed: Figures = entry["instructions"]
    changed = [f"{key} was {was}, is {versions()[key]}" for key, was in entry["with"].items() if was != versions()[key]]
    same_tools = not changed
    runs = [first]
    for seed in SEEDS[1:]:
        if set(grown(least_of(runs), committed, same_tools=same_tools)) & set(committed):
            runs.append(count(isa, seed))
    found = least_of(runs)
    print(table(isa, found, committed, everything=everything, same_tools=same_tools))
    failed = bool(grown(found, committed, same_tools=same_tools)) or set(found) != set(committed)
    if changed:
        print(f"  Other tools than when the figures were written, so calls may grow by 10 %: {'; '.join(changed)}")
    return not failed


def main(argv: list[str] | None = None) -> int:
    """Count, then compare or write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write instructions.json instead of comparing with it")
    parser.add_argument("--all", action="store_true", help="print every figure, not only what changed")
    options = parser.parse_args(argv)
    if shutil.which("valgrind") is None:
        print(MISSING, file=sys.stderr)
        return 1
    isas = instruction_sets()
    committed = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    jobs = [(isa, seed) for isa in isas for seed in (SEEDS if options.update else SEEDS[:1])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = list(pool.map(lambda job: count(*job), jobs))
    by_isa = {isa: [run for (of, _), run in zip(jobs, runs, strict=True) if of == isa] for isa in isas}
    if options.update:
        for isa in isas:
            figures = least_of(by_isa[isa])
            print(table(isa, figures, committed.get(kind_of_machine(isa), {}).get("instructions", {}), everything=True))
            committed[kind_of_machine(isa)] = {"with": versions(), "instructions": figures}
        COMMITTED.write_text(json.dumps(dict(sorted(committed.items())), indent=1) + "\n")
        return 0
    passed = [compare(isa, by_isa[isa][0], committed.get(kind_of_machine(isa)), everything=options.all) for isa in isas]
    for isa in set(optimizer.variants) - set(isas):
        print(f"NOT COUNTED: {isa}, which this CPU cannot run or CYLORA_ISA excludes")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
