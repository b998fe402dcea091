"""Who is compared: every peer by name, where its builder is, and what it needs. Imports none of them.

Another library joins with a module ``peer_<library>.py`` of builders ``(case, threads) -> Built`` and a line here.
"""

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CYLORA = "cylora"
BF16 = "cylora bf16 state"
EIGHT_BIT = "cylora 8-bit state + bf16 gradients"
MANY_STEPS = "cylora, a loop of step"
TUNED = "NumPy tuned"
IN_PLACE = "NumPy in place"
NAIVE = "NumPy naive"
FLOAT64 = "NumPy float64"
TORCH = "torch fused"
TORCH_MANY = "torch fused, a loop"
THINC = "thinc kernel"
OPTAX = "optax"
NUMBA = "numba"

HUGE = 2**62
TWO_MILLION, TEN_MILLION = 2_000_000, 11_000_000
BOTH = (1, 2)


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to do a subject's work."""

    name: str
    subject: str
    builder: str  # module:function in this folder
    needs: tuple[str, ...] = ("numpy",)  # distributions
    imports: tuple[str, ...] = ("numpy",)  # what its user imports
    threads: tuple[int, ...] = (1,)
    largest: int = HUGE  # above so many parameters a turn would take seconds

    @property
    def is_cylora(self) -> bool:
        """Whether a wrong result ends the run."""
        return self.builder.startswith("peer_cylora")

    @property
    def is_foreign(self) -> bool:
        """Whether it needs more than cylora itself does."""
        return not self.builder.startswith(("peer_cylora", "peer_numpy"))

    @property
    def missing(self) -> list[str]:
        """The distributions that are not installed."""
        return [name for name in self.needs if version_of(name) is None]

    def load(self) -> Callable[..., Any]:
        """Import the builder, and with it the library."""
        module, _, function = self.builder.partition(":")
        return getattr(importlib.import_module(module), function)


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cylora(name: str, subject: str, function: str, threads: tuple[int, ...] = (1,)) -> Peer:
    return Peer(name, subject, f"peer_cylora:{function}", imports=("cylora",), threads=threads)


def _numpy(name: str, subject: str, function: str) -> Peer:
    return Peer(name, subject, f"peer_numpy:{function}")


def _torch(name: str, function: str, **more: Any) -> Peer:
    return Peer(name, "trainer", f"peer_torch:{function}", ("torch",), ("torch",), **more)


def _bitsandbytes(name: str, function: str) -> Peer:
    needs = ("torch", "bitsandbytes")
    return Peer(name, "trainer", f"peer_bitsandbytes:{function}", needs, ("bitsandbytes",), largest=TWO_MILLION)


PEERS = (
    _cylora(CYLORA, "trainer", "trainer", BOTH),
    _cylora(BF16, "trainer", "trainer_bf16", BOTH),
    _cylora(EIGHT_BIT, "trainer", "trainer_8bit", BOTH),
    _numpy(TUNED, "trainer", "tuned_trainer"),
    _numpy(IN_PLACE, "trainer", "in_place_trainer"),
    _numpy(NAIVE, "trainer", "naive_trainer"),
    _torch(TORCH, "fused", threads=BOTH),
    _torch("torch foreach", "foreach", largest=TEN_MILLION),
    _torch("torch for-loop", "for_loop", largest=TEN_MILLION),
    Peer(OPTAX, "trainer", "peer_optax:adamw", ("optax", "jax", "jaxlib"), ("jax", "optax"), BOTH),
    Peer(NUMBA, "trainer", "peer_numba:kernel", ("numba",), ("numba",), BOTH),
    Peer("thinc Adam", "trainer", "peer_thinc:adam", ("thinc",), ("thinc.api",)),
    Peer(THINC, "trainer", "peer_thinc:kernel", ("thinc",), ("thinc.api",)),
    _bitsandbytes("bitsandbytes 32 bit", "bits32"),
    _bitsandbytes("bitsandbytes 8 bit", "bits8"),
    _cylora(CYLORA, "many", "step_many", BOTH),
    _cylora(MANY_STEPS, "many", "many_steps"),
    Peer(TORCH_MANY, "many", "peer_torch:many", ("torch",), ("torch",)),
    _cylora(CYLORA, "tenants", "store", BOTH),
    _cylora(BF16, "tenants", "store_bf16", BOTH),
    _cylora(EIGHT_BIT, "tenants", "store_8bit", BOTH),
    Peer(TORCH_MANY, "tenants", "peer_torch:many", ("torch",), ("torch",)),
    _cylora(CYLORA, "norm", "norm"),
    _numpy(FLOAT64, "norm", "float64_norm"),
    _numpy(TUNED, "norm", "tuned_norm"),
    _numpy(IN_PLACE, "norm", "in_place_norm"),
    _numpy(NAIVE, "norm", "naive_norm"),
    _cylora(CYLORA, "clip", "clip"),
    _numpy(TUNED, "clip", "tuned_clip"),
    _numpy(IN_PLACE, "clip", "in_place_clip"),
    _numpy(NAIVE, "clip", "naive_clip"),
    _cylora(CYLORA, "adam", "adam"),
    _numpy(TUNED, "adam", "tuned_adam"),
    _numpy(IN_PLACE, "adam", "in_place_adam"),
    _numpy(NAIVE, "adam", "naive_adam"),
)
NAMES = tuple(dict.fromkeys(peer.name for peer in PEERS))


def peer_named(name: str, subject: str) -> Peer:
    for peer in PEERS:
        if (peer.name, peer.subject) == (name, subject):
            return peer
    raise ValueError(f"no peer {name!r} does {subject!r}")


def environment(threads: int) -> dict[str, str]:
    """Return what a process that runs a peer on so many threads is started with; libraries read it when they load.

    Nobody's waiting is made passive: that would slow the peer's own turn. A pool that still spins after its turn is
    waited for instead (worker.py). NumPy's BLAS has one thread for everybody, as NumPy itself has.
    """
    own = {name: value for name, value in os.environ.items() if name != "CYLORA_NUM_THREADS"}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "NPROC"):  # NPROC: XLA's pool
        own[name] = str(threads)
    return own | {
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}",
    }
