"""A process forked from one that trains: it goes on with whole trainers, and refuses a half-stepped one."""

import os
import sys
import threading
import time
import traceback

import numpy as np
import pytest
from training import make_trainer

from cylora import AdapterSet, Gradients, LoraConfig, LoraTrainer, LoraTrainingConfig, StateError

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

TOO_LATE = 3


def in_child(work):
    """Run ``work`` in a forked child; return what its exit code says."""
    # What measures coverage has a lock, which another thread may hold at the fork: nothing is traced in the child.
    tracing = sys.gettrace()
    sys.settrace(None)
    child = os.fork()
    if child != 0:
        sys.settrace(tracing)
    else:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hangs"


def trained(size):
    adapters = AdapterSet({"layer": (size, size)}, LoraConfig(rank=8), seed=0)
    gradients = Gradients(adapters)
    gradients.vector.fill(0.01)
    trainer = LoraTrainer(LoraTrainingConfig(warmup_steps=0, log_every=0))
    trainer.step(1.0, adapters, gradients)
    return trainer, adapters, gradients


def test_child_steps_to_the_same_bits():
    trainer, adapters, gradients = trained(32)
    twin, twins, _ = trained(32)
    twin.step(1.0, twins, gradients)

    def work():
        trainer.step(1.0, adapters, gradients)
        assert np.array_equal(adapters.flat.vector, twins.flat.vector)
        assert trainer.state_dict()["adam"]["t"] == 2

    assert in_child(work) == 0


def test_child_of_a_process_in_the_middle_of_a_step_is_told():
    """The child has the half-updated weights and no thread that would finish them: every call says so, none hangs."""
    trainer, adapters, gradients = trained(60_000)
    stop = threading.Event()

    def steps():
        while not stop.is_set():
            trainer.step(1.0, adapters, gradients)

    def work():
        if not trainer._adam.busy:
            os._exit(TOO_LATE)
        with pytest.raises(StateError, match="forked while another thread was in a step"):
            trainer.step(1.0, adapters, gradients)
        with pytest.raises(StateError, match="forked while another thread was in a step"):
            trainer.state_dict()

    thread = threading.Thread(target=steps)
    thread.start()
    try:
        outcome = TOO_LATE
        while outcome == TOO_LATE:  # the step was over before the fork: once more
            while not trainer._adam.busy:
                time.sleep(0)
            outcome = in_child(work)
    finally:
        stop.set()
        thread.join()
    assert outcome == 0


def test_child_is_not_locked_out_by_a_lock_of_its_parent():
    trainer, adapters, gradients = trained(32)
    held, release = threading.Event(), threading.Event()

    def hold():
        with trainer._binding:
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        outcome = in_child(lambda: (trainer.state_dict(), trainer.accumulate(1.0, adapters, gradients)))
    finally:
        release.set()
        thread.join()
    assert outcome == 0


def test_threads_of_a_child_share_the_lock_that_replaces_the_parents(monkeypatch):
    trainer = make_trainer()
    own, process = trainer._binding, os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    lock = trainer._binding
    trainer._lock_process = process  # as another thread may have read it a moment before
    assert trainer._binding is lock is not own
    trainer._renew_lock()  # or came too late to
    assert trainer._binding is lock


def test_lock_of_another_process_is_replaced(monkeypatch):
    """The same, seen from inside one process: a lock belongs to the process that made it."""
    trainer, _, _ = trained(32)
    first = trainer._binding
    assert trainer._binding is first
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert trainer._binding is not first
