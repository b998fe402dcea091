"""Learning-rate schedules: their formulas, their edges, and that a config asks for the right one."""

import math

import pytest
from training import make_adapter, make_pair, make_trainer

from cylora import LoraTrainer, LoraTrainingConfig, schedule

PEAK, FLOOR = 1e-3, 1e-5


def test_warm_up_is_linear_from_zero_for_every_schedule() -> None:
    made = [
        schedule.constant(PEAK, 10), schedule.linear(PEAK, 10, 100, FLOOR), schedule.cosine(PEAK, 10, 100, FLOOR),
        schedule.warmup_stable_decay(PEAK, 10, 100, 20, FLOOR),
    ]  # fmt: skip
    for rate in made:
        assert [rate(step) for step in range(10)] == [PEAK * step / 10 for step in range(10)]
        assert rate(10) == PEAK


@pytest.mark.parametrize("step", [0, 1, 10, 10**9])
def test_constant_never_ends(step: int) -> None:
    assert schedule.constant(PEAK)(step) == PEAK


def test_linear_is_a_straight_line_to_the_floor() -> None:
    rate = schedule.linear(PEAK, 10, 110, FLOOR)
    for step in range(10, 110):
        assert rate(step) == pytest.approx(PEAK - (PEAK - FLOOR) * (step - 10) / 100, rel=1e-14)
    assert [rate(step) for step in (110, 111, 10**9)] == [FLOOR] * 3


def test_cosine_is_half_a_wave_to_the_floor() -> None:
    rate = schedule.cosine(PEAK, 0, 200, FLOOR)
    for step in range(200):
        swing = (1 + math.cos(math.pi * step / 200)) / 2
        assert rate(step) == pytest.approx(FLOOR + (PEAK - FLOOR) * swing, rel=1e-14)
    assert rate(100) == pytest.approx((PEAK + FLOOR) / 2, rel=1e-12)
    assert [rate(step) for step in (200, 10**9)] == [FLOOR] * 2


def test_warmup_stable_decay_has_three_parts() -> None:
    rate = schedule.warmup_stable_decay(PEAK, 10, 100, 20, FLOOR)
    assert {rate(step) for step in range(10, 81)} == {PEAK}
    for step in range(80, 100):
        assert rate(step) == pytest.approx(PEAK - (PEAK - FLOOR) * (step - 80) / 20, rel=1e-14)
    assert [rate(step) for step in (100, 101)] == [FLOOR] * 2


def test_warmup_stable_decay_starts_no_earlier_than_the_warm_up_ends() -> None:
    rate = schedule.warmup_stable_decay(PEAK, 50, 60, 1000, FLOOR)
    assert rate(49) == PEAK * 49 / 50
    assert rate(50) == PEAK
    assert rate(55) == pytest.approx((PEAK + FLOOR) / 2)
    assert rate(60) == FLOOR


@pytest.mark.parametrize("make", [schedule.linear, schedule.cosine])
@pytest.mark.parametrize(("warmup", "total"), [(0, 0), (10, 10), (10, 5)])
def test_no_room_for_a_decay_means_the_floor(make, warmup: int, total: int) -> None:
    rate = make(PEAK, warmup, total, FLOOR)
    assert rate(warmup) == FLOOR
    assert [rate(step) for step in range(warmup)] == [PEAK * step / warmup for step in range(warmup)]


@pytest.mark.parametrize("step", [0, 1, 99, 100, 5000, 9999, 10_000, 10**15, 2**62])
def test_every_rate_stays_between_zero_and_the_peak(step: int) -> None:
    for name in ("constant", "linear", "cosine", "warmup_stable_decay"):
        config = LoraTrainingConfig(schedule=name, max_steps=10_000, learning_rate=PEAK, min_learning_rate=FLOOR)
        assert 0 <= schedule.from_config(config)(step) <= PEAK


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", schedule.constant(PEAK, 3)),
        ("linear", schedule.linear(PEAK, 3, 50, FLOOR)),
        ("cosine", schedule.cosine(PEAK, 3, 50, FLOOR)),
        ("warmup_stable_decay", schedule.warmup_stable_decay(PEAK, 3, 50, 5, FLOOR)),
    ],
)
def test_from_config_makes_the_named_schedule(name: str, expected) -> None:
    config = LoraTrainingConfig(
        schedule=name, learning_rate=PEAK, min_learning_rate=FLOOR, warmup_steps=3, max_steps=50
    )
    made = schedule.from_config(config)
    assert [made(step) for step in range(60)] == [expected(step) for step in range(60)]


def test_decay_steps_default_to_a_tenth_and_at_least_one() -> None:
    common = {"schedule": "warmup_stable_decay", "learning_rate": PEAK, "warmup_steps": 0}
    short = schedule.from_config(LoraTrainingConfig(max_steps=5, **common))
    assert [short(step) for step in (3, 4, 5)] == [PEAK, PEAK, 0.0]
    given = schedule.from_config(LoraTrainingConfig(max_steps=100, decay_steps=50, **common))
    assert given(75) == pytest.approx(PEAK / 2)


def test_a_callable_is_asked_once_a_step_with_its_index() -> None:
    asked: list[int] = []

    def rate(step: int) -> float:
        asked.append(step)
        return step / 1000

    trainer, adapter = make_trainer(schedule=rate), make_adapter()
    records = [trainer.step(1.0, adapter, *make_pair(step)) for step in range(5)]
    assert asked == list(range(5))
    assert [record.learning_rate for record in records] == [step / 1000 for step in range(5)]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "warmup_stable_decay"])
def test_current_lr_is_the_rate_of_the_next_step(name: str) -> None:
    trainer = LoraTrainer(LoraTrainingConfig(schedule=name, warmup_steps=2, max_steps=8, decay_steps=3))
    adapter = make_adapter()
    for step in range(10):
        announced = trainer.current_lr()
        assert trainer.step(1.0, adapter, *make_pair(step)).learning_rate == announced


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "warmup_stable_decay"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 0), (3, 20), (20, 3), (7, 7)])
def test_steady_from_is_a_step_after_which_nothing_changes(name: str, warmup: int, total: int) -> None:
    """A trainer asks the schedule no more from there on, so one step too early would freeze a wrong rate."""
    config = LoraTrainingConfig(
        schedule=name, learning_rate=PEAK, min_learning_rate=FLOOR, warmup_steps=warmup, max_steps=total
    )
    rate, start = schedule.from_config(config), schedule.steady_from(config)
    assert {rate(step) for step in range(start, start + 100)} == {rate(10**12)}
    trainer, adapter = LoraTrainer(config), make_adapter()
    used = [trainer.step(1.0, adapter, *make_pair()).learning_rate for _ in range(40)]
    assert used == [rate(step) for step in range(40)]


def test_a_callable_is_never_taken_for_steady() -> None:
    assert schedule.steady_from(LoraTrainingConfig(schedule=lambda step: 0.1)) is None
