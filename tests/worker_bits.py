"""Run every operation on the same inputs at many addresses and floating-point states; print their digests as JSON.

A process of its own for each instruction set: ``CYLORA_ISA`` is read once, at import. What differs between two
combinations must not show in the bits, so each (operation, size) must come out with one digest, here and elsewhere.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import fp_state
import kernel_calls
import numpy as np
from numpy.typing import NDArray
from reference import Rule

from cylora.adapter import AdapterSet, Gradients, LoraAdapter
from cylora.config import LoraConfig, LoraTrainingConfig
from cylora.optimizer import Adam, clip_grad_norm_, grad_norm, isa
from cylora.trainer import LoraTrainer

Floats = NDArray[np.float32]

SIZES = (
    0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 19, 23, 31, 32, 33, 47, 61, 63, 64, 65, 97, 127, 128, 129, 251, 257,
    509, 1021, 4099, 8191, 8192, 8193, 16384, 16411, 40961, 100_003,
)  # fmt: skip
OFFSETS = range(0, 64, 4)
SCHEDULES = ("constant", "linear", "cosine", "warmup_stable_decay")
RULES = (Rule(1e-3, weight_decay=0.1, max_norm=0.7), Rule(3e-3, 0.8, 0.99, 1e-6, 0.1, "l2", 1e-20))


def placed(values: Floats, offset: int) -> Floats:
    """Return a copy at ``offset`` bytes past a multiple of 64."""
    raw = np.zeros(values.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset % 64
    copy = raw[start : start + values.nbytes].view(np.float32)
    copy[...] = values
    return copy


def inputs(n: int) -> dict[str, Floats]:
    """Return one set of arrays for each size: every magnitude, denormals, zeros and ties among them."""
    rng = np.random.default_rng(n)
    g = rng.standard_normal(n) * 10.0 ** rng.integers(-44, 3, n)
    g[::7] = rng.integers(-5, 6, len(g[::7])) * 2.0**-12
    m = rng.standard_normal(n) * 10.0 ** rng.integers(-44, 0, n)
    v = rng.random(n) * 10.0 ** rng.integers(-44, 0, n)
    p = rng.standard_normal(n) * 10.0 ** rng.integers(-42, 1, n)
    return {name: x.astype(np.float32) for name, x in {"p": p, "g": g, "m": m, "v": v}.items()}


class Operation:
    """One operation, prepared on fresh copies at some address, then called once in some floating-point state."""

    def __init__(self, name: str, call: Callable[[], Any], outputs: list[Floats]) -> None:
        self.name, self.call, self.outputs = name, call, outputs

    def digest(self, returned: Any) -> str:
        numbers = np.array([x for x in np.ravel(returned) if x is not None], np.float64)
        digest = hashlib.sha256(numbers.tobytes())
        for x in self.outputs:
            digest.update(x.tobytes())
        return digest.hexdigest()[:16]


def trained(n: int, given: dict[str, Floats], mode: str, schedule: str) -> tuple[LoraTrainer, LoraAdapter, Floats]:
    """Return a trainer two good steps before the one that is compared, its adapter and the moments it will write."""
    config = LoraTrainingConfig(
        lora_config=LoraConfig(rank=1), weight_decay_mode=mode, schedule=schedule, warmup_steps=1, max_steps=7,
        min_learning_rate=1e-5, learning_rate=1 / 3000, weight_decay=0.1, max_grad_norm=0.9,
    )  # fmt: skip
    adapter = LoraAdapter(n - n // 3, n // 3, config.lora_config, seed=1) if n >= 3 else LoraAdapter(1, 1, seed=1)
    adapter.flat.vector[...] = given["p"][: adapter.flat.vector.size]
    return LoraTrainer(config), adapter, adapter.flat.vector


def operations(n: int, given: dict[str, Floats], offset: int) -> Iterator[Operation]:
    """Yield everything that is compared, each array at its own address derived from ``offset``."""

    def at(name: str, extra: int) -> Floats:
        return placed(given[name], offset + extra)

    g = at("g", 0)
    yield Operation("norm", lambda: grad_norm([g]), [])
    clipped = at("g", 0)
    yield Operation("clip", lambda: clip_grad_norm_([clipped], 0.3), [clipped])
    if n == 0:
        return
    for i, rule in enumerate(RULES):
        p, m, v = at("p", 4), at("m", 20), at("v", 36)
        adam = kernel_calls.prepare(p, m, v, rule, 5)
        yield Operation(f"step {i}", lambda a=adam, r=rule: kernel_calls.step(a, r.rate, g), [p, m, v])
    p, m, v = at("p", 0), np.zeros(n, np.float32), np.zeros(n, np.float32)
    total = at("m", 8)
    adam = kernel_calls.prepare(p, m, v, RULES[0])
    yield Operation("accumulate", lambda: micro_batches(adam, total, g), [total, p, m, v])
    q = at("p", 12)
    public = Adam(q, learning_rate=1 / 3, weight_decay=0.01, max_grad_norm=2.0)
    yield Operation("Adam", lambda: (public.step(g), public.step(g, 0.01)), [q, public.m, public.v])
    if n < 3:
        return
    for mode, schedule in (("decoupled", SCHEDULES[n % 4]), ("l2", SCHEDULES[(n + 1) % 4])):
        trainer, adapter, vector = trained(n, given, mode, schedule)
        cut = adapter.a_matrix.size
        grad_a, grad_b = placed(given["g"][:cut], offset + 16), placed(given["g"][cut:], offset + 24)
        shaped = grad_a.reshape(adapter.a_matrix.shape), grad_b.reshape(adapter.b_matrix.shape)
        yield Operation(f"trainer {mode}", lambda t=trainer, a=adapter, x=shaped: train(t, a, *x), [vector])


def micro_batches(adam: Any, total: Floats, g: Floats) -> float:
    kernel_calls.begin_micro_batches(adam)
    for weight in (1.0, 1 / 3, 7.3):
        kernel_calls.accumulate(adam, total, weight, g)
    return kernel_calls.step_mean(adam, 1e-3, total, 1.0 + 1 / 3 + 7.3)


def train(trainer: LoraTrainer, adapter: LoraAdapter, grad_a: Floats, grad_b: Floats) -> list[float]:
    """Return what the records say: rates of the schedule, norms, perplexities."""
    records = [trainer.step(1 / 3, adapter, grad_a, grad_b) for _ in range(5)]
    trainer.accumulate(0.1, adapter, grad_a, grad_b, weight=1 / 3)
    trainer.accumulate(0.7, adapter, grad_a, grad_b)
    records.append(trainer.step_accumulated())
    return [float(x) for record in records for x in record]


def sweep(states: list[str], sizes: tuple[int, ...], offsets: range) -> dict[str, Any]:
    """Return the digests of each operation and size over all addresses and states."""
    found: dict[str, dict[str, str]] = {}
    combinations = 0
    for n in sizes:
        given = inputs(n)
        for offset in offsets:
            for state in states:
                combinations += 1
                for operation in operations(n, given, offset):
                    before = fp_state.control()
                    want = fp_state.enter(state)
                    entered = fp_state.control()
                    try:
                        returned = operation.call()
                        left = fp_state.control()
                    finally:
                        fp_state.enter("clean")
                    if not entered == left == want or before != fp_state.control():
                        raise SystemExit(f"{operation.name}, {state}: {entered:#x}, then {left:#x}, not {want:#x}")
                    digests = found.setdefault(f"{operation.name}, {n}", {})
                    digests.setdefault(operation.digest(returned), f"offset {offset}, state {state}")
    return {"isa": isa, "combinations": combinations, "digests": found}


def segments() -> dict[str, Any]:
    """Return digests of the same vectors, flat and cut into pieces, for norm, clip, step and accumulation."""
    found: dict[str, dict[str, str]] = {}

    def note(name: str, way: str, *arrays: Any) -> None:
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)).hexdigest()[:16]
        found.setdefault(name, {}).setdefault(digest, way)

    for n in (2, 3, 17, 100, 8191, 8193, 20_011, 70_001):
        given = inputs(n)
        rng = np.random.default_rng(n)
        cuts = {"flat": [], "pair": [n // 3], "odd": [1], "block": [min(8192, n - 1)], "many": []}
        cuts["many"] = sorted(set(rng.integers(0, n, 40).tolist()))
        for way, places in cuts.items():
            pieces = np.split(given["g"], places)
            note(f"norm {n}", way, grad_norm(pieces))
            pieces = [placed(x, 4 * i) for i, x in enumerate(pieces)]
            norm = clip_grad_norm_(pieces, 0.3)
            note(f"clip {n}", way, norm, np.concatenate(pieces))
        for rule in RULES:
            for way, cut in (("flat", None), ("pair", n // 3), ("uneven pair", 1)):
                p, m, v = (given[k].copy() for k in "pmv")
                if cut is None:
                    adam = kernel_calls.prepare(p, m, v, rule, 9)
                    norm = kernel_calls.step(adam, rule.rate, given["g"])
                else:
                    adam = kernel_calls.prepare(p, m, v, rule, 9, shape_a=(1, cut), shape_b=(n - cut, 1))
                    norm = kernel_calls.step_pair(adam, rule.rate, given["g"][:cut], given["g"][cut:])
                note(f"step {n} {rule.mode}", way, norm, p, m, v)

    lone = LoraAdapter(301, 77, LoraConfig(rank=3), seed=4)
    for way in ("pair", "flat pair", "gradients", "set of one", "bytes"):
        given = inputs(lone.param_count())
        adapter: Any = LoraAdapter(301, 77, LoraConfig(rank=3), seed=4)
        if way == "set of one":
            adapter = AdapterSet.from_adapters({"x": lone})
        trainer, cut = LoraTrainer(LoraTrainingConfig(warmup_steps=0)), lone.a_matrix.size
        g = given["g"]
        both = Gradients(adapter)
        both.vector[...] = g
        for _ in range(3):
            if way == "pair":
                record = trainer.step(1.0, adapter, g[:cut].reshape(3, 301), g[cut:].reshape(77, 3))
            elif way == "flat pair":
                record = trainer.step(1.0, adapter, g[:cut], g[cut:])
            elif way == "bytes":
                record = trainer.step(1.0, adapter, memoryview(bytearray(g.tobytes())).cast("f"))
            else:
                record = trainer.step(1.0, adapter, both)
        note("trainer", way, adapter.flat.vector, record.grad_norm, trainer.state_dict()["adam"]["m"])
    return {"isa": isa, "combinations": 0, "digests": found}


def main() -> None:
    """Print the sweep asked for by the arguments: ``segments``, or states separated by commas, or ``long``."""
    what = sys.argv[1]
    if what == "segments":
        result = segments()
    elif what == "long":
        sizes = tuple(sorted({*SIZES, *range(1, 600)}))
        result = sweep(list(fp_state.STATES), sizes, OFFSETS)
    else:
        result = sweep(what.split(","), SIZES, OFFSETS)
    assert math.isfinite(result["combinations"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
