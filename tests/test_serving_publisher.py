"""AdapterPublisher: whole versions, counted upwards, refused when they are bad, for readers that never wait."""

import gc
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from interrupts import interrupted
from test_durable import names
from test_fork import in_child
from test_hold import held_elsewhere, until
from training import fill, fingerprint, make_adapter, make_pair, make_set, make_trainer, same_bits

from cylora import (
    AdapterSet,
    ConfigError,
    Gradients,
    InputError,
    LoraTrainer,
    PublishError,
    StateError,
    TrainerBusyError,
)
from cylora.serving import AdapterPublisher, AdapterSnapshot
from cylora.serving.announcing import Hook


def trained(steps: int = 3, **config: Any) -> tuple[LoraTrainer, AdapterSet]:
    trainer, adapters = make_trainer(**config), make_set()
    for step in range(steps):
        trainer.step(1.0, adapters, fill(Gradients(adapters), step))
    return trainer, adapters


# ------------------------------------------------------------------ publish and latest


def test_nothing_is_published_before_the_first_time() -> None:
    publisher = AdapterPublisher(make_set())
    assert publisher.latest is None
    assert publisher.versions == ()
    assert publisher.counters() == {"published": 0, "refused": 0, "rolled_back": 0, "hook_errors": 0, "buffers": 0}


def test_publish_copies_at_a_step_and_training_goes_on_beside_it() -> None:
    trainer, adapters = trained()
    publisher = AdapterPublisher(adapters, trainer)
    before, state = adapters.flat.vector.copy(), fingerprint(adapters, trainer)
    first = publisher.publish()
    assert publisher.latest is first
    assert fingerprint(adapters, trainer) == state
    assert (first.version, first.step) == (1, 3)
    trainer.step(1.0, adapters, fill(Gradients(adapters), 3))
    assert same_bits(first.vector, before)
    second = publisher.publish()
    assert publisher.latest is second
    assert (second.version, second.step) == (2, 4)
    assert same_bits(second.vector, adapters.flat.vector)
    assert same_bits(first.vector, before)
    assert publisher.versions == (1, 2)


def test_a_training_that_is_published_gets_the_same_bits_as_one_that_is_not() -> None:
    (trainer, adapters), (twin, twins) = trained(), trained()
    publisher = AdapterPublisher(adapters, trainer)
    for step in range(3, 9):
        publisher.publish()
        trainer.step(1.0, adapters, fill(Gradients(adapters), step))
        twin.step(1.0, twins, fill(Gradients(twins), step))
    assert fingerprint(adapters, trainer) == fingerprint(twins, twin)


def test_skipped_steps_count_as_in_the_records() -> None:
    trainer, adapters = trained(nonfinite="skip")
    bad = Gradients(adapters)
    bad.vector[0] = np.nan
    assert trainer.step(1.0, adapters, bad).skipped
    assert AdapterPublisher(adapters, trainer).publish().step == 4


def test_without_a_trainer_there_is_no_step() -> None:
    adapters = make_adapter()
    snapshot = AdapterPublisher(adapters).publish()
    assert snapshot.step is None
    assert same_bits(snapshot.vector, adapters.flat.vector)


def test_a_trainer_that_has_not_stepped_is_published_too_and_stays_unbound() -> None:
    trainer, adapters = make_trainer(), make_set()
    assert AdapterPublisher(adapters, trainer).publish().step == 0
    trainer.step(1.0, make_adapter(), *make_pair())


def test_on_step_may_publish() -> None:
    adapters = make_set()
    seen: list[int] = []
    trainer = LoraTrainer(make_trainer(log_every=2).config, on_step=lambda _: seen.append(publisher.publish().step))
    publisher = AdapterPublisher(adapters, trainer)
    for step in range(6):
        trainer.step(1.0, adapters, fill(Gradients(adapters), step))
    assert seen == [2, 4, 6]
    assert same_bits(publisher.latest.vector, adapters.flat.vector)


# ------------------------------------------------------------------ the average


def test_ema_publishes_the_average() -> None:
    trainer, adapters = trained(ema_decay=0.5)
    snapshot = AdapterPublisher(adapters, trainer, ema=True).publish()
    assert same_bits(snapshot.vector, trainer.ema_adapters().flat.vector)
    assert not same_bits(snapshot.vector, adapters.flat.vector)
    assert same_bits(AdapterPublisher(adapters, trainer).publish().vector, adapters.flat.vector)


def test_ema_is_the_weights_before_the_first_step_and_what_was_loaded_after_loading() -> None:
    trainer, adapters = make_trainer(ema_decay=0.5), make_set()
    publisher = AdapterPublisher(adapters, trainer, ema=True)
    assert same_bits(publisher.publish().vector, adapters.flat.vector)
    other, _ = trained(ema_decay=0.5)
    trainer.load_state_dict(other.state_dict())
    assert same_bits(publisher.publish().vector, other.ema_adapters().flat.vector)


@pytest.mark.parametrize("trainer", [None, make_trainer()], ids=["no trainer", "no ema_decay"])
def test_ema_without_an_average_is_refused(trainer: LoraTrainer | None) -> None:
    with pytest.raises(
        ConfigError, match="ema must be False without a trainer that has ema_decay in its config, got T"
    ):
        AdapterPublisher(make_set(), trainer, ema=True)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("adapters",), {}, InputError, "adapters must be a LoraAdapter or an AdapterSet, got str"),
        ((make_set(), "trainer"), {}, InputError, "trainer must be a LoraTrainer or None, got str"),
        ((make_set(),), {"keep": 0}, ConfigError, "keep must be an integer >= 1, got 0"),
        ((make_set(),), {"keep": 1.5}, ConfigError, "keep must be an integer, got 1.5"),
        ((make_set(),), {"max_norm_ratio": 0.5}, ConfigError, r"max_norm_ratio \(if not None\) must be >= 1, got 0.5"),
        ((make_set(),), {"max_norm_ratio": "2"}, ConfigError, r"max_norm_ratio \(if not None\) must be >= 1, got '2'"),
        ((make_set(),), {"max_norm_ratio": np.nan}, ConfigError, r"max_norm_ratio .* must be >= 1, got nan"),
        ((make_set(),), {"name": "a/b"}, InputError, r"name must match .*, got 'a/b'"),
        ((make_set(),), {"name": None}, InputError, r"name must match .*, got None"),
    ],
)
def test_a_wrong_argument_is_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AdapterPublisher(*arguments, **options)


def test_a_trainer_of_other_adapters_is_refused_at_once() -> None:
    trainer, _ = trained()
    with pytest.raises(StateError, match="adapters must be the trainer's"):
        AdapterPublisher(make_set(), trainer)


def test_a_trainer_that_went_over_to_others_is_refused_and_the_latest_stays() -> None:
    trainer, adapters = make_trainer(), make_set()
    publisher = AdapterPublisher(adapters, trainer)
    first = publisher.publish()
    trainer.step(1.0, make_set(), fill(Gradients(adapters)))
    with pytest.raises(StateError, match="adapters must be the trainer's"):
        publisher.publish()
    assert publisher.latest is first
    assert publisher.counters() == {"published": 1, "refused": 0, "rolled_back": 0, "hook_errors": 0, "buffers": 2}


@pytest.mark.parametrize("timeout", [-1, "1", None, np.nan])
def test_a_wrong_timeout_is_refused(timeout: Any, tmp_path: Path) -> None:
    publisher = AdapterPublisher(make_set())
    for call in (publisher.publish, lambda **options: publisher.publish_to(tmp_path, **options)):
        with pytest.raises(InputError, match="timeout must be >= 0, got"):
            call(timeout=timeout)
    assert publisher.latest is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_snapshot_that_is_not_finite_is_refused_and_the_last_good_one_stays(value: float) -> None:
    adapters = make_set()
    publisher = AdapterPublisher(adapters)
    adapters["k"].b_matrix[1, 0] = value
    with pytest.raises(
        PublishError, match=rf"k.B must be finite to be published, got {value} at \[1, 0\]; none is pub"
    ):
        publisher.publish()
    assert publisher.latest is None
    adapters["k"].b_matrix[1, 0] = 1
    first = publisher.publish()
    content, held = first.content_hash, first.vector.copy()
    adapters["k"].b_matrix[1, 0] = value
    for _ in range(3):
        with pytest.raises(PublishError, match="version 1 stays"):
            publisher.publish()
    assert publisher.latest is first
    assert same_bits(first.vector, held)
    assert publisher.versions == (1,)
    assert publisher.counters()["refused"] == 4
    assert publisher.counters()["buffers"] == 2  # what was refused is used again
    adapters["k"].b_matrix[1, 0] = 1
    second = publisher.publish()
    assert (second.version, second.content_hash) == (2, content)


def test_a_norm_that_jumped_is_refused_and_one_at_the_limit_is_not() -> None:
    adapters = make_set()
    publisher = AdapterPublisher(adapters, max_norm_ratio=2)
    adapters.flat.vector[...] = 1
    first = publisher.publish()
    adapters.flat.vector[...] = np.nextafter(np.float32(2), np.float32(3))
    message = (
        r"the norm must be at most 2 times that of version 1, 7.34846923, to be published, got 14.6969402; version 1 st"
    )
    with pytest.raises(PublishError, match=message):
        publisher.publish()
    assert publisher.latest is first
    adapters.flat.vector[...] = 2
    second = publisher.publish()
    assert publisher.latest is second
    adapters.flat.vector[...] = 4  # judged by the last good one, not by the first
    assert publisher.publish().version == 3
    adapters.flat.vector[...] = 1e-3  # falling is no jump
    assert publisher.publish().version == 4
    assert publisher.counters()["refused"] == 1


def test_after_a_rollback_the_norm_is_compared_with_what_was_restored() -> None:
    adapters = make_set()
    publisher = AdapterPublisher(adapters, max_norm_ratio=2)
    for value in (1, 2):
        adapters.flat.vector[...] = value
        publisher.publish()
    adapters.flat.vector[...] = 3  # no jump from version 2
    back = publisher.rollback(1)
    with pytest.raises(PublishError, match=r"must be at most 2 times that of version 3, 7.34.*; version 3 stays"):
        publisher.publish()
    assert publisher.latest is back
    np.copyto(adapters.flat.vector, back.vector)
    assert publisher.publish().version == 4


def test_the_limit_can_be_lifted_and_zero_is_no_measure() -> None:
    adapters = make_set()
    publisher = AdapterPublisher(adapters, max_norm_ratio=1)
    adapters.flat.vector[...] = 0
    publisher.publish()
    adapters.flat.vector[...] = 1
    publisher.publish()
    adapters.flat.vector[...] = 5
    with pytest.raises(PublishError, match="the norm must be at most 1 times"):
        publisher.publish()
    assert publisher.max_norm_ratio == 1
    publisher.max_norm_ratio = None
    assert publisher.publish().version == 3
    with pytest.raises(ConfigError, match="max_norm_ratio"):
        publisher.max_norm_ratio = 0
    assert publisher.max_norm_ratio is None


def test_a_huge_but_finite_norm_is_published() -> None:
    adapters = make_set()
    adapters.flat.vector[...] = np.finfo(np.float32).max
    assert AdapterPublisher(adapters).publish().norm == pytest.approx(3.4028234663852886e38 * 54**0.5, rel=1e-15)


# ------------------------------------------------------------------ keep, get, rollback


def test_the_last_versions_are_kept_and_reachable() -> None:
    adapters = make_set()
    publisher = AdapterPublisher(adapters, keep=3)
    made = []
    for value in range(1, 6):
        adapters.flat.vector[...] = value
        made.append(publisher.publish())
    assert publisher.versions == (3, 4, 5)
    assert [publisher.get(version) for version in (3, 4, 5)] == made[2:]
    assert [float(snapshot.vector[0]) for snapshot in made] == [1, 2, 3, 4, 5]  # held here, though not kept there
    for version in (0, 2, 6):
        with pytest.raises(InputError, match=rf"version must be one of those kept, 3, 4, 5, got {version}"):
            publisher.get(version)
    with pytest.raises(InputError, match="version must be an integer, got '3'"):
        publisher.get("3")  # type: ignore[arg-type]


def test_get_before_the_first_version_says_that_there_is_none() -> None:
    with pytest.raises(InputError, match="version must be one of those kept, none, got 1"):
        AdapterPublisher(make_set()).get(1)


def test_keep_one_keeps_the_latest() -> None:
    publisher = AdapterPublisher(make_set(), keep=1)
    for _ in range(3):
        assert publisher.publish().version in publisher.versions
        assert publisher.versions == (publisher.latest.version,)


def test_rollback_publishes_old_content_as_a_new_version_without_a_copy() -> None:
    trainer, adapters = trained()
    publisher = AdapterPublisher(adapters, trainer, keep=2)
    first = publisher.publish()
    trainer.step(1.0, adapters, fill(Gradients(adapters), 3))
    publisher.publish()
    live = fingerprint(adapters, trainer)
    back = publisher.rollback(1)
    assert publisher.latest is back
    assert (back.version, back.step, back.restored_from, back.norm) == (3, 3, 1, first.norm)
    assert back.adapters is first.adapters
    assert back.content_hash == first.content_hash
    assert publisher.versions == (2, 3)
    assert fingerprint(adapters, trainer) == live
    again = publisher.publish()
    assert (again.version, again.restored_from) == (4, None)
    assert same_bits(again.vector, adapters.flat.vector)
    assert publisher.rollback(3).restored_from == 3
    assert publisher.counters()["rolled_back"] == 2
    assert publisher.counters()["published"] == 5


def test_rollback_of_an_unknown_version_changes_nothing() -> None:
    publisher = AdapterPublisher(make_set())
    first = publisher.publish()
    with pytest.raises(InputError, match="version must be one of those kept, 1, got 2"):
        publisher.rollback(2)
    assert publisher.latest is first
    assert publisher.publish().version == 2


# ------------------------------------------------------------------ memory


def test_memory_stays_at_keep_and_one_while_nobody_holds_more() -> None:
    trainer, adapters = trained()
    publisher = AdapterPublisher(adapters, trainer, keep=3)
    for _ in range(50):
        publisher.publish()
        snapshot = publisher.latest
        snapshot.adapters["q"].apply(np.ones(6))
        del snapshot
    assert publisher.counters()["buffers"] == 4


@pytest.mark.parametrize(
    "take",
    [
        lambda snapshot: snapshot,
        lambda snapshot: snapshot.adapters,
        lambda snapshot: snapshot.adapters["q"],
        lambda snapshot: snapshot.adapters.flat,
        lambda snapshot: snapshot.adapters["k"].flat,
        lambda snapshot: snapshot.vector,
        lambda snapshot: snapshot.vector[3:5],
        lambda snapshot: snapshot.adapters["out.proj"].b_matrix.T[0],
        lambda snapshot: memoryview(snapshot.adapters["q"].a_matrix),
        lambda snapshot: iter(snapshot.adapters["q"].a_matrix),
    ],
)
def test_what_a_reader_holds_never_changes_whatever_part_it_is(take: Callable[[AdapterSnapshot], Any]) -> None:
    adapters = make_set()
    publisher = AdapterPublisher(adapters, keep=1)
    held = take(publisher.publish())
    address = publisher.latest.vector.ctypes.data
    for value in range(20):
        adapters.flat.vector[...] = value
        assert publisher.publish().vector.ctypes.data != address
    assert publisher.counters()["buffers"] == 3
    del held
    gc.collect()
    assert publisher.publish().vector.ctypes.data == address


def test_a_hook_that_raises_and_an_error_that_is_kept_hold_no_memory() -> None:
    def hook(snapshot: AdapterSnapshot, path: Path | None) -> None:
        raise ValueError("no")

    logger = logging.getLogger("cylora")
    logger.disabled = True  # else pytest's handler keeps the records, with their frames
    try:
        publisher = AdapterPublisher(make_set(), keep=1)
        publisher.add_hook(hook)
        for _ in range(10):
            publisher.publish()
    finally:
        logger.disabled = False
    assert publisher.counters()["buffers"] == 2
    assert publisher.counters()["hook_errors"] == 10


# ------------------------------------------------------------------ hooks


def test_hooks_are_called_after_each_version_in_order() -> None:
    publisher = AdapterPublisher(make_set())
    seen: list[Any] = []

    def hook(snapshot: AdapterSnapshot, path: Path | None) -> None:
        seen.append((snapshot, path, publisher.latest is snapshot))

    publisher.add_hook(hook)
    publisher.add_hook(lambda snapshot, path: seen.append(snapshot.version))
    first = publisher.publish()
    second = publisher.rollback(1)
    assert seen == [(first, None, True), 1, (second, None, True), 2]
    publisher.remove_hook(hook)
    publisher.publish()
    assert seen[4:] == [3]
    assert publisher.last_hook_error is None


def test_a_hook_is_not_called_for_what_is_refused() -> None:
    adapters = make_set()
    publisher = AdapterPublisher(adapters)
    publisher.add_hook(lambda snapshot, path: pytest.fail("called"))
    adapters.flat.vector[0] = np.nan
    with pytest.raises(PublishError):
        publisher.publish()


def test_a_hook_that_raises_is_logged_and_counted_and_the_version_stands(caplog: pytest.LogCaptureFixture) -> None:
    publisher = AdapterPublisher(make_set(), name="tenant")
    seen: list[int] = []

    def broken(snapshot: AdapterSnapshot, path: Path | None) -> None:
        raise ZeroDivisionError(f"of {snapshot.version}")

    publisher.add_hook(broken)
    publisher.add_hook(lambda snapshot, path: seen.append(snapshot.version))
    publisher.add_hook(broken)
    first = publisher.publish()
    assert publisher.latest is first
    assert seen == [1]
    both = "version 1: ZeroDivisionError: of 1; version 1: ZeroDivisionError: of 1"
    assert publisher.last_hook_error == both
    assert publisher.counters()["hook_errors"] == 2
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert caplog.records[0].name == "cylora"
    assert caplog.records[0].getMessage().startswith("version 1 of tenant stands, but hook <function ")
    assert caplog.records[0].exc_info[0] is ZeroDivisionError
    publisher.remove_hook(broken)  # wherever it is
    publisher.publish()
    assert publisher.last_hook_error is None
    assert publisher.counters()["hook_errors"] == 2


def test_an_interrupt_in_a_hook_reaches_the_caller_and_the_publisher_goes_on() -> None:
    publisher = AdapterPublisher(make_set())

    def interrupted(snapshot: AdapterSnapshot, path: Path | None) -> None:
        raise KeyboardInterrupt

    publisher.add_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        publisher.publish()
    assert publisher.latest.version == 1
    publisher.remove_hook(interrupted)
    assert publisher.publish().version == 2


def test_a_hook_must_not_publish_or_change_its_publisher() -> None:
    publisher, other = AdapterPublisher(make_set()), AdapterPublisher(make_set())
    errors: list[str] = []

    def hook(snapshot: AdapterSnapshot, path: Path | None) -> None:
        for call in (
            publisher.publish,
            lambda: publisher.rollback(1),
            lambda: publisher.publish_to("nowhere"),
            lambda: publisher.add_hook(hook),
            lambda: publisher.remove_hook(hook),
        ):
            try:
                call()
            except StateError as error:
                errors.append(str(error))
        other.publish()

    publisher.add_hook(hook)
    publisher.publish()
    at_work = "this publisher is at work further up this call stack"
    rule = f"{at_work}: a hook, metrics or a signal handler must not publish or change it"
    assert errors == [rule] * 5
    assert publisher.versions == (1,)
    assert other.versions == (1,)
    assert publisher.last_hook_error is None


def test_a_wrong_hook_is_refused() -> None:
    publisher = AdapterPublisher(make_set())
    with pytest.raises(InputError, match="hook must be callable, got str"):
        publisher.add_hook("http://host")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="hook must be one that was added, got <built-in function print>"):
        publisher.remove_hook(print)


def test_metrics_hear_of_versions_and_refusals() -> None:
    class Heard(list[Any]):
        def published(self, tenant: str, version: int) -> None:
            self.append((tenant, version))

        def refused(self, tenant: str) -> None:
            self.append(tenant)

    heard, adapters = Heard(), make_set()
    publisher = AdapterPublisher(adapters, name="one", metrics=heard)
    publisher.publish()
    publisher.rollback(1)
    adapters.flat.vector[0] = np.inf
    with pytest.raises(PublishError):
        publisher.publish()
    assert heard == [("one", 1), ("one", 2), "one"]


def test_metrics_that_raise_are_treated_like_a_hook_that_does(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def __repr__(self) -> str:
            return "Broken()"

        def published(self, tenant: str, version: int) -> None:
            if version < 3:
                raise ZeroDivisionError(f"of {version}")

        def refused(self, tenant: str) -> None:
            raise ZeroDivisionError("of a refusal")

    adapters = make_set()
    publisher = AdapterPublisher(adapters, name="one", metrics=Broken())
    heard: list[int] = []
    publisher.add_hook(lambda snapshot, path: heard.append(snapshot.version))
    first = publisher.publish()
    assert publisher.latest is first
    assert publisher.last_hook_error == "version 1: ZeroDivisionError: of 1"
    publisher.rollback(1)
    assert heard == [1, 2]
    assert publisher.last_hook_error == "version 2: ZeroDivisionError: of 2"
    adapters.flat.vector[0] = np.inf
    with pytest.raises(PublishError, match="version 2 stays"):
        publisher.publish()
    adapters.flat.vector[0] = 1
    assert publisher.publish().version == 3
    assert publisher.last_hook_error is None
    assert publisher.counters() == {"published": 3, "refused": 1, "rolled_back": 1, "hook_errors": 3, "buffers": 2}
    assert caplog.messages == [
        "version 1 of one stands, but metrics Broken() raised",
        "version 2 of one stands, but metrics Broken() raised",
        "one was refused, but metrics Broken() raised",
    ]
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError] * 3


def test_metrics_must_not_publish() -> None:
    class Publishing:
        def published(self, tenant: str, version: int) -> None:
            publisher.publish()

        refused = published

    publisher = AdapterPublisher(make_set(), metrics=Publishing())
    assert publisher.publish().version == 1
    assert publisher.versions == (1,)
    assert publisher.last_hook_error.startswith("version 1: StateError: this publisher is at work further up")


# ------------------------------------------------------------------ threads


class Waits:
    """An event that fails the test instead of hanging it."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.set = self.event.set

    def wait(self) -> None:
        assert self.event.wait(60)


def test_publish_waits_for_a_step_under_way_and_gets_the_whole_step() -> None:
    inside, go_on = Waits(), Waits()

    def schedule(step: int) -> float:
        if step == 2:
            inside.set()
            go_on.wait()
        return 1e-3

    trainer, adapters = make_trainer(schedule=schedule), make_set()
    gradients = [fill(Gradients(adapters), step) for step in range(3)]
    publisher = AdapterPublisher(adapters, trainer)
    for step in range(2):
        trainer.step(1.0, adapters, gradients[step])
    stepping = threading.Thread(target=trainer.step, args=(1.0, adapters, gradients[2]))
    stepping.start()
    inside.wait()
    with pytest.raises(TrainerBusyError, match="this trainer is busy"):
        publisher.publish(timeout=0.01)
    assert publisher.latest is None
    outcome: list[AdapterSnapshot] = []
    publishing = threading.Thread(target=lambda: outcome.append(publisher.publish(timeout=60)))
    publishing.start()
    until(lambda: trainer._open is None)  # it waits
    go_on.set()
    publishing.join(60)
    stepping.join(60)
    assert outcome[0].step == 3
    assert same_bits(outcome[0].vector, adapters.flat.vector)


def test_a_step_tried_during_the_copy_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, adapters = trained()
    publisher = AdapterPublisher(adapters, trainer)
    before = adapters.flat.vector.copy()
    records: list[Any] = []
    stepping = threading.Thread(
        target=lambda: records.append(trainer.step(1.0, adapters, fill(Gradients(adapters), 3)))
    )

    def copy(target: np.ndarray, source: np.ndarray) -> None:
        stepping.start()
        until(lambda: trainer._kept_waiting)
        target[...] = source

    with monkeypatch.context() as patched:
        patched.setattr("cylora.serving.publisher.np.copyto", copy)
        snapshot = publisher.publish()
    stepping.join(60)
    assert (snapshot.step, records[0].step) == (3, 3)
    assert same_bits(snapshot.vector, before)
    assert not same_bits(adapters.flat.vector, before)


def test_threads_that_publish_take_turns() -> None:
    trainer, adapters = trained()
    publisher = AdapterPublisher(adapters, trainer, keep=200)
    versions: list[int] = []
    hooked: list[int] = []
    publisher.add_hook(lambda snapshot, path: hooked.append(snapshot.version))

    def work() -> None:
        for _ in range(25):
            versions.append(publisher.publish().version)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(versions) == list(range(1, 201))
    assert hooked == list(range(1, 201))
    assert publisher.versions == tuple(range(1, 201))


@contextmanager
def published_without_end(publisher: AdapterPublisher) -> Iterator[Hook]:
    """Have another thread publish meanwhile, with a hook that does not return before the end."""
    inside, go_on = Waits(), Waits()

    def slow(snapshot: AdapterSnapshot, path: Path | None) -> None:
        inside.set()
        go_on.wait()

    publisher.add_hook(slow)
    publishing = threading.Thread(target=publisher.publish)
    publishing.start()
    try:
        inside.wait()
        yield slow
    finally:
        go_on.set()
        publishing.join(60)
        publisher.remove_hook(slow)


@pytest.mark.parametrize("timeout", [0, 0.01])
def test_publish_waits_no_longer_than_its_timeout_for_another_thread(tmp_path: Path, timeout: float) -> None:
    publisher = AdapterPublisher(make_set())

    def refused(call: Callable[..., object]) -> None:
        with pytest.raises(TrainerBusyError) as caught:
            call(timeout=timeout)
        assert str(caught.value) == "this publisher is busy: another thread was publishing, or in a hook, all the time"

    with published_without_end(publisher):
        before = publisher.counters()
        for call in (publisher.publish, lambda **options: publisher.publish_to(tmp_path, **options)):
            waiting = threading.Thread(target=refused, args=(call,))  # not here, where it might hang
            waiting.start()
            waiting.join(60)
            assert not waiting.is_alive()
        assert publisher.versions == (1,)
        assert publisher.counters() == before
        assert names(tmp_path) == []
    assert publisher.publish(timeout=timeout).version == 2


@pytest.mark.parametrize("timeout", [60, np.inf])
def test_publish_gets_its_turn_within_its_timeout(timeout: float) -> None:
    publisher = AdapterPublisher(make_set())
    made: list[AdapterSnapshot] = []
    with published_without_end(publisher):
        waiting = threading.Thread(target=lambda: made.append(publisher.publish(timeout=timeout)))
        waiting.start()
    waiting.join(60)
    assert [snapshot.version for snapshot in made] == [2]


@pytest.mark.parametrize("timeout", [0, 0.01])
def test_publish_waits_no_longer_than_its_timeout_for_a_hold_in_another_thread(tmp_path: Path, timeout: float) -> None:
    trainer, adapters = trained()
    publisher = AdapterPublisher(adapters, trainer)
    first = publisher.publish()
    outcomes: list[object] = []

    def tried(call: Callable[..., object]) -> None:
        try:
            outcomes.append(call(timeout=timeout))
        except TrainerBusyError as error:
            outcomes.append(str(error))

    with held_elsewhere(trainer, adapters):
        for call in (publisher.publish, lambda **options: publisher.publish_to(tmp_path, **options)):
            waiting = threading.Thread(target=tried, args=(call,))  # not here, where it might hang
            waiting.start()
            waiting.join(60)
            assert not waiting.is_alive()
    assert outcomes == ["this trainer is busy: another thread held it all the time"] * 2
    assert publisher.latest is first
    assert publisher.counters()["published"] == 1
    assert names(tmp_path) == []
    assert publisher.publish(timeout=timeout).version == 2


def test_waiting_for_the_turn_and_for_a_step_take_one_timeout_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("cylora.serving.publisher.time", SimpleNamespace(monotonic=lambda: now[0]))
    trainer, adapters = trained()
    publisher = AdapterPublisher(adapters, trainer)
    waits: list[tuple[str, float]] = []
    take, hold = publisher._turns.take, trainer.hold

    def late_turn(function: Callable[[], Any], timeout: float) -> Any:
        waits.append(("turn", timeout))
        now[0] += 7
        return take(function, timeout)

    def held(adapters: Any, function: Any, *, timeout: float) -> Any:
        waits.append(("step", timeout))
        return hold(adapters, function, timeout=timeout)

    monkeypatch.setattr(publisher._turns, "take", late_turn)
    monkeypatch.setattr(trainer, "hold", held)
    publisher.publish(timeout=10)
    publisher.publish(timeout=5)
    assert waits == [("turn", 10), ("step", 3), ("turn", 5), ("step", 0)]


def test_an_interrupt_at_any_moment_leaves_the_turn_free_though_its_traceback_is_kept() -> None:
    publisher = AdapterPublisher(make_set())
    publisher.publish()
    for call in (publisher.publish, lambda: publisher.rollback(publisher.latest.version)):
        kept, when = [], 0
        while (error := interrupted(call, when := when + 1)) is not None:
            kept.append(error)
            versions: list[int] = []
            other = threading.Thread(target=lambda versions=versions: versions.append(publisher.publish().version))
            other.start()
            other.join(60)
            assert versions == [publisher.latest.version], when
        assert len(kept) > 20


def test_a_reader_does_not_wait_for_a_publisher_that_is_busy() -> None:
    publisher = AdapterPublisher(make_set())
    first = publisher.publish()
    with published_without_end(publisher):
        assert publisher.latest.version == 2
        assert publisher.versions == (1, 2)
        assert publisher.get(1) is first
        assert publisher.counters()["published"] == 2


def test_a_publisher_is_not_pickled() -> None:
    with pytest.raises(TypeError, match="an AdapterPublisher is not copied or pickled: its readers are in"):
        pickle.dumps(AdapterPublisher(make_set()))


# ------------------------------------------------------------------ fork


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_serves_and_publishes_though_another_thread_held_the_turn() -> None:
    trainer, adapters = trained()
    publisher = AdapterPublisher(adapters, trainer)
    publisher.publish()

    def child() -> None:
        assert publisher.latest.version == 2
        publisher.remove_hook(slow)
        assert same_bits(publisher.latest.vector, adapters.flat.vector)
        trainer.step(1.0, adapters, fill(Gradients(adapters), 3))
        snapshot = publisher.publish()
        assert (snapshot.version, snapshot.step) == (3, 4)
        assert publisher.rollback(2).version == 4

    with published_without_end(publisher) as slow:
        assert in_child(child) == 0
    assert publisher.latest.version == 2  # the child's are its own
    assert publisher.publish().version == 3


def test_publisher_within_hold_of_its_trainer_is_refused() -> None:
    """Another thread that publishes has the publisher's turn and waits for the trainer: both would wait for ever."""
    adapters, trainer = make_set(), make_trainer()
    publisher = AdapterPublisher(adapters, trainer)
    publisher.publish()
    calls = (publisher.publish, lambda: publisher.rollback(1), lambda: publisher.add_hook(print))
    for call in calls:
        with pytest.raises(StateError, match="a publisher must not be called within hold of its trainer"):
            trainer.hold(adapters, lambda _, call=call: call())
    assert publisher.versions == (1,)
    assert publisher.publish().version == 2
