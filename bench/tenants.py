"""Thousands of tenants in one process, each with an optimizer: ``python bench/tenants.py``.

How long one step of all of them takes through `AdapterStore.step_many`, against a loop of ``clip_grad_norm_`` and
``torch.optim.AdamW(fused=True)`` over as many parameters and optimizers, with the same gradients, each in a process of
its own, in turns (turns.py) and checked against the float64 oracle before and after. Then what the process of a store
grows by until all histories are full. 10,000 tenants of rank 8 at d 512, 8,192 parameters each; 500 with ``--quick``.
"""

import argparse
import gc
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from cases import MANY, SOME
from oracle import SHARED, WrongResultError
from report import describe_machine
from roster import BOTH, NAMES, TORCH_MANY
from turns import OK, Field, Result, Turns

from cylora import LoraAdapter, LoraTrainingConfig
from cylora.serving import AdapterStore

TURNS = Turns(turns=9, turns_when_big=9, turn_seconds=0.3)
HISTORY = 100


def resident() -> int:
    """Return the bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def print_growth(count: int) -> None:
    """Print by how much the process grows with so many tenants, over their parameters and moments."""
    config = LoraTrainingConfig(warmup_steps=0, log_every=0, history_limit=HISTORY)
    gradient = np.full(8192, 0.01, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        store = AdapterStore(lambda _: LoraAdapter(512, 512, seed=0), config, folder=folder, memory_budget=2**40)
        gc.collect()
        before = resident()
        for index in range(count):
            store.create(f"user{index}@example.com")
        jobs = [(f"user{index}@example.com", 1.0, gradient) for index in range(count)]
        for _ in range(HISTORY + 1):
            for result in store.step_many(jobs):
                if isinstance(result, Exception):
                    raise result
        del jobs
        gc.collect()
        grown, vectors = resident() - before, count * 8192 * 12
        print(f"{count} tenants: {grown / 1e6:.0f} MB resident for {vectors / 1e6:.0f} MB of parameters and moments:")
        print(f"{grown / vectors:.3f} times; counted by the store: {store.resident_bytes / 1e6:.0f} MB", flush=True)
        os._exit(0)  # not closed: it would write every tenant


def print_times(results: list[Result], count: int) -> None:
    """Print what each takes for a step of all, and how many times as long the loop over optimizers takes."""
    loop = [r.median_us for r in results if r.peer == TORCH_MANY and r.status == OK]
    print(f"{'':44} threads   ms a step of all   tenants/s   times the loop's speed")
    for r in results:
        if r.status != OK or r.median_us is None:
            print(f"{r.peer:44} {r.threads:7}   {r.status}: {r.note}")
            continue
        ratio = f"{loop[0] / r.median_us:.1f}" if loop and loop[0] is not None else "-"
        print(f"{r.peer:44} {r.threads:7} {r.median_us / 1e3:18.1f} {count / r.median_us * 1e6:11,.0f} {ratio:>10}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="500 tenants, which fit no cache either")
    parser.add_argument("--growth", type=int, metavar="N", help="only print what N tenants take in this process")
    options = parser.parse_args()
    if options.growth:
        print_growth(options.growth)
    case = SOME if options.quick else MANY
    random.seed(0)
    print("\n".join(f"{key:>13}  {value}" for key, value in describe_machine(BOTH).items()), end="\n\n", flush=True)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as log:
        os.environ[SHARED] = folder
        with Field("tenants", NAMES, BOTH, log) as field:
            print_times(field.measure(case, TURNS, cold=False), len(case.adapters))
    print(flush=True)
    subprocess.run([sys.executable, __file__, "--growth", str(len(case.adapters))], check=True)


if __name__ == "__main__":
    try:
        main()
    except WrongResultError as error:
        sys.exit(f"tenants.py: error: {error}")
