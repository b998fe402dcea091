"""ServingMetrics: its numbers, and its text as Prometheus' own parser reads it."""

import math
import os
import threading
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cylora import ConfigError, InputError, TrainingStep
from cylora.serving import ServingMetrics
from cylora.serving.metrics import _renew_locks

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def record(loss: float = 0.5, norm: float = 2.0, skipped: bool = False) -> TrainingStep:
    return TrainingStep(3, loss, 1e-3, norm, math.exp(loss) if loss < 700 else math.inf, skipped)


def parsed(metrics: ServingMetrics) -> dict[tuple[Any, ...], float]:
    """Return what Prometheus reads: values by name and labels. No sample comes twice."""
    samples = [sample for family in text_string_to_metric_families(metrics.text()) for sample in family.samples]
    read = {(one.name, *(f"{key}={value}" for key, value in one.labels.items())): one.value for one in samples}
    assert len(read) == len(samples)
    return read


def test_new_metrics_are_zero_and_parse() -> None:
    metrics = ServingMetrics()
    assert set(metrics.values().values()) == {0}
    assert set(parsed(metrics).values()) == {0}


def test_everything_that_is_counted_is_in_text_and_values() -> None:
    metrics = ServingMetrics()
    metrics.step("a", record(), 0.25)
    metrics.step("a", record(loss=0.25, norm=3.5, skipped=True), 0.5)
    metrics.step("b", record(), 0.125)
    metrics.error("a", InputError("no"))
    metrics.error("a", InputError("no"))
    metrics.error("a", OSError("full"))
    metrics.dropped("a", "merge")
    metrics.dropped("b", "drop_oldest")
    metrics.queue_depth(7)
    metrics.published("a", 4)
    metrics.published("a", 3)
    metrics.refused("b")
    metrics.resident(2**40, 12)
    metrics.spilled()
    metrics.spilled()
    metrics.restored()
    assert metrics.values() == {
        "steps": 3, "skipped": 1, "dropped": 2, "errors": 3, "refused": 1, "spilled": 2, "restored": 1,
        "queue_depth": 7, "resident_bytes": 2**40, "resident_tenants": 12, "step_seconds": 0.875,
    }  # fmt: skip
    read = parsed(metrics)
    other = {key: value for key, value in read.items() if "tenant=_other" in key}
    assert set(other.values()) == {0}
    buckets = {key: value for key, value in read.items() if key[0] == "cylora_step_seconds_bucket"}
    assert {key: value for key, value in read.items() if key not in other and key not in buckets} == {
        ("cylora_steps_total", "tenant=a"): 2,
        ("cylora_steps_total", "tenant=b"): 1,
        ("cylora_skipped_steps_total", "tenant=a"): 1,
        ("cylora_skipped_steps_total", "tenant=b"): 0,
        ("cylora_dropped_jobs_total", "tenant=a", "policy=merge"): 1,
        ("cylora_dropped_jobs_total", "tenant=b", "policy=drop_oldest"): 1,
        ("cylora_errors_total", "tenant=a", "type=InputError"): 2,
        ("cylora_errors_total", "tenant=a", "type=OSError"): 1,
        ("cylora_queue_depth",): 7,
        ("cylora_step_seconds_sum",): 0.875,
        ("cylora_step_seconds_count",): 3,
        ("cylora_loss", "tenant=a"): 0.25,
        ("cylora_loss", "tenant=b"): 0.5,
        ("cylora_grad_norm", "tenant=a"): 3.5,
        ("cylora_grad_norm", "tenant=b"): 2.0,
        ("cylora_published_version", "tenant=a"): 3,
        ("cylora_refused_snapshots_total", "tenant=a"): 0,
        ("cylora_refused_snapshots_total", "tenant=b"): 1,
        ("cylora_spilled_tenants_total",): 2,
        ("cylora_restored_tenants_total",): 1,
        ("cylora_resident_bytes",): 2**40,
        ("cylora_resident_tenants",): 12,
    }


def test_every_metric_has_its_type_and_a_description() -> None:
    kinds = {family.name: family.type for family in text_string_to_metric_families(ServingMetrics().text())}
    assert kinds == {
        "cylora_steps": "counter", "cylora_skipped_steps": "counter", "cylora_dropped_jobs": "counter",
        "cylora_errors": "counter", "cylora_queue_depth": "gauge", "cylora_step_seconds": "histogram",
        "cylora_loss": "gauge", "cylora_grad_norm": "gauge", "cylora_published_version": "gauge",
        "cylora_refused_snapshots": "counter", "cylora_spilled_tenants": "counter",
        "cylora_restored_tenants": "counter", "cylora_resident_bytes": "gauge", "cylora_resident_tenants": "gauge",
    }  # fmt: skip
    assert all(family.documentation for family in text_string_to_metric_families(ServingMetrics().text()))


def test_histogram_counts_each_step_in_every_bucket_that_holds_it() -> None:
    metrics = ServingMetrics()
    seconds = [0.0, 1e-6, 1.1e-6, 3e-5, 1.0, 1.5, 1e9]
    for one in seconds:
        metrics.step("a", record(), one)
    read = parsed(metrics)
    bounds = [float(key[1].removeprefix("le=")) for key in read if key[0] == "cylora_step_seconds_bucket"]
    assert bounds == sorted(set(bounds))
    assert bounds[0] == 1e-6
    assert bounds[-2:] == [1.0, math.inf]
    counted = [value for key, value in read.items() if key[0] == "cylora_step_seconds_bucket"]
    assert counted == [sum(one <= bound for one in seconds) for bound in bounds]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-45, 3.4e38, 0.1])
def test_numbers_are_read_back_to_the_bit(value: float) -> None:
    metrics = ServingMetrics()
    metrics.step("a", record(loss=value, norm=value), 0.1)
    read = parsed(metrics)
    for name in ("cylora_loss", "cylora_grad_norm"):
        assert repr(read[name, "tenant=a"]) == repr(value)


def test_nan_and_infinities_are_written_as_the_format_says() -> None:
    metrics = ServingMetrics()
    for tenant, value in {"a": math.nan, "b": math.inf, "c": -math.inf}.items():
        metrics.step(tenant, record(loss=value), 0.1)
    lines = metrics.text().splitlines()
    assert [line for line in lines if line.startswith("cylora_loss")] == [
        'cylora_loss{tenant="a"} NaN', 'cylora_loss{tenant="b"} +Inf', 'cylora_loss{tenant="c"} -Inf',
    ]  # fmt: skip
    assert 'cylora_step_seconds_bucket{le="+Inf"} 3' in lines


@pytest.mark.parametrize(
    "tenant", ['a"b', "a\\", "\\n", "a\nb", '\\"', "", "{}", 'a",le="1', "#", "日本", "a\rb", "a\u2028b", " a ", "\0"]
)
def test_any_tenant_is_read_back_as_it_is(tenant: str) -> None:
    metrics = ServingMetrics()
    metrics.step(tenant, record(), 0.1)
    assert parsed(metrics)["cylora_steps_total", f"tenant={tenant}"] == 1


def test_tenant_that_is_no_text_is_shown_as_text() -> None:
    metrics = ServingMetrics()
    metrics.step("a\ud800", record(), 0.1)
    metrics.step("a\ud801", record(), 0.1)
    metrics.text().encode()
    assert parsed(metrics)["cylora_steps_total", "tenant=a?"] == 2


def test_tenants_beyond_the_limit_share_one_series() -> None:
    metrics = ServingMetrics(max_tenants=2)
    for i in range(1000):
        tenant = f"t{i}"
        metrics.step(tenant, record(), 0.001)
        metrics.error(tenant, OSError())
        metrics.dropped(tenant, "block")
        metrics.published(tenant, i)
        metrics.refused(tenant)
    metrics.step("t1", record(), 0.001)
    read = parsed(metrics)
    assert {key[1]: value for key, value in read.items() if key[0] == "cylora_steps_total"} == {
        "tenant=t0": 1, "tenant=t1": 2, "tenant=_other": 998,
    }  # fmt: skip
    assert read["cylora_errors_total", "tenant=_other", "type=OSError"] == 998
    assert read["cylora_dropped_jobs_total", "tenant=_other", "policy=block"] == 998
    assert read["cylora_refused_snapshots_total", "tenant=_other"] == 998
    for name in ("cylora_loss", "cylora_grad_norm", "cylora_published_version"):
        assert [key[1] for key in read if key[0] == name] == ["tenant=t0", "tenant=t1"]
    assert metrics.values()["steps"] == 1001
    assert len(metrics.text()) < 10_000


def test_tenant_called_other_shares_its_series() -> None:
    metrics = ServingMetrics(max_tenants=1)
    for tenant in ("_other", "a", "b"):
        metrics.step(tenant, record(), 0.1)
    read = parsed(metrics)
    assert {key[1]: value for key, value in read.items() if key[0] == "cylora_steps_total"} == {
        "tenant=a": 1, "tenant=_other": 2,
    }  # fmt: skip


@pytest.mark.parametrize("wrong", [-1, 1.5, "3", None, True])
def test_limit_that_is_no_count_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="max_tenants must be an integer"):
        ServingMetrics(wrong)


def test_nothing_is_lost_when_many_threads_count() -> None:
    metrics = ServingMetrics(max_tenants=3)

    def count(name: str) -> None:
        for i in range(500):
            metrics.step(f"{name}{i % 2}", record(), 1e-4)
            metrics.dropped(name, "merge")
            if i % 50 == 0:
                parsed(metrics)

    threads = [threading.Thread(target=count, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (metrics.values()["steps"], metrics.values()["dropped"]) == (2000, 2000)
    assert parsed(metrics)["cylora_step_seconds_count",] == 2000


def test_nothing_comes_between_reading_a_number_and_writing_it() -> None:
    metrics = ServingMetrics()
    other = threading.Thread(target=metrics.step, args=("b", record(), 1.0))

    class Interrupted(float):
        def __radd__(self, sum_so_far: float) -> float:
            other.start()
            other.join(0.2)  # it would be through by then, and what it wrote would be lost
            return sum_so_far + float(self)

    metrics.step("a", record(), Interrupted(0.5))
    other.join()
    assert metrics.values()["step_seconds"] == 1.5


def test_forked_child_is_not_locked_out() -> None:
    metrics = ServingMetrics()
    metrics.spilled()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with metrics._lock:
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        acquired = metrics._lock.acquire(timeout=60)  # not by a call that would hang
        if acquired:
            metrics.spilled()
        os._exit(0 if acquired and metrics.values()["spilled"] == 2 else 1)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert metrics.values()["spilled"] == 1


def test_lock_of_another_process_is_replaced() -> None:
    """The same, seen from inside one process."""
    metrics = ServingMetrics()
    first = metrics._lock
    _renew_locks()
    assert metrics._lock is not first
