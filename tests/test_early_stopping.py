"""EarlyStopping: what counts as better, when patience ends, and going on from a saved state."""

import math
from typing import Any

import pytest

from cylora import ConfigError, EarlyStopping, StateError


def ends(values: list[float], **options: Any) -> int | None:
    """Return after how many values it is over."""
    stopping = EarlyStopping(**options)
    return next((count for count, value in enumerate(values, 1) if stopping.update(value)), None)


def test_it_is_over_after_patience_values_without_a_better_one() -> None:
    assert ends([3, 2, 2, 2, 1], patience=2) == 4
    assert ends([3, 2, 2, 1, 1, 1], patience=2) == 6
    assert ends([3, 2, 1, 0], patience=1) is None
    assert ends([1, 1], patience=1) == 2


def test_better_means_by_more_than_min_delta() -> None:
    assert ends([1.0, 0.5, 0.25], patience=1, min_delta=0.5) == 2
    assert ends([1.0, 0.25, 0.0], patience=1, min_delta=0.5) == 3
    # Measured from the best, not from the value before: small gains add up.
    assert ends([1.0, 0.75, 0.25, 0.0, -0.5], patience=2, min_delta=0.5) is None


def test_max_looks_for_larger_values() -> None:
    assert ends([0.1, 0.2, 0.3, 0.3, 0.2], patience=2, mode="max") == 5
    assert ends([0.1, 0.2, 0.3], patience=2, mode="min") == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_better(value: float) -> None:
    for mode in ("min", "max"):
        stopping = EarlyStopping(patience=3, mode=mode)
        assert not stopping.update(value)
        assert (stopping.best, stopping.best_step, stopping.count) == (None, None, 1)
        assert [stopping.update(x) for x in (1.0, value, value, value)] == [False, False, False, True]
        assert (stopping.best, stopping.best_step) == (1.0, 1)


def test_the_best_step_is_the_one_given_or_counted() -> None:
    counted, given = EarlyStopping(5), EarlyStopping(5)
    for step, value in ((100, 3.0), (200, 1.0), (300, 2.0)):
        counted.update(value)
        given.update(value, step)
    assert (counted.best_step, given.best_step) == (1, 200)


def test_a_better_value_after_the_end_goes_on() -> None:
    stopping = EarlyStopping(1)
    assert [stopping.update(x) for x in (1.0, 1.0, 0.5)] == [False, True, False]
    assert not stopping.is_over


def test_a_saved_state_goes_on_and_a_copy_goes_its_own_way() -> None:
    values = [3.0, 2.0, math.nan, 2.5, 1.0, 1.0, 1.0, 1.0]
    for cut in range(len(values)):
        whole, again = EarlyStopping(3), EarlyStopping(3)
        for value in values[:cut]:
            whole.update(value)
        again.load_state_dict(whole.state_dict())
        before, copied = whole.state_dict(), whole.copy()
        assert [again.update(x) for x in values[cut:]] == [copied.update(x) for x in values[cut:]]
        assert whole.state_dict() == before
        assert again.state_dict() == copied.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience must be an integer >= 1, got 0"),
        ({"patience": 1.5}, "patience must be an integer, got 1.5"),
        ({"patience": 1, "min_delta": -1}, "min_delta must be finite and >= 0, got -1"),
        ({"patience": 1, "min_delta": math.nan}, "min_delta must be finite and >= 0, got nan"),
        ({"patience": 1, "mode": "less"}, "mode must be one of 'min', 'max', got 'less'"),
    ],
)
def test_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EarlyStopping(**options)


def test_a_value_that_is_no_number_is_refused_and_changes_nothing() -> None:
    stopping = EarlyStopping(1)
    stopping.update(1.0)
    before = stopping.state_dict()
    with pytest.raises(ConfigError, match="value must be a real number, got 'x'"):
        stopping.update("x")  # type: ignore[arg-type]
    assert stopping.state_dict() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"best": None}, "best and best_step must both be there or None, got None and 1"),
        ({"best_step": None}, "best and best_step must both be there or None, got 2.0 and None"),
        ({"best": math.inf}, "early stopping best must be finite, got inf"),
        ({"best_step": -1}, "early stopping best_step must be an integer >= 0, got -1"),
        ({"waited": 4}, r"early stopping waited must be an integer in \[0, 3\], got 4"),
        ({"count": -1}, "early stopping count must be an integer >= 0, got -1"),
        ({"more": 1}, "early stopping must be a mapping with the keys best, best_step, waited, count, got"),
    ],
)
def test_a_state_that_does_not_hold_together_is_refused(change: dict[str, Any], message: str) -> None:
    stopping = EarlyStopping(2)
    for value in (3.0, 2.0, 2.0):
        stopping.update(value)
    before = stopping.state_dict()
    with pytest.raises(StateError, match=message):
        stopping.load_state_dict(before | change)
    assert stopping.state_dict() == before
