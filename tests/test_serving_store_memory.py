"""What a store's tenants take in memory: what is counted, and no more from round to round."""

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_memory import KIB, traced

from cylora import AdapterSet, Gradients, LoraAdapter, LoraConfig, LoraTrainingConfig
from cylora.serving import AdapterStore
from cylora.serving.tenant import published_bytes

RANK8 = LoraConfig(rank=8)


def open_store(folder: Path, make: Callable[[str], Any], budget: int, **config: Any) -> AdapterStore:
    settings = LoraTrainingConfig(**{"log_every": 0, "warmup_steps": 0, "history_limit": 100} | config)
    return AdapterStore(make, settings, folder=folder, memory_budget=budget)


def without_writing(store: AdapterStore) -> None:
    """Let the end of a test be quick: what is in memory need not come to disk."""
    for tenant in store._memory.tenants.values():
        tenant.is_dirty = False


MODEL = {f"layer{i}": (64, 64) for i in range(7)}
CASES: dict[str, tuple[int, Callable[[str], Any], dict[str, Any]]] = {
    "rank 8 at 512": (300, lambda _: LoraAdapter(512, 512, RANK8, seed=0), {}),
    "tiny": (300, lambda _: LoraAdapter(16, 16, RANK8, seed=0), {}),
    "8bit and average": (
        100,
        lambda _: LoraAdapter(512, 512, RANK8, seed=0),
        {"state_dtype": "8bit", "ema_decay": 0.9},
    ),
    "guard": (100, lambda _: LoraAdapter(64, 64, RANK8, seed=0), {"divergence": "rollback"}),
    "a set": (50, lambda _: AdapterSet(MODEL, RANK8, seed=0), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_tenants_take_no_more_than_is_counted(tmp_path: Path, case: str, figures: Callable[..., None]) -> None:
    """With full histories; counted by the allocator of Python, which leaves out some 3 KiB of the system's for each."""
    count, make, config = CASES[case]
    gradients = Gradients(make("any")).vector + np.float32(0.01)
    names = [f"user{i}" for i in range(count)]
    with open_store(tmp_path / "s", make, 10**9, **config) as store:
        with traced() as cost:
            for name in names:
                store.create(name)
            jobs = [(name, 1.0, gradients) for name in names]
            for _ in range(101):
                store.step_many(jobs)
            del jobs
        each, counted = cost.held / count, store.resident_bytes / count
        figures(case=case, held=round(each), counted=round(counted))
        assert each <= counted
        assert counted - each <= 8 * KIB + 0.1 * counted
        without_writing(store)


def test_snapshots_take_no_more_than_is_counted(tmp_path: Path, figures: Callable[..., None]) -> None:
    make = CASES["rank 8 at 512"][1]
    names = [f"user{i}" for i in range(50)]
    with open_store(tmp_path / "s", make, 10**9) as store:
        for name in names:
            store.create(name)
        with traced() as cost:
            for _ in range(3):
                for name in names:
                    store.publish(name)
        each, counted = cost.held / len(names), published_bytes(make("any").flat.layout)
        figures(held=round(each), counted=counted)
        assert each <= counted
        without_writing(store)


def test_coming_and_going_leaves_nothing_behind(tmp_path: Path) -> None:
    """Six tenants in a store that holds two: all come and go many times, are published, and removed and made again."""
    make = CASES["tiny"][1]
    gradients = Gradients(make("any")).vector + np.float32(0.01)
    names = [f"user{i}" for i in range(6)]
    with open_store(tmp_path / "s", make, 60_000) as store:

        def rounds(count: int) -> None:
            for _ in range(count):
                for name in names:
                    store.step(name, 1.0, gradients)
                    store.publish(name)
                store.remove(names[0])
                store.create(names[0])

        for name in names:
            store.create(name)
        tracemalloc.start()
        try:
            held = []
            for _ in range(2):  # from the first on, what replaces something older counts too
                rounds(12)
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        assert store.counters()["spilled"] > 100
        assert held[1] - held[0] <= 24 * KIB


def test_tenants_that_came_back_share_what_is_equal(tmp_path: Path) -> None:
    """What a file says of the config would else take some 4 KiB for each."""
    for make in (CASES["tiny"][1], CASES["a set"][1]):
        with open_store(tmp_path / str(id(make)), make, 150_000) as store:
            for index in range(12):
                store.create(f"user{index}")
            configs = []
            for index in range(3):
                with store.use(f"user{index}") as (trainer, adapters):
                    one = adapters["layer3"] if isinstance(adapters, AdapterSet) else adapters
                    assert one.config == RANK8
                    configs.append((id(trainer.config), id(trainer.config.lora_config), id(one.config)))
            assert store.counters()["restored"] >= 3
            assert len(set(configs)) == 1
            assert configs[0][1] == configs[0][2]


@pytest.mark.nightly
def test_coming_and_going_leaves_the_process_as_large(tmp_path: Path, figures: Callable[..., None]) -> None:
    make = CASES["rank 8 at 512"][1]
    gradients = Gradients(make("any")).vector + np.float32(0.01)
    names = [f"user{i}" for i in range(40)]
    with open_store(tmp_path / "s", make, 20 * 115_000) as store:
        for name in names:
            store.create(name)

        def rounds(count: int) -> int:
            for _ in range(count):
                for name in names:
                    store.step(name, 1.0, gradients)
            gc.collect()
            return int(Path("/proc/self/statm").read_text().split()[1]) * 4 * KIB

        first, last = rounds(100), rounds(100)
        figures(first=first, last=last, spilled=store.counters()["spilled"])
        assert last - first <= 512 * KIB


@pytest.mark.nightly
def test_ten_thousand_tenants_take_at_most_1_15_times_parameters_and_state(
    tmp_path: Path, figures: Callable[..., None]
) -> None:
    """Rank 8 at d 512, all stepping until their histories are full: what the process grows by."""
    make, count = CASES["rank 8 at 512"][1], 10_000
    gradients = Gradients(make("any")).vector + np.float32(0.01)
    with open_store(tmp_path / "s", make, 1_150_000_000) as store:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * 4 * KIB
        for index in range(count):
            store.create(f"user{index}@example.com")
        jobs = [(f"user{index}@example.com", 1.0, gradients) for index in range(count)]
        for _ in range(101):
            assert not any(isinstance(result, Exception) for result in store.step_many(jobs))
        del jobs
        gc.collect()
        grown = int(Path("/proc/self/statm").read_text().split()[1]) * 4 * KIB - before
        vectors = count * 8192 * 12
        figures(grown=grown, vectors=vectors, counted=store.resident_bytes, ratio=round(grown / vectors, 4))
        assert grown <= 1.15 * vectors
        assert store.counters()["spilled"] == 0
        without_writing(store)
