"""Run every operation on the same inputs at many addresses and floating-point states; print their digests as JSON.

A process of its own for each instruction set: ``CYLORA_ISA`` is read once, at import. What differs between two
combinations must not show in the bits, so each (operation, size) must come out with one digest, here and elsewhere.
"""

import ctypes
import hashlib
import json
import math
import mmap
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from threading import get_native_id
from typing import Any

import fp_state
import kernel_calls
import numpy as np
import option_bits
from numpy.typing import NDArray
from reference import Rule

from cylora.adapter import AdapterSet, Gradients, LoraAdapter
from cylora.config import LoraConfig, LoraTrainingConfig
from cylora.kernels import threads as pool
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


# ---------------------------------------------------------------------- forms of state, gradients and threads

THREADS = (1, 2, 3, 4, 7, 8, 16)
FORMS = {"float32": (0, np.float32), "bfloat16": (2, np.uint16), "8bit": (3, np.uint8)}
KINDS = ("float32", "float16", "bfloat16")
# More blocks than threads, whole and with a rest of one element; pieces that meet anywhere in a chunk or block.
SHARED_SIZES = (8193, 16_384, 16_411, 24_833, 40_961, 65_537, 131_072, 139_521)
STEP_SIZES = tuple(sorted({*SIZES, *SHARED_SIZES} - {0, 100_003}))


class Fresh:
    """Copies of which no page is mapped when `forget` returns, so that whoever touches one first has a fault."""

    def __init__(self) -> None:
        self.maps: list[mmap.mmap] = []

    def placed(self, values: NDArray[Any], offset: int) -> NDArray[Any]:
        if values.nbytes < 4 * 8192:
            return placed_bytes(values, offset)
        shared = mmap.mmap(-1, values.nbytes + 64)
        self.maps.append(shared)
        copy = np.frombuffer(shared, values.dtype, values.size, offset % 64)
        copy[...] = values
        return copy

    def forget(self) -> None:
        for shared in self.maps:
            shared.madvise(mmap.MADV_DONTNEED)  # shared memory keeps its contents


def placed_bytes(values: NDArray[Any], offset: int) -> NDArray[Any]:
    raw = np.zeros(values.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset % 64
    copy = raw[start : start + values.nbytes].view(values.dtype)
    copy[...] = values
    return copy


def helpers_faults() -> int:
    """Return how many times the threads that Python does not know of met a page for the first time."""
    own, faults = get_native_id(), 0
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != own:
            faults += int((task / "stat").read_text().rpartition(")")[2].split()[7])
    return faults


@lru_cache(3)
def gradient_of(kind: str, n: int) -> tuple[NDArray[Any], Floats]:
    """Return a gradient as it is stored, and as float32. Whole chunks of it are zero, others but for one element."""
    rng = np.random.default_rng([n, KINDS.index(kind)])
    g = rng.standard_normal(n) * 10.0 ** rng.integers(-9, 3, n)
    if kind == "float32":
        stored = wide = inputs(n)["g"].copy()
    elif kind == "float16":
        stored = np.clip(g, -6e4, 6e4).astype(np.float16)
        wide = stored.astype(np.float32)
    else:
        stored = (g.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        wide = (stored.astype(np.uint32) << 16).view(np.float32)
    for start in range(0, n, 256):
        what = rng.integers(0, 4)
        for x in (stored, wide):
            if what < 2:
                x[start : start + 256] = 0
            if what == 1:  # any bit but the sign would end the silence
                x[start : start + 256 : 3] = -0.0 if x.dtype != np.uint16 else 0x8000
            if what == 2:
                x[start : start + 255] = 0
    return stored, wide


@lru_cache(3)
def stored_state(form: str, n: int) -> kernel_calls.Stored:
    """Return a random state of a form: some chunks without first moments, some with tiny ones."""
    kind, dtype = FORMS[form]
    rng = np.random.default_rng([n, kind])
    chunks = -(-n // 256)
    state = rng.integers(0, 4, chunks).repeat(256)[:n]
    if form == "8bit":
        codes = np.where(state == 0, 0, rng.integers(0, 256, n)).astype(np.uint8)
        v = rng.integers(1, 256, n).astype(np.uint8)
        exponents = [rng.choice([0, 27, 28, 90, 110], chunks).astype(np.uint8) for _ in "mv"]
        return kernel_calls.Stored(kind, codes, v, *exponents)
    scale = np.where(state == 1, 2.0 ** rng.integers(-128, -112, n), 10.0 ** rng.integers(-9, 0, n))
    m = (rng.standard_normal(n) * scale * (state != 0)).astype(np.float32)
    v = np.where(state == 2, 2.0 ** rng.integers(-120, -108, n), rng.random(n) * scale * scale).astype(np.float32)
    if form == "bfloat16":
        m, v = ((x.view(np.uint32) >> 16).astype(dtype) for x in (m, v))
    return kernel_calls.Stored(kind, m, v)


@lru_cache(1)
def weights(n: int) -> Floats:
    return inputs(n)["p"]


def cut(how: int, n: int) -> int | None:
    """Return where the pieces of a gradient meet: nowhere, inside a chunk, inside a block, at their ends."""
    places = [None, 1, n // 3, 100, 255, 256, 257, 8000, 8192, 8292, n - 1]
    place = places[how % len(places)]
    return place if place is None or 0 < place < n else None


def shared_step(form: str, kind: str, n: int, k: int, fresh: Fresh) -> Operation:
    """Return two steps whose bits follow from form, kind and n alone; what k chooses must not show in them."""
    half, wide = gradient_of(kind, n)
    rule = RULES[k % 2]._replace(eps=1e-8)
    offset, ways, threads = 4 * (k // 2 % 16), k // 32, THREADS[k // 32 % 7]
    p = fresh.placed(weights(n), offset)
    stored = stored_state(form, n)
    arrays = [fresh.placed(x, offset + 4 * i) for i, x in enumerate(stored[1:], 1)]
    shift = offset if half.dtype == np.float32 else offset // 2 + 2 * (k % 2)
    place = cut(ways // 2, n)
    ends = [0, n] if place is None else [0, place, n]
    pieces = []
    for i, (start, stop) in enumerate(pairwise(ends)):
        as_float = ways >> i & 1 or kind == "float32"
        pieces.append(fresh.placed((wide if as_float else half)[start:stop], offset + 8 if as_float else shift))
    shapes = {} if place is None else {"shape_a": (place, 1), "shape_b": (1, n - place)}
    adam = kernel_calls.prepare_stored(p, kernel_calls.Stored(stored.kind, *arrays), rule, 6, threads, **shapes)

    def call() -> list[float]:
        if place is None:
            return [kernel_calls.step(adam, rule.rate, pieces[0]) for _ in range(2)]
        return [kernel_calls.step_pair(adam, rule.rate, *pieces) for _ in range(2)]

    return Operation(f"{form} state, {kind} gradient, {rule.mode}", call, [p, *arrays])


def start_helpers(state: str) -> None:
    """Open a team as a foreign package may, in a floating-point state that new threads inherit from their creator."""
    name, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    opens, closes = (pool.__pyx_capi__[key] for key in ("open_team", "close_team"))
    opens = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_double)(pointer(opens, name(opens)))
    closes = ctypes.CFUNCTYPE(None)(pointer(closes, name(closes)))
    fp_state.enter(state)
    try:
        opened = opens(max(THREADS), 1e6)
    finally:
        fp_state.enter("clean")
    assert opened
    assert pool.started() == max(THREADS) - 1
    closes()


def threaded(per_size: int, sizes: tuple[int, ...] = STEP_SIZES) -> dict[str, Any]:
    """Return digests of steps by form of state and kind of gradient, over threads, addresses, cuts and states."""
    found: dict[str, dict[str, str]] = {}
    combinations = shared = helped = 0
    pool.configure("always", 0)  # 16 threads that look for work would only be in each other's way
    start_helpers("up")
    for n in sizes:
        rng = np.random.default_rng(n)
        pairs = list(product(FORMS, KINDS))
        for i in range(per_size):
            form, kind = pairs[i % len(pairs)]
            k = int(rng.integers(0, 2**20)) * 2 + i // len(pairs) % 2
            state = list(fp_state.STATES)[rng.integers(0, len(fp_state.STATES))]
            fresh = Fresh()
            operation = shared_step(form, kind, n, k, fresh)
            fresh.forget()
            many = n > 8192 and THREADS[k // 32 % 7] > 1
            before = helpers_faults() if many else 0
            want = fp_state.enter(state)
            try:
                returned = operation.call()
                left = fp_state.control()
            finally:
                fp_state.enter("clean")
            assert left == want
            combinations += 1
            shared += many
            helped += many and helpers_faults() > before
            digests = found.setdefault(f"{operation.name}, {n}", {})
            digests.setdefault(operation.digest(returned), f"k {k}, state {state}")
    return {"isa": isa, "combinations": combinations, "digests": found, "shared": shared, "helped": helped,
            "helpers": pool.started()}  # fmt: skip


def main() -> None:
    """Print what the argument asks for: ``segments``, ``options``, ``threads N``, states with commas, or ``long``."""
    what = sys.argv[1]
    if what == "segments":
        result = segments()
    elif what == "options":
        combinations, digests = option_bits.options()
        result = {"isa": isa, "combinations": combinations, "digests": digests}
    elif what.startswith("threads"):
        result = threaded(int(what.split()[1]))
    elif what == "long":
        sizes = tuple(sorted({*SIZES, *range(1, 600)}))
        result = sweep(list(fp_state.STATES), sizes, OFFSETS)
    else:
        result = sweep(what.split(","), SIZES, OFFSETS)
    assert math.isfinite(result["combinations"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
