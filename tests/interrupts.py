"""Interrupts at chosen moments."""

import gc
import sys
from collections.abc import Callable
from types import FrameType

__all__ = ["interrupted"]


def interrupted(call: Callable[[], object], when: int) -> BaseException | None:
    """Interrupt ``call`` at one of the moments at which CPython looks for signals; None if it has fewer.

    They are where a function of Python begins and where one of C has returned (and where a loop goes round, which is
    not tried). The collector waits meanwhile: whoever is called when it begins, such as Hypothesis, is not under test.
    """
    left = when

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        if event in ("call", "c_return"):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(profile)
    try:
        call()
    except KeyboardInterrupt as error:
        return error
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    return None
