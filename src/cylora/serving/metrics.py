"""ServingMetrics: what a server that learns has done so far, as plain numbers and as text for Prometheus.

(a) The text is written here, not by prometheus_client: cylora needs NumPy and safetensors and nothing else. The tests
    read it with that package's own parser.
(b) Only so many tenants have series of their own. The rest share those of the tenant ``_other``: the sums over all
    tenants stay right, and no series ever goes back, as it would if the least recently used one were dropped.
"""

import math
import os
import threading
import weakref
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from cylora import checks
from cylora.history import TrainingStep

__all__ = ["ServingMetrics"]

OTHER = "_other"
# Seconds: a small step takes a microsecond, one of a large model's adapters a hundredth.
BOUNDS = (*(float(f"{digit}e{power}") for power in range(-6, 0) for digit in ("1", "2.5", "5")), 1.0)
Sample = tuple[str, dict[str, str], float]  # what follows the family's name, labels, value


class _Series:
    """The numbers of one tenant."""

    __slots__ = ("dropped", "errors", "grad_norm", "loss", "refused", "skipped", "steps", "version")

    def __init__(self) -> None:
        self.steps = self.skipped = self.refused = 0
        self.dropped: Counter[str] = Counter()  # by policy
        self.errors: Counter[str] = Counter()  # by type
        self.loss: float | None = None
        self.grad_norm: float | None = None
        self.version: int | None = None


class ServingMetrics:
    """Counters, gauges and a histogram of what publishers, stores and online trainers do. Any thread may call anything.

    Parameters
    ----------
    max_tenants : int >= 0
        Tenants that get series of their own, first come, first served. All others share the tenant ``_other``, which
        has counters but no loss, gradient norm or version: those of whoever came last would say nothing.

    Raises
    ------
    ConfigError
        If ``max_tenants`` is no such number.

    Notes
    -----
    A process counts for itself. A forked child goes on from its parent's numbers.
    """

    def __init__(self, max_tenants: int = 100) -> None:
        self.max_tenants = checks.integer("max_tenants", max_tenants, 0)
        self._tenants: dict[str, _Series] = {}
        self._other = _Series()
        self._seconds, self._buckets = 0.0, [0] * (len(BOUNDS) + 1)
        self._queue_depth = self._resident_bytes = self._resident_tenants = 0
        self._spilled = self._restored = 0
        self._lock = threading.RLock()  # re-entrant: a signal handler may ask for the text under it
        _living.add(self)

    # ------------------------------------------------------------------ counting

    def step(self, tenant: str, record: TrainingStep, seconds: float) -> None:
        """Count a step that was done, skipped ones included, and the time it took."""
        with self._lock:
            series = self._of(tenant)
            series.steps += 1
            series.skipped += record.skipped
            series.loss, series.grad_norm = record.loss, record.grad_norm
            self._seconds += seconds
            self._buckets[bisect_left(BOUNDS, seconds)] += 1

    def error(self, tenant: str, error: BaseException) -> None:
        """Count an error under the name of its type."""
        with self._lock:
            self._of(tenant).errors[type(error).__name__] += 1

    def dropped(self, tenant: str, policy: str) -> None:
        """Count a job that did not become a step of its own, under the name of what took it."""
        with self._lock:
            self._of(tenant).dropped[policy] += 1

    def queue_depth(self, count: int) -> None:
        """Set how many jobs are waiting."""
        with self._lock:
            self._queue_depth = count

    def published(self, tenant: str, version: int) -> None:
        """Set the version that is being served."""
        with self._lock:
            self._of(tenant).version = version

    def refused(self, tenant: str) -> None:
        """Count a snapshot that was not published."""
        with self._lock:
            self._of(tenant).refused += 1

    def resident(self, bytes_: int, tenants: int) -> None:
        """Set how much memory how many tenants take."""
        with self._lock:
            self._resident_bytes, self._resident_tenants = bytes_, tenants

    def spilled(self) -> None:
        """Count a tenant that was written to disk to free its memory."""
        with self._lock:
            self._spilled += 1

    def restored(self) -> None:
        """Count a tenant that was read back from disk."""
        with self._lock:
            self._restored += 1

    def _of(self, tenant: str) -> _Series:
        series = self._tenants.get(tenant)
        return self._newcomer(tenant) if series is None else series

    def _newcomer(self, tenant: str) -> _Series:
        shown = tenant.encode(errors="replace").decode()  # half a surrogate pair is no text
        if shown == OTHER or (shown not in self._tenants and len(self._tenants) >= self.max_tenants):
            return self._other
        return self._tenants.setdefault(shown, _Series())

    # ------------------------------------------------------------------ reading

    def values(self) -> dict[str, float]:
        """Return the numbers over all tenants by name; ``step_seconds`` is the sum of the steps' times."""
        with self._lock:
            everybody = [*self._tenants.values(), self._other]
            return {
                "steps": sum(one.steps for one in everybody),
                "skipped": sum(one.skipped for one in everybody),
                "dropped": sum(one.dropped.total() for one in everybody),
                "errors": sum(one.errors.total() for one in everybody),
                "refused": sum(one.refused for one in everybody),
                "spilled": self._spilled,
                "restored": self._restored,
                "queue_depth": self._queue_depth,
                "resident_bytes": self._resident_bytes,
                "resident_tenants": self._resident_tenants,
                "step_seconds": self._seconds,
            }

    def text(self) -> str:
        """Return everything in Prometheus' text format, version 0.0.4.

        To be served as ``text/plain; version=0.0.4; charset=utf-8``.

        References
        ----------
        https://prometheus.io/docs/instrumenting/exposition_formats/
        """
        with self._lock:
            return "".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for name, kind, about, samples in self._families():
            yield f"# HELP cylora_{name} {about}\n# TYPE cylora_{name} {kind}\n"
            for suffix, labels, value in samples:
                named = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
                yield f"cylora_{name}{suffix}{f'{{{named}}}' if named else ''} {_shown(value)}\n"

    def _families(self) -> Iterator[tuple[str, str, str, Iterator[Sample]]]:
        """Yield name, type, description and samples of each metric."""
        rows = [*self._tenants.items(), (OTHER, self._other)]

        def single(value: float) -> Iterator[Sample]:
            yield "", {}, value

        def each(field: str) -> Iterator[Sample]:
            for tenant, series in rows:
                value = getattr(series, field)
                if value is not None and not (series is self._other and field in ("loss", "grad_norm", "version")):
                    yield "", {"tenant": tenant}, value

        def by(label: str, field: str) -> Iterator[Sample]:
            for tenant, series in rows:
                for what, count in getattr(series, field).items():
                    yield "", {"tenant": tenant, label: what}, count

        yield "steps_total", "counter", "Steps done, skipped ones included.", each("steps")
        yield "skipped_steps_total", "counter", "Steps that changed nothing.", each("skipped")
        about = "Jobs that did not become a step of their own, by what took them."
        yield "dropped_jobs_total", "counter", about, by("policy", "dropped")
        yield "errors_total", "counter", "Errors, by type.", by("type", "errors")
        yield "queue_depth", "gauge", "Jobs waiting for a worker.", single(self._queue_depth)
        yield "step_seconds", "histogram", "Time that a step took, in seconds.", self._histogram()
        yield "loss", "gauge", "Loss of the last step.", each("loss")
        yield "grad_norm", "gauge", "Gradient norm of the last step, before clipping.", each("grad_norm")
        yield "published_version", "gauge", "Version that is being served.", each("version")
        yield "refused_snapshots_total", "counter", "Snapshots that were not published.", each("refused")
        yield "spilled_tenants_total", "counter", "Tenants written to disk to free memory.", single(self._spilled)
        yield "restored_tenants_total", "counter", "Tenants read back from disk.", single(self._restored)
        yield "resident_bytes", "gauge", "Memory of the tenants in memory, in bytes.", single(self._resident_bytes)
        yield "resident_tenants", "gauge", "Tenants in memory.", single(self._resident_tenants)

    def _histogram(self) -> Iterator[Sample]:
        total = 0
        for bound, count in zip((*BOUNDS, math.inf), self._buckets, strict=True):
            total += count
            yield "_bucket", {"le": _shown(bound)}, total
        yield "_sum", {}, self._seconds
        yield "_count", {}, total


def _escaped(text: str) -> str:
    """Return a label's value as it stands between quotes."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _shown(value: float) -> str:
    """Return a number as Prometheus reads it."""
    if math.isfinite(value):
        return str(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


_living: "weakref.WeakSet[ServingMetrics]" = weakref.WeakSet()


def _renew_locks() -> None:
    """Give each ServingMetrics of a forked child a lock: whoever holds the old one may not exist in this process."""
    for metrics in list(_living):
        metrics._lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_locks)
