"""AdapterStore: what a tenant is does not depend on where it is kept, and one tenant's trouble is its own."""

import pickle
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import CONFIG, Twin, by_use, gradients, make_store, new_adapters, print_of, size_of
from training import fill, make_adapter, make_pair, make_set, same_bits

from cylora import (
    ConfigError,
    FormatError,
    Gradients,
    InputError,
    LoraAdapter,
    LoraConfig,
    LoraTrainer,
    LoraTrainingConfig,
    NonFiniteGradientError,
    PublishError,
    StateError,
    StoreError,
    TrainingStep,
)
from cylora.formats import save_checkpoint
from cylora.serving import AdapterStore
from cylora.serving.tenant import published_bytes

TENANTS = ("ann", "Bob", "用户/../7", "d@example.com", "e")
GUARD = {"divergence_window": 3, "divergence_factor": 1.5}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "long history": {"history_limit": 100},
    "bfloat16": {"state_dtype": "bfloat16"},
    "8bit and average": {"state_dtype": "8bit", "ema_decay": 0.9, "lora_plus_ratio": 4.0},
    "skips": {"nonfinite": "skip"},
    "rolls back": {"divergence": "rollback", "rollback_every": 2, "ema_decay": 0.5, **GUARD},
    "stops early": {"early_stopping_patience": 2, "schedule": "cosine", "max_steps": 9},
    "A frozen": {"train_a": False},
}


def at_each(tmp_path: Path, store: AdapterStore, **config: Any) -> dict[str, Twin]:
    """Create all tenants in a store and beside it."""
    for tenant in TENANTS:
        store.create(tenant)
    return {tenant: Twin(tenant, **config) for tenant in TENANTS}


# ---------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tenant_that_was_on_disk_goes_on_to_the_same_bits(tmp_path: Path, config: dict[str, Any]) -> None:
    """Gradients that are not finite, losses that jump and waiting micro-batches on the way."""
    rng = random.Random(1)
    with make_store(tmp_path / "s", room=2.5, **config) as store:
        twins = at_each(tmp_path, store, **config)
        for step in range(40):
            tenant = rng.choice(TENANTS)
            loss, *pair = gradients(tenant, step)
            loss = 1e3 if rng.random() < 0.1 else loss
            if rng.random() < 0.1:
                pair[0][1, 2] = np.nan
            outcomes: list[Any] = []
            for one in (store, twins[tenant]):
                call = store.step if one is store else twins[tenant].step
                arguments = (tenant, loss, *pair) if one is store else (loss, *pair)
                try:
                    outcomes.append(call(*arguments))
                except NonFiniteGradientError as error:
                    outcomes.append(str(error))
            assert str(outcomes[0]) == str(outcomes[1])
            assert store.resident_bytes <= 2.5 * size_of(**config)
        assert store.counters()["spilled"] > 10
        assert {tenant: print_of(store, tenant) for tenant in TENANTS} == {t: twins[t].print() for t in TENANTS}


def test_waiting_micro_batches_go_to_disk_and_come_back(tmp_path: Path) -> None:
    with make_store(tmp_path / "s", room=1.5) as store:
        twins = at_each(tmp_path, store)
        for step in range(3):
            for tenant in TENANTS:
                loss, *pair = gradients(tenant, step)
                with store.use(tenant) as (trainer, adapters):
                    trainer.accumulate(loss, adapters, *pair, weight=2.0)
                twins[tenant].trainer.accumulate(loss, twins[tenant].adapters, *pair, weight=2.0)
        before = store.resident_bytes
        for tenant in TENANTS:
            assert print_of(store, tenant) == twins[tenant].print()
            with pytest.raises(StateError, match="3 micro-batches wait"):
                store.step(tenant, 1.0, *make_pair())
            with store.use(tenant) as (trainer, adapters):
                assert trainer.step_accumulated(adapters) == twins[tenant].trainer.step_accumulated()
            assert print_of(store, tenant) == twins[tenant].print()
        assert 0 < store.resident_bytes < before  # the buffer counts while something waits in it


@pytest.mark.parametrize("kind", ["set", "lone"])
def test_steps_are_those_of_a_trainer(tmp_path: Path, kind: str) -> None:
    make = (lambda _: make_set(3)) if kind == "set" else new_adapters
    with make_store(tmp_path / "s", make=make) as store:
        store.create("a")
        twin = Twin("a", make)
        for step in range(4):
            given = (fill(Gradients(twin.adapters), step),) if kind == "set" else make_pair(step)
            store.check("a", 1.0, *given)
            assert store.step("a", 1.0, *given) == twin.step(1.0, *given)
        assert print_of(store, "a") == twin.print()


def test_another_store_finds_the_tenants_of_the_first(tmp_path: Path) -> None:
    with make_store(tmp_path / "s", room=2) as store:
        twins = at_each(tmp_path, store)
        for tenant in TENANTS:
            store.step(tenant, *gradients(tenant, 0))
    with make_store(tmp_path / "s", room=2) as store:
        assert store.tenants() == sorted(TENANTS)
        assert len(store) == len(TENANTS)
        assert "ann" in store
        assert "nobody" not in store
        assert 7 not in store
        assert store.counters()["resident"] == store.resident_bytes == 0
        for tenant, twin in twins.items():
            twin.step(*gradients(tenant, 0))
            assert store.step(tenant, *gradients(tenant, 1)) == twin.step(*gradients(tenant, 1))
            assert print_of(store, tenant) == twin.print()


def test_tenant_without_a_step_comes_back_too(tmp_path: Path) -> None:
    """Its file is smaller than what becomes of it."""
    wide = LoraAdapter(300, 300, LoraConfig(rank=8), seed=0)  # so that the moments outweigh what is estimated
    with make_store(tmp_path / "s", make=lambda _: wide) as store:
        store.create("a")
        counted = store.resident_bytes
    with make_store(tmp_path / "s", make=lambda _: wide, room=1) as store:
        assert store.step("a", 1.0, np.ones(wide.param_count(), np.float32)).step == 0
        assert store.resident_bytes == counted


def test_tenant_from_disk_keeps_the_config_it_was_saved_with(tmp_path: Path) -> None:
    with make_store(tmp_path / "s", learning_rate=1e-3) as store:
        store.create("old")
    with make_store(tmp_path / "s", learning_rate=1e-4) as store:
        store.create("new")
        rates = [store.step(tenant, 1.0, *make_pair()).learning_rate for tenant in ("old", "new")]
        assert rates == [1e-3, 1e-4]


def test_schedule_that_is_a_function_comes_from_the_config_again(tmp_path: Path) -> None:
    with make_store(tmp_path / "s", room=1, schedule=_falling) as store:
        for tenant in "ab":
            store.create(tenant)
        rates = [store.step(tenant, 1.0, *make_pair()).learning_rate for tenant in "ababab"]
        assert rates == [_falling(step) for step in (0, 0, 1, 1, 2, 2)]
    with (
        make_store(tmp_path / "s") as store,
        pytest.raises(ConfigError, match="schedule must be given again"),
    ):
        store.step("a", 1.0, *make_pair())


def test_schedule_that_has_a_name_stays_where_the_config_has_a_function(tmp_path: Path) -> None:
    with make_store(tmp_path / "s", schedule="cosine", max_steps=9) as store:
        store.create("named")
        store.step("named", *gradients("named", 0))
    with make_store(tmp_path / "s", room=1, schedule=_falling, max_steps=9) as store:
        store.create("function")
        twins = {
            "named": Twin("named", schedule="cosine", max_steps=9),
            "function": Twin("function", schedule=_falling),
        }
        twins["named"].step(*gradients("named", 0))
        for step in range(1, 4):
            for tenant, twin in twins.items():
                given = gradients(tenant, step)
                assert store.step(tenant, *given).learning_rate == twin.step(*given).learning_rate
        assert store.counters()["restored"] >= 5
        assert print_of(store, "named") == twins["named"].print()
    with make_store(tmp_path / "s", schedule=_falling) as store, store.use("named") as (trainer, _):
        assert trainer.config.schedule == "cosine"


@pytest.mark.parametrize("schedule", ["constant", lambda step: 1e-3])
def test_damaged_file_is_the_same_error_whatever_the_schedule(tmp_path: Path, schedule: Any) -> None:
    with make_store(tmp_path / "s", schedule=schedule) as store:
        store.create("a")
    (file,) = (tmp_path / "s").glob("tenant-*")
    file.write_bytes(file.read_bytes()[:20])
    with make_store(tmp_path / "s", schedule=schedule) as store:
        with pytest.raises(FormatError, match=re.escape(str(file))):
            store.step("a", *gradients("a", 0))
        assert (store.resident_bytes, file.stat().st_size) == (0, 20)


def _falling(step: int) -> float:
    return 1e-3 / (step + 1)


# ---------------------------------------------------------------------- the budget


def test_least_recently_used_tenant_leaves_first(tmp_path: Path) -> None:
    with make_store(tmp_path / "s", room=3) as store:
        for tenant in "abc":
            store.create(tenant)
        store.step("a", 1.0, *make_pair())
        with store.use("b"):
            pass
        store.create("d")
        assert by_use(store) == ["a", "b", "d"]
        store.step("c", 1.0, *make_pair())
        assert by_use(store) == ["b", "d", "c"]
        assert store.counters() == {"tenants": 4, "resident": 3, "spilled": 2, "restored": 1, "failed_writes": 0}


def test_what_is_counted_is_what_the_config_asks_for(tmp_path: Path) -> None:
    plain, floats = size_of(), 4 * make_adapter().param_count()
    assert plain == 3 * floats + 8 * 25 + 12 * 1024
    assert size_of(history_limit=108) == plain + 2500
    assert size_of(ema_decay=0.5) == plain + floats
    assert size_of(state_dtype="bfloat16") == plain - floats
    assert size_of(train_a=False) == plain - 2 * 4 * make_adapter().a_matrix.size
    assert size_of(divergence="skip", divergence_window=10) == plain + 800 + 3 * 1024
    whole = plain + 800 + 6 * 1024 + 5 * floats
    assert size_of(divergence="rollback", divergence_window=10, ema_decay=0.5) == whole
    members = make_set()
    assert size_of(members) == 12 * members.param_count() + 8 * 25 + 12 * 1024 + 4 * 1024
    with make_store(tmp_path / "s") as store:
        store.create("a")
        assert store.resident_bytes == plain
        store.create("b")
        assert store.resident_bytes == 2 * plain
        store.remove("a")
        assert store.resident_bytes == plain


def test_history_without_a_limit_has_one_of_100(tmp_path: Path) -> None:
    for config in (None, LoraTrainingConfig()):
        with AdapterStore(new_adapters, config, folder=tmp_path / "s", memory_budget=10**6) as store:
            store.create("a")
            with store.use("a") as (trainer, _):
                assert trainer.config.history_limit == 100
                assert trainer.config.log_every == (0 if config is None else 10)
            store.remove("a")


def test_budget_that_holds_no_tenant_is_told(tmp_path: Path) -> None:
    with make_store(tmp_path / "s", room=0.9) as store:
        with pytest.raises(StoreError, match=f"memory_budget must be at least {size_of()} for this tenant alone, got"):
            store.create("a")
        assert store.tenants() == []
        assert store.resident_bytes == 0
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["store.lock"]


def test_tenants_in_use_are_not_spilled(tmp_path: Path) -> None:
    with make_store(tmp_path / "s", room=2) as store:
        for tenant in "abc":
            store.create(tenant)
        with store.use("a") as (trainer, adapters), store.use("b"):
            before = adapters.flat.vector.copy()
            message = r"\d+ bytes of memory_budget, \d+, must be free, got \d+: all other tenants in memory are in use"
            with pytest.raises(StoreError, match=message):
                store.step("c", 1.0, *make_pair())
            (result,) = store.step_many([("c", 1.0, *make_pair())])
            assert isinstance(result, StoreError)
            with pytest.raises(StoreError, match="must be free"):
                store.create("d")
            assert store.step("a", 1.0, *make_pair()) == trainer.last_step()
            assert not same_bits(before, adapters.flat.vector)
            assert [record.step for record in store.step_many([("a", 1.0, *make_pair())] * 2)] == [1, 2]
        assert "d" not in store
        assert store.step("c", 1.0, *make_pair()).step == 0
        assert store.step("a", 1.0, *make_pair()).step == 3


# ---------------------------------------------------------------------- many in one call


def test_step_many_does_what_step_does(tmp_path: Path) -> None:
    with make_store(tmp_path / "s", room=2.2) as store:
        twins = at_each(tmp_path, store)
        order = [*TENANTS, *TENANTS, "ann", "ann", "e", "Bob"]
        for round_ in range(3):
            jobs = [(tenant, *gradients(tenant, 100 * round_ + place)) for place, tenant in enumerate(order)]
            results = store.step_many(iter(jobs))
            assert results == [twins[tenant].step(*rest) for tenant, *rest in jobs]
            assert store.resident_bytes <= 2.2 * size_of()
        assert {tenant: print_of(store, tenant) for tenant in TENANTS} == {t: twins[t].print() for t in TENANTS}


def test_error_of_one_job_touches_no_other(tmp_path: Path) -> None:
    with make_store(tmp_path / "s", room=2) as store:
        twins = at_each(tmp_path, store)
        good = [(tenant, *gradients(tenant, 0)) for tenant in TENANTS]
        bad = np.full((3, 6), np.nan, np.float32)
        wrong: list[tuple[Any, type[Exception], str]] = [
            (("nobody", *make_pair(), 1.0), InputError, "tenant must be one that was created, got 'nobody'"),
            (("ann", 1.0, bad, make_pair()[1]), NonFiniteGradientError, "gradient of A must be finite"),
            (("ann", 1.0, make_pair()[1], make_pair()[0]), InputError, r"grad_a must .* \(3, 6\)"),
            (("Bob", "high", *make_pair()), InputError, "loss must be a real number, got 'high'"),
            (("e", 1.0, None), InputError, "gradient must be"),
            ((), InputError, r"a job must be \(tenant, loss, grad_a, grad_b\) or \(.*\), got a tuple of 0"),
            (["ann", 1.0, *make_pair()], InputError, "a job must be .*, got list"),
            ((["ann"], 1.0, *make_pair()), InputError, "a job must be .*, got a tenant of type list"),
        ]
        jobs: list[Any] = [*(job for job, _, _ in wrong), *good, *(job for job, _, _ in wrong)]
        results = store.step_many(jobs)
        for (_, kind, message), *both in zip(wrong, results[: len(wrong)], results[-len(wrong) :], strict=True):
            for result in both:
                with pytest.raises(kind, match=message):
                    raise result  # type: ignore[misc]
        assert results[len(wrong) : -len(wrong)] == [twins[tenant].step(*rest) for tenant, *rest in good]
        assert {tenant: print_of(store, tenant) for tenant in TENANTS} == {t: twins[t].print() for t in TENANTS}
        assert store.step_many([]) == []
        with pytest.raises(InputError, match="jobs must be an iterable of tuples, got int"):
            store.step_many(7)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- tenants that come and go


def test_create_refuses_what_is_no_new_tenant(tmp_path: Path) -> None:
    given: Any = None
    with make_store(tmp_path / "s", make=lambda tenant: make_adapter() if tenant in ("any", "a") else given) as store:
        store.create("a")
        store.step("a", 1.0, *make_pair())
        before = print_of(store, "a")
        with pytest.raises(InputError, match="tenant must be new to be created, got 'a'"):
            store.create("a")
        with pytest.raises(InputError, match="tenant must be a non-empty str, got ''"):
            store.create("")
        with pytest.raises(
            InputError, match="new_adapters must return a LoraAdapter or an AdapterSet, got NoneType for 'b"
        ):
            store.create("b")
        given = make_adapter()
        given.a_matrix[0, 0] = np.inf
        with pytest.raises(InputError, match=r"A must be finite, got inf at \[0, 0\]"):
            store.create("b")
        assert store.tenants() == ["a"]
        assert print_of(store, "a") == before
        assert store.resident_bytes == size_of()
        given = make_adapter()
        store.create("b")


def test_factory_that_raises_leaves_no_tenant(tmp_path: Path) -> None:
    is_broken = True

    def make(tenant: str) -> Any:
        if is_broken and tenant != "any":
            raise KeyError(tenant)
        return make_adapter()

    with make_store(tmp_path / "s", make=make) as store:
        with pytest.raises(KeyError, match="a"):
            store.create("a")
        assert "a" not in store
        is_broken = False
        store.create("a")


def test_one_adapter_for_all_is_copied(tmp_path: Path) -> None:
    shared = make_adapter()
    with make_store(tmp_path / "s", make=lambda _: shared) as store:
        for tenant in "ab":
            store.create(tenant)
        before = shared.flat.vector.copy()
        store.step("a", 1.0, *make_pair())
        with store.use("b") as (_, adapters):
            assert same_bits(adapters.flat.vector, before)
        assert same_bits(shared.flat.vector, before)


def test_removed_tenant_is_gone_and_its_name_free(tmp_path: Path) -> None:
    with make_store(tmp_path / "s", room=1) as store:
        for tenant in "ab":
            store.create(tenant)
            store.step(tenant, 1.0, *make_pair())
        path = tmp_path / "s" / "tenant-a.safetensors"
        assert path.exists()
        store.remove("a")
        assert not path.exists()
        store.remove("b")
        assert store.tenants() == []
        assert store.resident_bytes == 0
        for call in (store.step, store.check):
            with pytest.raises(InputError, match="tenant must be one that was created, got 'a'"):
                call("a", 1.0, *make_pair())
        with pytest.raises(InputError, match="got 'a'"):
            store.remove("a")
        with pytest.raises(InputError, match="got None"):
            store.latest(None)  # type: ignore[arg-type]
        store.create("a")
        assert store.step("a", 1.0, *make_pair()).step == 0
        with (
            store.use("a"),
            pytest.raises(StateError, match="must not be in use to be removed, got 'a', used by this thr"),
        ):
            store.remove("a")
        assert "a" in store


def test_file_that_somebody_put_there_is_not_replaced(tmp_path: Path) -> None:
    with make_store(tmp_path / "s") as store:
        path = tmp_path / "s" / "tenant-a.safetensors"
        path.write_bytes(b"precious")
        with pytest.raises(InputError, match="tenant must be new to be created, got 'a'"):
            store.create("a")
        assert path.read_bytes() == b"precious"


# ---------------------------------------------------------------------- files that are not what they should be


def test_damaged_file_is_its_tenants_trouble_alone(tmp_path: Path) -> None:
    with make_store(tmp_path / "s", room=2) as store:
        twins = at_each(tmp_path, store)
        for tenant in TENANTS:
            store.step(tenant, *gradients(tenant, 0))
            twins[tenant].step(*gradients(tenant, 0))
        path = tmp_path / "s" / "tenant-ann.safetensors"
        damaged = bytearray(path.read_bytes())
        damaged[-50] ^= 1
        path.write_bytes(damaged)
        for _ in range(2):
            with pytest.raises(
                FormatError, match=r"tenant-ann\.safetensors: 'sha256' must be that of all bytes before it"
            ):
                store.step("ann", *gradients("ann", 1))
            results = store.step_many([(tenant, *gradients(tenant, 1)) for tenant in TENANTS])
            assert isinstance(results[0], FormatError)
            assert results[1:] == [twins[tenant].step(*gradients(tenant, 1)) for tenant in TENANTS[1:]]
            assert store.resident_bytes == 2 * size_of()
            with pytest.raises(FormatError, match="tenant-ann"), store.use("ann"):
                pass
            with pytest.raises(FormatError, match="tenant-ann"):
                store.publish("ann")
            store.check("ann", *gradients("ann", 1))
        store.flush()
        assert path.read_bytes() == damaged
        assert store.latest("ann") is None
        with pytest.raises(InputError, match="tenant must be new"):
            store.create("ann")
        store.remove("ann")
        store.create("ann")
        assert store.step("ann", 1.0, *make_pair()).step == 0


def test_file_of_another_tenant_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    with make_store(tmp_path / "s") as store:
        store.create("a")
        store.create("b")
    one, other = (tmp_path / "s" / f"tenant-{tenant}.safetensors" for tenant in "ab")
    other.write_bytes(one.read_bytes())
    with make_store(tmp_path / "s") as store:
        with pytest.raises(
            FormatError, match=r"tenant-b\.safetensors: the extra value 'tenant' must be 'b', .* got 'a'"
        ):
            store.step("b", 1.0, *make_pair())
        assert store.step("a", 1.0, *make_pair()).step == 0


def test_version_that_is_none_is_told(tmp_path: Path) -> None:
    with make_store(tmp_path / "s") as store:
        store.create("a")
    twin, path = Twin("a"), tmp_path / "s" / "tenant-a.safetensors"
    save_checkpoint(twin.trainer, twin.adapters, path, extra={"tenant": "a", "version": "x"})
    with (
        make_store(tmp_path / "s") as store,
        pytest.raises(
            FormatError, match=r"tenant-a\.safetensors: the extra value 'version' must be an integer, got 'x'"
        ),
    ):
        store.step("a", 1.0, *make_pair())


def test_file_that_is_gone_is_told(tmp_path: Path) -> None:
    with make_store(tmp_path / "s") as store:
        store.create("a")
    with make_store(tmp_path / "s") as store:
        (tmp_path / "s" / "tenant-a.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="tenant-a"):
            store.check("a", 1.0, *make_pair())
        assert store.resident_bytes == 0


# ---------------------------------------------------------------------- looking before a step


def test_check_says_what_a_step_would(tmp_path: Path) -> None:
    a, b = make_pair()
    wrong: list[tuple[Any, ...]] = [
        ("high", a, b), (1.0, b, a), (1.0, a.astype(np.float64), b), (1.0, a[:, ::2], b), (1.0, a), (1.0, None),
        (1.0, np.ones(32, np.float32)), (1.0, Gradients(make_set())), (None, a, b), (1.0, a, "b"),
    ]  # fmt: skip
    with make_store(tmp_path / "s") as store:
        store.create("a")
        before = print_of(store, "a")
        for loss, *rest in wrong:
            with pytest.raises(InputError) as stepped:
                store.step("a", loss, *rest)
            with pytest.raises(InputError) as checked:
                store.check("a", loss, *rest)
            if not isinstance(rest[0], Gradients):
                assert str(checked.value) == str(stepped.value)
        for fine in (
            (a, b),
            (np.ones(33, np.float16),),
            (np.full(33, np.nan, np.float32),),
            (Gradients(make_adapter()),),
        ):
            store.check("a", 1.0, *fine)
        store.check("a", float("nan"), a, b)
        assert print_of(store, "a") == before
    with make_store(tmp_path / "set", make=lambda _: make_set()) as store:
        store.create("a")
        for call in (store.step, store.check):
            with pytest.raises(
                InputError, match="gradients of an AdapterSet must be one Gradients or flat vector, got a"
            ):
                call("a", 1.0, a, b)
        with pytest.raises(InputError, match=r"grad_a must be a Gradients of the tenant's layout, .*, got one of"):
            store.check("a", 1.0, Gradients(make_adapter()))


def test_check_reads_only_a_tenant_that_was_never_in_memory(tmp_path: Path) -> None:
    with make_store(tmp_path / "s", room=1) as store:
        for tenant in "ab":
            store.create(tenant)
        store.check("a", 1.0, *make_pair())
        assert store.counters()["restored"] == 0
    with make_store(tmp_path / "s", room=1) as store:
        for tenant in "abab":
            store.check(tenant, 1.0, *make_pair())
        assert store.counters()["restored"] == 2


# ---------------------------------------------------------------------- the parameters


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"new_adapters": None}, ConfigError, "new_adapters must be callable, got NoneType"),
        ({"config": {}}, ConfigError, "config must be a LoraTrainingConfig, got dict"),
        ({"config_for": 7}, ConfigError, r"config_for \(if not None\) must be callable, got int"),
        ({"memory_budget": 0}, ConfigError, "memory_budget must be an integer >= 1, got 0"),
        ({"threads": 0}, ConfigError, r"threads \(if not None\) must be an integer in \[1, 64\], got 0"),
        ({"max_norm_ratio": 0.5}, ConfigError, r"max_norm_ratio \(if not None\) must be >= 1, got 0.5"),
    ],
)
def test_wrong_parameter_is_refused_before_anything_is_made(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"new_adapters": new_adapters, "folder": tmp_path / "s", "memory_budget": 10**6}
    with pytest.raises(error, match=message):
        AdapterStore(**arguments | changes)
    assert not (tmp_path / "s").exists()


def test_each_tenant_may_have_a_config_of_its_own(tmp_path: Path) -> None:
    def config_for(tenant: str) -> Any:
        return None if tenant == "wrong" else LoraTrainingConfig(**CONFIG | {"learning_rate": 1e-3 * len(tenant)})

    with make_store(tmp_path / "s", room=1, store={"config_for": config_for}) as store:
        for tenant in ("a", "bb"):
            store.create(tenant)
        for tenant in ("a", "bb", "a"):
            assert store.step(tenant, 1.0, *make_pair()).learning_rate == 1e-3 * len(tenant)
        with pytest.raises(ConfigError, match="config must be a LoraTrainingConfig, got NoneType"):
            store.create("wrong")
        assert store.tenants() == ["a", "bb"]


def test_store_is_not_pickled(tmp_path: Path) -> None:
    with (
        make_store(tmp_path / "s") as store,
        pytest.raises(TypeError, match="an AdapterStore is not copied or pickled"),
    ):
        pickle.dumps(store)


# ---------------------------------------------------------------------- serving


def test_published_snapshot_stays_while_its_tenant_goes_on_and_to_disk(tmp_path: Path) -> None:
    layout = make_adapter().flat.layout
    with make_store(tmp_path / "s", room=6) as store:
        at_each(tmp_path, store)
        assert store.latest("ann") is None
        before = store.resident_bytes
        first = store.publish("ann")
        assert store.resident_bytes == before + published_bytes(layout)
        assert (first.version, first.step) == (1, 0)
        bits = first.vector.copy()
        store.step("ann", 1.0, *make_pair())
        assert store.latest("ann") is first
        assert same_bits(first.vector, bits)
        second = store.publish("ann")
        assert (second.version, second.step) == (2, 1)
        assert store.latest("ann") is second
        assert store.resident_bytes == before + published_bytes(layout)
        store.create("more")
        store.step("Bob", 1.0, *make_pair())
        assert "ann" not in by_use(store) or store.counters()["spilled"] > 0
        for tenant in TENANTS[1:]:
            store.step(tenant, 1.0, *make_pair())
        assert store.latest("ann") is second
        store.remove("ann")
        assert store.resident_bytes == 5 * size_of()


def test_snapshots_of_tenants_on_disk_take_at_most_a_quarter(tmp_path: Path) -> None:
    names = [f"user{i}" for i in range(12)]
    with make_store(tmp_path / "s", room=5) as store:
        for name in names:
            store.create(name)
            store.publish(name)
            assert store.resident_bytes <= 5 * size_of()
        spared = [name for name in names if store.latest(name) is not None and name not in by_use(store)]
        most = int(5 * size_of() / 4 / published_bytes(make_adapter().flat.layout))
        assert len(spared) == most
        assert spared == [name for name in names if name not in by_use(store)][-most:]
        assert store.latest(names[0]) is None
        again = store.publish(names[0])
        assert again.version == 2
        store.flush()
    with make_store(tmp_path / "s", room=5) as store:
        assert store.latest(names[0]) is None
        assert store.publish(names[0]).version == 3


def test_last_snapshots_leave_before_a_call_is_refused(tmp_path: Path) -> None:
    with make_store(tmp_path / "s", room=2.01) as store:
        store.create("a")
        store.publish("a")
        store.create("b")
        assert store.latest("a") is not None
        with store.use("b"):
            store.create("c")
            assert store.latest("a") is None
            assert store.resident_bytes == 2 * size_of()


def test_tenant_that_comes_back_has_its_snapshot_still(tmp_path: Path) -> None:
    published = published_bytes(make_adapter().flat.layout)
    with make_store(tmp_path / "s", room=5) as store:
        store.create("a")
        snapshot = store.publish("a")
        for tenant in "bcdef":
            store.create(tenant)
        assert "a" not in by_use(store)
        store.step("a", 1.0, *make_pair())
        assert store.latest("a") is snapshot
        assert store._memory._spared_bytes == 0
        assert store.resident_bytes == len(by_use(store)) * size_of() + published


@pytest.mark.parametrize("trouble", ["not finite", "a jump"])
def test_snapshot_that_cannot_be_served_is_refused(tmp_path: Path, trouble: str) -> None:
    told: list[Any] = []
    metrics = _Told(told)
    with make_store(tmp_path / "s", store={"max_norm_ratio": 2.0, "metrics": metrics}) as store:
        store.create("a")
        good = store.publish("a")
        before = store.resident_bytes
        with store.use("a") as (_, adapters):
            kept = adapters.a_matrix.copy()
            adapters.a_matrix = np.full_like(kept, np.nan if trouble == "not finite" else 1e3)
        message = (
            "A must be finite to be published" if trouble == "not finite" else "norm must be at most 2 times that of"
        )
        with pytest.raises(PublishError, match=f"{message}.*version 1 stays"):
            store.publish("a")
        assert store.latest("a") is good
        assert store.resident_bytes == before
        with store.use("a") as (_, adapters):
            adapters.a_matrix = kept
        assert store.publish("a").version == 2
    assert told == [("published", "a", 1), ("refused", "a"), ("published", "a", 2)]


class _Told:
    """Metrics that write down what they are told, but for the bytes."""

    def __init__(self, told: list[Any]) -> None:
        self.told = told
        self.bytes, self.tenants = 0, 0

    def resident(self, bytes_: int, tenants: int) -> None:
        self.bytes, self.tenants = bytes_, tenants

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.told.append((name, *arguments))


def test_metrics_are_told_of_what_comes_and_goes(tmp_path: Path) -> None:
    told: list[Any] = []
    metrics = _Told(told)
    with make_store(tmp_path / "s", room=1, store={"metrics": metrics}) as store:
        store.create("a")
        assert (metrics.bytes, metrics.tenants) == (store.resident_bytes, 1)
        store.create("b")
        store.step("a", 1.0, *make_pair())
        assert (metrics.bytes, metrics.tenants) == (store.resident_bytes, 1)
        assert told == [("spilled",), ("spilled",), ("restored",)]


def test_records_are_records(tmp_path: Path) -> None:
    with make_store(tmp_path / "s") as store:
        store.create("a")
        assert isinstance(store.step("a", 1.0, *make_pair()), TrainingStep)
        with store.use("a") as (trainer, _):
            assert isinstance(trainer, LoraTrainer)
