"""RunningMedian: against the sorted window, whatever comes twice or from a saved state."""

import statistics

import numpy as np
import pytest

from cylora.running_median import RunningMedian


def sequence(size: int) -> list[float]:
    """Return numbers with ties and far-off ones."""
    rng = np.random.default_rng(size)
    return (rng.integers(0, 9, size) * 10.0 ** rng.integers(-3, 4, size)).tolist()


@pytest.mark.parametrize("window", [1, 2, 3, 10, 51])
def test_value_is_the_median_of_the_window(window: int) -> None:
    numbers, median = sequence(200), RunningMedian(window)
    for index, number in enumerate(numbers):
        median.put(index, number)
        kept = numbers[max(0, index + 1 - window) : index + 1]
        assert median.values(index + 1) == kept
        assert len(median) == len(kept)
        assert median.value() == (statistics.median(kept) if len(kept) == window else None)


def test_a_number_put_again_changes_nothing() -> None:
    numbers, median = sequence(60), RunningMedian(7)
    for index, number in enumerate(numbers):
        for _ in range(3):
            median.put(index, number)
        assert median.values(index + 1) == numbers[max(0, index - 6) : index + 1]
        if index >= 6:
            assert median.value() == statistics.median(numbers[index - 6 : index + 1])


def test_an_interrupted_put_can_be_done_again() -> None:
    """As a signal handler leaves it that raises while the order is being mended."""
    numbers, median = sequence(30), RunningMedian(5)
    for index, number in enumerate(numbers):
        if index % 3 == 0:
            median._ordered = None  # what is left of a put that did not come to its end
        median.put(index, number)
        if index >= 4:
            assert median.value() == statistics.median(numbers[index - 4 : index + 1])


@pytest.mark.parametrize("cut", [0, 1, 4, 5, 6, 23])
def test_a_median_goes_on_from_its_values(cut: int) -> None:
    numbers, whole = sequence(40), RunningMedian(5)
    for index, number in enumerate(numbers[:cut]):
        whole.put(index, number)
    again = RunningMedian(5, whole.values(cut))
    for index, number in enumerate(numbers[cut:]):
        whole.put(cut + index, number)
        again.put(min(cut, 5) + index, number)
        assert again.value() == whole.value()


def test_a_smaller_window_keeps_the_newest() -> None:
    assert RunningMedian(2, [9.0, 1.0, 3.0]).value() == 2.0


def test_the_middle_of_huge_numbers_is_finite() -> None:
    assert RunningMedian(2, [1.7e308, 1.7e308]).value() == 1.7e308
