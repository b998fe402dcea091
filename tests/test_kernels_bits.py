"""The same bits on every instruction set, at every address, in every floating-point state, however a vector is cut.

Each instruction set runs in processes of its own (worker_bits.py); here their digests are compared.
"""

import json
import os
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import fp_state
import numpy as np
import pytest

from cylora.adapter import LoraAdapter
from cylora.config import LoraConfig, LoraTrainingConfig
from cylora.kernels._cpu import supports_x86_64_v3
from cylora.optimizer import variants
from cylora.trainer import LoraTrainer

WORKER = Path(__file__).with_name("worker_bits.py")
# Every variant that was built and that this processor can run: one at least, two on today's x86-64.
RUNNABLE = [name for name in variants if name != "x86-64-v3" or supports_x86_64_v3()]
STATES = ("clean", "flush", "down", "up", "zero")


@cache
def worker(isa: str, what: str) -> dict[str, Any]:
    environment = {**os.environ, "CYLORA_ISA": isa}
    done = subprocess.run(
        [sys.executable, str(WORKER), what], env=environment, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["isa"] == isa
    return result


def check_one_digest_each(result: dict[str, Any]) -> None:
    split = {name: list(digests.values()) for name, digests in result["digests"].items() if len(digests) > 1}
    assert not split, f"{result['isa']}: these differ between the combinations named: {split}"


def check_equal_everywhere(what: str) -> int:
    """Assert one digest for each input on each instruction set, the same on all; return the number of combinations."""
    results = [worker(isa, what) for isa in RUNNABLE]
    for result in results:
        check_one_digest_each(result)
    first = {name: next(iter(digests)) for name, digests in results[0]["digests"].items()}
    for result in results[1:]:
        got = {name: next(iter(digests)) for name, digests in result["digests"].items()}
        different = sorted(name for name in first if got[name] != first[name])
        assert not different, f"{results[0]['isa']} and {result['isa']} differ in {different}"
        assert got.keys() == first.keys()
    return sum(result["combinations"] for result in results)


def test_bits_are_compared_between_at_least_two_variants_where_the_processor_has_them() -> None:
    """A build that lost a variant must not turn the comparison into one of a thing with itself."""
    assert "baseline" in RUNNABLE
    if supports_x86_64_v3():
        assert RUNNABLE == ["baseline", "x86-64-v3"]


def test_bits_do_not_depend_on_variant_address_or_floating_point_state() -> None:
    """3,200 combinations on each variant: 40 sizes x 16 addresses x 5 states of the floating-point unit.

    Norm, clipping, the raw step in both decay modes, accumulation and its mean, Adam, and whole trainer steps under all
    built-in schedules, with their records. The worker also asserts that the state was set and comes back as it was.
    """
    assert check_equal_everywhere(",".join(STATES)) == 40 * 16 * 5 * len(RUNNABLE)


@pytest.mark.nightly
def test_bits_do_not_depend_on_variant_address_or_floating_point_state_long() -> None:
    """All sizes up to 600 too: more than 50,000 combinations on two variants."""
    assert check_equal_everywhere("long") >= 40_000 * len(RUNNABLE)


def check_forms_and_threads(per_size: int) -> int:
    """Assert one digest for each form of state, kind of gradient, decay mode and size; return the combinations done.

    On Linux the worker sees from page faults whether a helper touched the arrays of a step. Which of many short pieces
    the helpers get is the scheduler's affair, but over hundreds of steps they must have had a part.
    """
    what = f"threads {per_size}"
    combinations = check_equal_everywhere(what)
    for isa in RUNNABLE:
        result = worker(isa, what)
        assert result["helpers"] == 15
        assert result["helped"] >= 0.1 * result["shared"] > 30, result["helped"]
        names = [name.rpartition(", ")[0] for name in result["digests"]]
        assert len(set(names)) == 3 * 3 * 2
    return combinations


def test_bits_do_not_depend_on_threads_nor_on_how_gradients_come() -> None:
    """More than 2,000 combinations on each variant: 1 to 16 threads, 16 addresses, 5 floating-point states.

    With moments in float32, bfloat16 and 8 bits; gradients in float32, float16 and bfloat16 or widened beforehand, flat
    or in two pieces of equal or unequal types that meet inside a chunk, a block or at their ends; in both decay modes.
    Half of the chunks have no gradient, some no first moment: the loops for these must give the same bits, too.
    """
    assert check_forms_and_threads(54) >= 2_000 * len(RUNNABLE)


@pytest.mark.nightly
def test_bits_do_not_depend_on_threads_nor_on_how_gradients_come_long() -> None:
    assert check_forms_and_threads(612) >= 25_000 * len(RUNNABLE)


def test_bits_do_not_depend_on_how_a_vector_is_cut() -> None:
    """One flat vector, a pair of matrices, many arrays, a Gradients, a set of one: an element's place decides alone."""
    check_equal_everywhere("segments")


def test_bits_of_training_options_do_not_depend_on_threads_states_or_types() -> None:
    """Rates and decays by matrix, frozen ones, averages, guards, rollbacks, overrides: with every form of moments."""
    assert check_equal_everywhere("options") == 120 * len(RUNNABLE)


@pytest.mark.parametrize("state", STATES)
def test_floating_point_state_is_really_set(state: str) -> None:
    """NumPy, which leaves the state alone, must feel it: else the comparison above would be of clean with clean."""
    smallest, third = np.full(8, 1e-45, np.float32), np.full(8, 3.0, np.float32)
    one, tiny = np.ones(8, np.float32), np.full(8, 2.0**-126, np.float32)
    half = np.full(8, 0.5, np.float32)
    try:
        want = fp_state.enter(state)
        assert fp_state.control() == want
        doubled, quotient, negative, halved = smallest + smallest, one / third, -one / third, tiny * half
    finally:
        fp_state.enter("clean")
    flushed = state == "flush"
    assert (doubled[0] == 0.0) is np.bool_(flushed)
    assert (halved[0] == 0.0) is np.bool_(flushed)
    up, down = np.float32(0.33333334), np.float32(0.3333333)
    assert quotient[0] == (down if state in ("down", "zero") else up)
    assert negative[0] == (-down if state in ("up", "zero") else -up)


def test_bits_do_not_depend_on_other_threads() -> None:
    """Trainers in four threads at once, in different floating-point states, end like one that was alone."""
    config = LoraTrainingConfig(lora_config=LoraConfig(rank=8), warmup_steps=5, max_steps=40, schedule="cosine")

    def train(state: str) -> bytes:
        rng = np.random.default_rng(11)
        adapter = LoraAdapter(1500, 700, config.lora_config, seed=3)
        trainer = LoraTrainer(config)
        grads = [
            (
                (rng.standard_normal(adapter.a_matrix.shape) * 1e-3).astype(np.float32),
                (rng.standard_normal(adapter.b_matrix.shape) * 1e-39).astype(np.float32),
            )
            for _ in range(8)
        ]
        fp_state.enter(state)
        try:
            for t in range(60):
                trainer.step(0.1 * t, adapter, *grads[t % 8])
        finally:
            fp_state.enter("clean")
        columns = [trainer.training_history.column(name).tobytes() for name in ("learning_rate", "grad_norm")]
        adam = trainer.state_dict()["adam"]
        return b"".join([adapter.flat.vector.tobytes(), adam["m"].tobytes(), adam["v"].tobytes(), *columns])

    alone = train("clean")
    found: dict[str, bytes] = {}
    barrier = threading.Barrier(4)

    def work(state: str) -> None:
        barrier.wait()
        found[state] = train(state)

    threads = [threading.Thread(target=work, args=(state,)) for state in ("clean", "flush", "up", "zero")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["clean", "flush", "up", "zero"]
    assert {state for state, got in found.items() if got != alone} == set()
