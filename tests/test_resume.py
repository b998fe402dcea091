"""A run cut anywhere goes on to the same bits, on another number of threads and another instruction set too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import worker_resume
from worker_resume import ACTIONS, VARIETIES, WIDTHS, begin, end, resume, save_cuts

from cylora.kernels._cpu import supports_x86_64_v3
from cylora.optimizer import isa, variants

WORKER = Path(worker_resume.__file__)
OTHERS = [name for name in variants if name != isa and (name != "x86-64-v3" or supports_x86_64_v3())]


def resumed_elsewhere(folder: Path, instruction_set: str, threads: int) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), str(threads)],
        env={**os.environ, "CYLORA_ISA": instruction_set}, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["isa"] == instruction_set
    return result["results"]


def test_the_run_has_everything_in_it() -> None:
    trainer, adapters, rng = begin("l2, ring", "small")
    before = adapters.flat.vector.copy()
    end(trainer, adapters, rng, 0)
    history = trainer.training_history
    assert trainer.total_steps() == 34
    assert 0 < trainer.skipped_steps() < 10
    assert history[-1].learning_rate < 0.5 * trainer.config.learning_rate
    assert max(step.grad_norm for step in history) > trainer.config.max_grad_norm
    assert not np.array_equal(before, adapters.flat.vector)


@pytest.mark.parametrize("variety", VARIETIES)
def test_every_cut_of_a_run_goes_on_to_the_same_bits(tmp_path: Path, variety: str) -> None:
    expected = save_cuts(tmp_path, variety, "small", list(range(ACTIONS)))
    ends = {path.name: resume(path, 1 + place % 4) for place, path in enumerate(sorted(tmp_path.iterdir()))}
    assert len(ends) == ACTIONS
    assert set(ends.values()) == {expected}


@pytest.mark.parametrize("variety", VARIETIES)
def test_another_number_of_threads_goes_on_to_the_same_bits(tmp_path: Path, variety: str) -> None:
    expected = save_cuts(tmp_path, variety, "wide", [4, 33])
    for path in sorted(tmp_path.iterdir()):
        for threads in (1, 2, 4):
            assert resume(path, threads) == expected


def test_another_instruction_set_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    expected = {}
    for variety in VARIETIES:
        for width, cuts in (("small", list(range(3, ACTIONS, 6))), ("wide", [25])):
            fingerprint = save_cuts(tmp_path, variety, width, cuts)
            expected |= {f"{variety}, {width}, {cut}": fingerprint for cut in cuts}
    for other in [*OTHERS, isa]:
        assert resumed_elsewhere(tmp_path, other, threads=2) == expected


@pytest.mark.nightly
@pytest.mark.parametrize("variety", VARIETIES)
def test_ten_thousand_resumes_give_the_same_bits(tmp_path: Path, variety: str) -> None:
    """Of each variety and width every cut, with several numbers of threads, and again on each instruction set."""
    expected, resumes = {}, 0
    for width in WIDTHS:
        fingerprint = save_cuts(tmp_path, variety, width, list(range(ACTIONS)))
        expected |= {f"{variety}, {width}, {cut}": fingerprint for cut in range(ACTIONS)}
    for path in tmp_path.iterdir():
        for threads in (1, 2, 3, 4, 8) if "wide" in path.name else range(1, 33):
            assert resume(path, threads) == expected[path.name]
            resumes += 1
    for instruction_set in [*OTHERS, isa]:
        for threads in (1, 2, 4):
            assert resumed_elsewhere(tmp_path, instruction_set, threads) == expected
            resumes += len(expected)
    assert resumes * len(VARIETIES) >= 10_000
