"""KeptState and PreparedAdam's exceptional ways: what they refuse before they touch memory."""

from typing import Any

import numpy as np
import pytest
from kernel_calls import prepare
from reference import Rule

from cylora.kernels.kept import KeptState

EIGHT = np.zeros(8, np.uint8)


@pytest.mark.parametrize(
    ("live", "copies", "steps", "every", "message"),
    [
        ([], [], 1, 1, "live and copies must be the same 1 to 6 arrays"),
        ([EIGHT] * 7, [EIGHT] * 7, 1, 1, "live and copies must be the same 1 to 6 arrays"),
        ([EIGHT], [], 1, 1, "live and copies must be the same 1 to 6 arrays"),
        ([EIGHT], [EIGHT], 2, 1, r"steps \(1,\), every >= 1"),
        ([EIGHT], [EIGHT], 1, 0, r"steps \(1,\), every >= 1"),
        ([EIGHT], [EIGHT[:7]], 1, 1, "a copy must have the length of its array"),
        ([EIGHT[:0]], [EIGHT[:0]], 1, 1, "a copy must have the length of its array"),
    ],
)
def test_arrays_that_do_not_go_together_are_refused(
    live: Any, copies: Any, steps: int, every: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        KeptState(live, copies, np.zeros(steps, np.int64), every)


def test_a_kept_state_is_initialised_once() -> None:
    kept = KeptState([EIGHT], [EIGHT.copy()], np.zeros(1, np.int64), 1)
    with pytest.raises(TypeError, match="KeptState is initialised once"):
        kept.__init__([EIGHT], [EIGHT], np.zeros(1, np.int64), 1)  # type: ignore[misc]


def test_an_override_wants_a_weight_decay_for_each_part() -> None:
    vectors = [np.zeros(8, np.float32) for _ in range(3)]
    adam = prepare(*vectors, Rule())
    adam.attach_pending(np.zeros(2), np.zeros(1, np.int64))
    history = (np.zeros((4, 3)), np.zeros(4, np.uint8), np.zeros(3), np.zeros(1, np.int64))

    class History:
        limit = 4
        buffers = staticmethod(lambda: history)
        make_room = staticmethod(lambda known: False)

    class Record(tuple):
        __slots__ = ()

    adam.attach(lambda step: 1e-3, None, Record, History)
    good = (-1.0, 0.9, 0.999, 1e-8, [0.1], 1.0, 9.0, 1e6)
    for overrides in ((*good[:4], [0.1, 0.1], *good[5:]), (*good[:4], [None], *good[5:]), good[:7]):
        with pytest.raises((ValueError, TypeError)):
            adam.run_overridden(1.0, np.ones(8, np.float32), None, False, overrides)
        assert not adam.busy
    assert not vectors[0].any()
    adam.run_overridden(1.0, np.ones(8, np.float32), None, False, good)
    assert vectors[0].any()
