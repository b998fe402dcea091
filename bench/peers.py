"""Measure cylora against its peers in one run and print the ratios: ``python bench/peers.py``.

Each peer has a process of its own (worker.py); they take short turns in shuffled order, garbage collection off, all
others asleep. A figure is the median over the turns; a ratio compares medians of the same run. Every peer is checked
against a float64 oracle before its turns and once more after them: a wrong peer is named and does not count, a wrong
cylora ends the run.

Warm means that a case's own arrays are the last thing the cache has seen. Cold means that 96 MiB were swept through the
cache before each single call, as a forward and backward pass would. The whole run measures everything warm and the
steps of up to a million parameters cold; then memory and imports, each in fresh processes; then the targets.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cases import CASES, MANY, SOME, Case, case_named
from footprint import footprints
from limits import best_of, limits
from oracle import SHARED, WrongResultError
from picture import draw
from report import describe_machine, footprint_table, how_checked, limit_table, ratio_table, target_table
from roster import BOTH, CYLORA, NAMES, PEERS
from subjects import SUBJECTS
from targets import TARGETS, verdicts
from turns import Field, Result, Turns

HERE = Path(__file__).parent
LARGEST_COLD = 1_048_576
FULL = Turns(turns=30, turns_when_big=12, turn_seconds=0.005)
QUICK = Turns(turns=6, turns_when_big=3, turn_seconds=0.002)


@dataclass(frozen=True, slots=True)
class Plan:
    """Some cases of one subject in one state of the cache, and who takes part."""

    subject: str
    cases: tuple[Case, ...]
    names: tuple[str, ...]
    threads: tuple[int, ...]
    cold: bool

    @property
    def title(self) -> str:
        """Name subject and cache."""
        return f"{self.subject}, {'cold' if self.cold else 'warm'} cache"


def plans(options: argparse.Namespace) -> Iterator[Plan]:
    """Yield what to measure, from the command line."""
    names = tuple({CYLORA, *options.peers})
    for subject in options.subjects:
        if subject in ("many", "tenants"):
            known = (SOME, MANY) if options.cases else (SOME,) if options.quick else (MANY,)
        else:
            known = CASES
        cases = tuple(case for case in options.cases or known if case in known)
        if not options.cold and cases:
            yield Plan(subject, cases, names, options.threads, cold=False)
        small = tuple(case for case in cases if case.parameters <= LARGEST_COLD or options.cold)
        if small and (options.cold or (subject == "trainer" and not options.quick)):
            yield Plan(subject, small, names, options.threads, cold=True)


def plans_for_targets() -> Iterator[Plan]:
    """Yield what the targets need and no more."""
    for subject, cold in dict.fromkeys((t.subject, t.cache == "cold") for t in TARGETS):
        chosen = [t for t in TARGETS if (t.subject, t.cache == "cold") == (subject, cold)]
        cases = tuple(dict.fromkeys(case_named(t.case) for t in chosen))
        names = tuple({CYLORA, *(name for t in chosen for name, _ in t.needs())})
        yield Plan(subject, cases, names, BOTH, cold)


def run(plan: Plan, turns: Turns, log: Any) -> list[Result]:
    """Measure one plan, a case after the other."""
    results: list[Result] = []
    with Field(plan.subject, plan.names, plan.threads, log) as field:
        for case in plan.cases:
            print(f"{plan.title}: {case.name} ...", file=sys.stderr, flush=True)
            results += field.measure(case, turns, cold=plan.cold)
            for truth in Path(os.environ[SHARED]).iterdir():
                truth.unlink()
    return results


def show(plan: Plan, results: list[Result], *, markdown: bool) -> None:
    """Print a plan's tables, one for each number of threads."""
    for threads in sorted({r.threads for r in results}):
        chosen = [r for r in results if r.threads == threads]
        title = f"{plan.title}, {threads} thread{'s' if threads > 1 else ''}: time over cylora's"
        print(f"{title}\n\n{ratio_table(chosen, markdown=markdown)}\n", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), metavar="NAME")
    parser.add_argument("--cases", nargs="+", type=_case, metavar="SIZE", help="as 8192 or '448 x 4,096'")
    parser.add_argument("--peers", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--threads", nargs="+", type=int, choices=BOTH, default=list(BOTH), metavar="N", help="1, 2")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns, for a first look")
    parser.add_argument(
        "--cold", action="store_true", help="only with a cache swept before each call, whatever the size"
    )
    parser.add_argument("--targets", action="store_true", help="measure what the table of targets needs and no more")
    parser.add_argument("--no-footprint", action="store_true", help="leave out memory and imports")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=HERE / "peers.json", help="where every figure goes"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", default=HERE / "peers.png", help="where the picture goes")
    parser.add_argument("--log", type=Path, metavar="FILE", help="where the peers' own output goes (default: nowhere)")
    options = parser.parse_args(argv)
    options.threads = BOTH if options.targets else tuple(options.threads)
    return options


def _case(name: str) -> Case:
    try:
        return case_named(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse(argv)
    random.seed(options.seed)
    started = time.perf_counter()
    machine = describe_machine(options.threads)
    print("\n".join(f"{key:>13}  {value}" for key, value in machine.items()), end="\n\n")
    before = {threads: limits(threads) for threads in options.threads}
    results: list[Result] = []
    turns = QUICK if options.quick else FULL
    chosen = list(plans_for_targets() if options.targets else plans(options))
    with tempfile.TemporaryDirectory() as folder, open(options.log or "/dev/null", "w") as log:
        os.environ[SHARED] = folder
        for plan in chosen:
            measured = run(plan, turns, log)
            show(plan, measured, markdown=options.markdown)
            results += measured
        held = {} if options.no_footprint else footprints(_steppers(options.peers), 1 if options.quick else 7, log)
    if held:
        print(f"imports and memory\n\n{footprint_table(held, markdown=options.markdown)}\n")
    reached = verdicts(results)
    print(f"targets\n\n{target_table(reached, markdown=options.markdown)}\n")
    found = {threads: best_of(first, limits(threads)) for threads, first in before.items()}
    print(f"limits\n\n{limit_table(found, markdown=options.markdown)}\n")
    print(f"{how_checked(results)}\n\n{time.perf_counter() - started:.0f} s")
    document = {
        "machine": machine,
        "results": [asdict(r) for r in results],
        "targets": reached,
        "footprints": held,
        "limits": found,
    }
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {options.json}")
    if draw(results, found, machine, options.png):
        print(f"drawn: {options.png}")


def _steppers(names: list[str]) -> list[str]:
    return [peer.name for peer in PEERS if peer.subject == "trainer" and peer.name in names]


if __name__ == "__main__":
    try:
        main()
    except WrongResultError as error:
        sys.exit(f"peers.py: error: {error}")
