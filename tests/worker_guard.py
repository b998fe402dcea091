"""Run the kernels on buffers that lie against inaccessible pages; a read or write outside ends this process.

``sweep`` goes through every length; ``overrun`` and ``underrun`` touch the guard on purpose, to show that it bites;
``unattached`` calls what was not made ready. The length under way is printed first, so that a fault names it.
"""

import ctypes
import faulthandler
import mmap
import sys
from typing import Any

import kernel_calls
import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from reference import Rule

from cylora.adapter import LoraAdapter
from cylora.config import LoraConfig, LoraTrainingConfig
from cylora.errors import NonFiniteGradientError
from cylora.flat import FlatBuffer
from cylora.history import TrainingHistory, TrainingStep
from cylora.kernels import PreparedAdam
from cylora.optimizer import Adam, clip_grad_norm_, grad_norm, isa
from cylora.trainer import LoraTrainer

Floats = NDArray[np.float32]
Vector = NDArray[Any]

LARGEST = 4200
PAGE = mmap.PAGESIZE
PROT_NONE = 0
CANARY = 0xA5
CHUNK = 256

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Guarded:
    """Whole pages for LARGEST floats between two inaccessible ones; what a vector leaves of them holds a canary."""

    def __init__(self) -> None:
        self.bytes = -(-4 * LARGEST // PAGE) * PAGE
        self.memory = mmap.mmap(-1, self.bytes + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.all = np.frombuffer(self.memory, np.uint8, self.bytes, PAGE)
        for guard in (start, start + PAGE + self.bytes):
            if libc.mprotect(guard, PAGE, PROT_NONE) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def at_end(self, values: Vector) -> Vector:
        """Return a copy whose last element is the last before the guard."""
        self.all[...] = CANARY
        part = self.all[self.bytes - values.nbytes :].view(values.dtype)
        part[...] = values
        return part

    def at_start(self, values: Vector) -> Vector:
        """Return a copy whose first element is the first after the guard."""
        self.all[...] = CANARY
        part = self.all[: values.nbytes].view(values.dtype)
        part[...] = values
        return part

    def is_intact(self, part: Vector) -> bool:
        """Return whether everything but ``part`` is as it was."""
        outside = self.all[part.nbytes :] if part.ctypes.data == self.all.ctypes.data else self.all[: -part.nbytes]
        return part.size == 0 or bool((outside == CANARY).all())


RULES = (Rule(1e-3, weight_decay=0.1, max_norm=0.5), Rule(1e-3, weight_decay=0.1, mode="l2", max_norm=0.5))


def kernels(n: int, place: str, areas: dict[str, Guarded], values: dict[str, Floats]) -> None:
    """Run each kernel once with every buffer against the guard at ``place``."""

    def put(name: str) -> Floats:
        return getattr(areas[name], place)(values[name][:n])

    def intact(**parts: Floats) -> None:
        for name, part in parts.items():
            if not areas[name].is_intact(part):
                raise SystemExit(f"n = {n}, {place}: wrote outside {name}")

    g = put("g")
    before = g.tobytes()
    norm = grad_norm([g])
    if n == 0:
        assert norm == 0.0
        assert clip_grad_norm_([g], 1.0) == 0.0
        return
    for rule in RULES:
        p, m, v = put("p"), put("m"), put("v")
        assert kernel_calls.step(kernel_calls.prepare(p, m, v, rule, 3), rule.rate, g) == norm
        intact(p=p, m=m, v=v, g=g)
    total = put("total")
    adam = kernel_calls.prepare(p, m, v, RULES[0])
    kernel_calls.begin_micro_batches(adam)
    kernel_calls.accumulate(adam, total, 0.5, g)
    intact(total=total, g=g)
    assert g.tobytes() == before
    assert clip_grad_norm_([g], 0.5 * norm) == norm
    intact(g=g)


HALVES = (np.float16, np.uint16, ml_dtypes.bfloat16)
STORED = {2: np.uint16(0x3DCD), 3: np.uint8(0x5A)}  # a moment of the kernels' storage kinds bfloat16 and 8-bit


def compact(n: int, place: str, areas: dict[str, Guarded], values: dict[str, Floats]) -> None:
    """Run the kernels with gradients in halves and compact moments likewise; where n is odd, half of it is zeros."""

    def put(name: str, array: Vector) -> Vector:
        return getattr(areas[name], place)(array)

    dtype = HALVES[n % 3]
    gradient = values["g"][:n].astype(ml_dtypes.bfloat16 if dtype is np.uint16 else dtype).view(dtype)
    if n % 2:
        gradient[n // 2 :] = 0
    g = put("g", gradient)
    norm = grad_norm([g])
    if n == 0:
        assert norm == 0.0
        return
    chunks = -(-n // CHUNK)
    rule = RULES[n // 2 % 2]
    for kind, number in STORED.items():
        p = put("p", values["p"][:n])
        m, v = (put(name, np.full(n, number)) for name in ("m", "v"))
        exponents = [put(name, np.full(chunks if kind == 3 else 0, 110, np.uint8)) for name in ("total", "exponents")]
        moments = (kind, *(part.view(np.uint8) for part in (m, v)), *exponents)
        adam = PreparedAdam(
            p, moments, beta1=rule.beta1, beta2=rule.beta2, eps=rule.eps, weight_decay=rule.weight_decay,
            l2=rule.mode == "l2", max_grad_norm=rule.max_norm, norm_limit=sys.float_info.max, t=2,
        )  # fmt: skip
        for _ in range(2):
            assert adam.apply(g, rule.rate) == norm
        assert (p != values["p"][:n]).all()
        named = {"p": p, "m": m, "v": v, "total": exponents[0], "exponents": exponents[1], "g": g}
        for name, part in named.items():
            if not areas[name].is_intact(part):
                raise SystemExit(f"n = {n}, {place}, moments {kind}: wrote outside {name}")
    total = put("total", np.zeros(n, np.float32))
    kernel_calls.begin_micro_batches(adam)
    kernel_calls.accumulate(adam, total, 0.5, g)
    assert areas["total"].is_intact(total)
    assert g.tobytes() == gradient.tobytes()


def public(n: int, place: str, areas: dict[str, Guarded], values: dict[str, Floats]) -> None:
    """Run Adam over a guarded vector and a trainer with two guarded gradients."""
    p, g = getattr(areas["p"], place)(values["p"][:n]), getattr(areas["g"], place)(values["g"][:n])
    Adam(FlatBuffer([("p", (n,))], over=p), max_grad_norm=0.5).step(g)
    assert areas["p"].is_intact(p)
    d_out = n // 3
    adapter = LoraAdapter(n - d_out, d_out, LoraConfig(rank=1), seed=0)
    grad_a = getattr(areas["m"], place)(values["g"][: n - d_out]).reshape(1, -1)
    grad_b = getattr(areas["v"], place)(values["g"][:d_out]).reshape(-1, 1)
    trainer = LoraTrainer(LoraTrainingConfig(warmup_steps=0))
    trainer.step(1.0, adapter, grad_a, grad_b)
    trainer.accumulate(1.0, adapter, grad_a, grad_b)
    trainer.step_accumulated()
    # The same pair in halves, of two types that meet in the middle of a chunk, and compact state.
    half_a, half_b = (values["g"][part].astype(HALVES[2 * (n % 2)]) for part in (slice(n - d_out), slice(d_out)))
    half_b = half_b.astype(HALVES[2 - 2 * (n % 2)])
    half_a, half_b = getattr(areas["p"], place)(half_a), getattr(areas["g"], place)(half_b)
    for state_dtype in ("float32", "bfloat16", "8bit"):
        compact_trainer = LoraTrainer(LoraTrainingConfig(warmup_steps=0, state_dtype=state_dtype))
        compact_adapter = LoraAdapter(n - d_out, d_out, LoraConfig(rank=1), seed=0)
        for left, right in ((half_a, half_b), (grad_a, half_b), (half_a, grad_b)):
            compact_trainer.step(1.0, compact_adapter, left, right)
            compact_trainer.accumulate(1.0, compact_adapter, left, right)
            compact_trainer.step_accumulated()
    assert areas["p"].is_intact(half_a)
    assert areas["g"].is_intact(half_b)
    # A non-finite element at either end is looked for one by one.
    half_b[-1] = grad_b[-1, 0] = np.nan
    for given in ((grad_a, grad_b), (half_a, half_b)):
        message = "nothing"
        try:
            trainer.step(1.0, adapter, *given)
        except NonFiniteGradientError as error:
            message = str(error)
        assert f"gradient of B must be finite, got nan at [{d_out - 1}, 0]" in message, message


def sweep() -> None:
    """Go through every length at both ends."""
    areas = {name: Guarded() for name in ("p", "g", "m", "v", "total", "exponents")}
    rng = np.random.default_rng(0)
    values = {name: (rng.random(LARGEST) + 0.1).astype(np.float32) for name in areas}
    lengths = 0
    for n in range(LARGEST + 1):
        for place in ("at_end", "at_start"):
            sys.stdout.write(f"\r{n} {place}")
            kernels(n, place, areas, values)
            compact(n, place, areas, values)
            if n >= 3 and (n < 300 or n % 97 == 0):
                public(n, place, areas, values)
        lengths += 1
    print(f"\ndone: {lengths} lengths on {isa}")


def unattached() -> None:
    """Ask a fresh kernel object for steps that need an attached history or pending micro-batches."""
    p, m, v, g = (np.ones(4, np.float32) for _ in range(4))
    adam = kernel_calls.prepare(p, m, v, RULES[0])
    refused = 0
    for call in (
        lambda: adam.run_step(1.0, g, None),
        lambda: adam.run_step(None, g, None, True),
        lambda: adam.accumulate(np.zeros(4, np.float32), 1.0, g, None, 1.0),
    ):
        try:
            call()
        except ValueError:
            refused += 1
    # With a history but no micro-batches, a plain step is all right and only the mean is refused.
    assert kernel_calls.step_pair(kernel_calls.prepare(p, m, v, RULES[0]), 0.0, g, None) == 2.0
    try:
        adam.attach(lambda step: 0.0, None, TrainingStep, TrainingHistory())
        adam.run_step(None, g, None, True)
    except ValueError:
        refused += 1
    print(f"refused {refused}")


def main() -> None:
    """Do what the argument says."""
    faulthandler.enable()
    if sys.argv[1] == "sweep":
        sweep()
        return
    if sys.argv[1] == "unattached":
        unattached()
        return
    area = Guarded()
    ones = np.ones(17, np.float32)
    part = area.at_end(ones) if sys.argv[1] == "overrun" else area.at_start(ones)
    address = part.ctypes.data + (4 * part.size if sys.argv[1] == "overrun" else -4)
    # What a kernel with one element too many would read.
    outside = np.frombuffer((ctypes.c_float * 1).from_address(address), np.float32)
    print("reading", flush=True)
    grad_norm([outside])
    print("survived")


if __name__ == "__main__":
    main()
