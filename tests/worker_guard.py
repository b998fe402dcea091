"""Run the kernels on buffers that lie against inaccessible pages; a read or write outside ends this process.

``sweep`` goes through every length; ``overrun`` and ``underrun`` touch the guard on purpose, to show that it bites;
``unattached`` calls what was not made ready. The length under way is printed first, so that a fault names it.
"""

import ctypes
import faulthandler
import mmap
import sys

import kernel_calls
import numpy as np
from numpy.typing import NDArray
from reference import Rule

from cylora.adapter import LoraAdapter
from cylora.config import LoraConfig, LoraTrainingConfig
from cylora.errors import NonFiniteGradientError
from cylora.flat import FlatBuffer
from cylora.history import TrainingHistory, TrainingStep
from cylora.optimizer import Adam, clip_grad_norm_, grad_norm, isa
from cylora.trainer import LoraTrainer

Floats = NDArray[np.float32]

LARGEST = 4200
PAGE = mmap.PAGESIZE
PROT_NONE = 0
CANARY = np.float32(-7.5)

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Guarded:
    """Memory for LARGEST floats between two inaccessible pages; the floats fill whole pages but for a canary zone."""

    def __init__(self) -> None:
        self.bytes = -(-4 * LARGEST // PAGE) * PAGE
        self.memory = mmap.mmap(-1, self.bytes + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.floats = np.frombuffer(self.memory, np.float32, self.bytes // 4, PAGE)
        for guard in (start, start + PAGE + self.bytes):
            if libc.mprotect(guard, PAGE, PROT_NONE) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def at_end(self, values: Floats) -> Floats:
        """Return a copy whose last element is the last before the guard."""
        self.floats[...] = CANARY
        part = self.floats[self.floats.size - values.size :]
        part[...] = values
        return part

    def at_start(self, values: Floats) -> Floats:
        """Return a copy whose first element is the first after the guard."""
        self.floats[...] = CANARY
        part = self.floats[: values.size]
        part[...] = values
        return part

    def is_intact(self, part: Floats) -> bool:
        """Return whether everything but ``part`` is as it was."""
        outside = self.floats[part.size :] if part.ctypes.data == self.floats.ctypes.data else self.floats[: -part.size]
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
    # A non-finite element at either end is looked for one by one.
    grad_b[-1, 0] = np.nan
    message = "nothing"
    try:
        trainer.step(1.0, adapter, grad_a, grad_b)
    except NonFiniteGradientError as error:
        message = str(error)
    assert f"gradient of B must be finite, got nan at [{d_out - 1}, 0]" in message, message


def sweep() -> None:
    """Go through every length at both ends."""
    areas = {name: Guarded() for name in ("p", "g", "m", "v", "total")}
    rng = np.random.default_rng(0)
    values = {name: (rng.random(LARGEST) + 0.1).astype(np.float32) for name in areas}
    lengths = 0
    for n in range(LARGEST + 1):
        for place in ("at_end", "at_start"):
            sys.stdout.write(f"\r{n} {place}")
            kernels(n, place, areas, values)
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
