"""Interrupts at chosen moments."""

import sys
from collections.abc import Callable
from types import FrameType

__all__ = ["interrupted"]


def interrupted(call: Callable[[], object], when: int) -> BaseException | None:
    """Interrupt ``call`` at one of the moments at which CPython looks for signals; None if it has fewer.

    They are where a function of Python begins and where one of C has returned (and where a loop goes round, which is
    not tried).
    """
    left = when

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        if event in ("call", "c_return"):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    except KeyboardInterrupt as error:
        return error
    finally:
        sys.setprofile(before)
    return None
