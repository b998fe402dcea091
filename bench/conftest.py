"""Shared by the benchmarks: one thread for NumPy's BLAS, and one way to check and time a case."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
from cases import CASES, Case
from peers import SUBJECTS
from timing import Stopwatch

TURN_SECONDS = 0.003
CASE_SECONDS = 0.15
MIN_ROUNDS = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``bench_<subject>`` runs with every case and every peer of that subject."""
    subject = metafunc.function.__name__.removeprefix("bench_")
    metafunc.parametrize("case", CASES, ids=lambda case: case.name)
    metafunc.parametrize("peer", SUBJECTS[subject].peers)


@pytest.fixture
def measure(benchmark):
    """Check a peer, time it, check what the timed calls left behind; the error goes into ``extra_info``."""

    def run(subject_name: str, case: Case, peer: str) -> None:
        subject = SUBJECTS[subject_name]
        matrices = f" in {len(case.matrix_shapes)} matrices" if case.is_model else ""
        benchmark.group = f"{subject_name}, {case.parameters:>10,} parameters{matrices}"  # padded: sorts by size
        benchmark.name = peer
        benchmark.extra_info.update(peer=peer, case=case.name, parameters=case.parameters, correct=False)
        benchmark.extra_info["error"] = subject.check(case, subject.peers[peer](case))
        built = subject.peers[peer](case)
        call, args = subject.timed(case, built)
        stopwatch = Stopwatch(call, args)
        calls = stopwatch.calls_lasting(TURN_SECONDS)
        rounds = max(MIN_ROUNDS, round(CASE_SECONDS / (calls * stopwatch.seconds(calls))))
        benchmark.pedantic(call, args, iterations=calls, rounds=rounds)
        timed_calls = 1 if benchmark.disabled else calls * rounds
        subject.check_after(case, built, stopwatch.calls + timed_calls)
        benchmark.extra_info["correct"] = True

    return run
