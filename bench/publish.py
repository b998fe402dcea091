"""Publishing: how long `AdapterPublisher.publish` takes, beside a plain copy and a sha256 of the same bytes.

The sides take turns; a ratio is the median over the turns. The content's hash is computed when it is first asked for,
so it is timed on its own. What a reader pays, `latest`, is timed too.

``python bench/publish.py [--quick]``
"""

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable

import numpy as np

from cylora import AdapterSet, LoraAdapter, LoraConfig, LoraTrainer
from cylora.serving import AdapterPublisher

TURNS, QUICK_TURNS = 101, 11


# How many pairs of matrices, their width, their rank.
SUBJECTS = {
    "one pair": (1, 512, 8),
    "one pair, large": (1, 65_536, 8),
    "128 pairs, small": (128, 128, 8),
    "128 pairs, large": (128, 4096, 16),
}


def subject(pairs: int, width: int, rank: int) -> LoraAdapter | AdapterSet:
    """Return adapters to be published."""
    config = LoraConfig(rank=rank)
    if pairs == 1:
        return LoraAdapter(width, width, config, seed=0)
    return AdapterSet({f"model.layers.{number}.mlp.up_proj": (width, width) for number in range(pairs)}, config, seed=0)


def microseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    result = call()
    passed = time.perf_counter() - started
    del result
    return 1e6 * passed


def measured(adapters: LoraAdapter | AdapterSet, turns: int) -> dict[str, object]:
    """Return medians in microseconds, and whether what was published is what was there."""
    publisher = AdapterPublisher(adapters, LoraTrainer())
    source = adapters.flat.vector
    targets = [np.empty_like(source) for _ in range(3)]  # as many as the publisher fills by turns
    sides: dict[str, Callable[[], object]] = {
        "publish": publisher.publish,
        "copy": lambda: np.copyto(targets[len(times["copy"]) % 3], source),
        "hash": lambda: publisher.rollback(publisher.latest.version).content_hash,  # of a version that knows none yet
        "sha256": lambda: hashlib.sha256(source).hexdigest(),
        "latest": lambda: publisher.latest.adapters,
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        for _ in range(4):
            call()
    for turn in range(turns):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            times[name].append(microseconds(sides[name]))
    correct = np.array_equal(publisher.publish().vector, source)
    return {
        "parameters": source.size,
        "correct": correct,
        **{f"{name}_us": statistics.median(values) for name, values in times.items()},
        "copies": statistics.median(a / b for a, b in zip(times["publish"], times["copy"], strict=True)),
        "hashes": statistics.median(a / b for a, b in zip(times["hash"], times["sha256"], strict=True)),
    }


def main() -> int:
    """Measure and print a table; the exit code says whether everything was correct."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few turns")
    turns = QUICK_TURNS if parser.parse_args().quick else TURNS
    print(f"{'':18}{'parameters':>12}{'publish us':>12}{'copies':>8}{'hash us':>10}{'sha256s':>9}{'latest us':>11}")
    rows = {name: measured(subject(*sizes), turns) for name, sizes in SUBJECTS.items()}
    for name, found in rows.items():
        times = f"{found['publish_us']:12.1f}{found['copies']:8.1f}{found['hash_us']:10.1f}{found['hashes']:9.2f}"
        print(f"{name:18}{found['parameters']:12,}{times}{found['latest_us']:11.2f}")
    correct = all(found["correct"] for found in rows.values())
    print(f"medians of {turns} turns; what is published is what was there: {correct}")
    return 0 if correct else 1


if __name__ == "__main__":
    raise SystemExit(main())
