"""Shared by the benchmarks: one thread for NumPy's BLAS, and one way to check and time a case."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
from cases import CASES, SOME, Case
from roster import PEERS, Peer
from subjects import SUBJECTS
from timing import Stopwatch

TURN_SECONDS = 0.003
CASE_SECONDS = 0.15
MIN_ROUNDS = 3
LARGEST = 11_000_000  # more is for peers.py: the oracle alone would take seconds for each peer


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``bench_<subject>`` runs with every case and every peer of that subject that needs nothing but cylora."""
    if "peer" not in metafunc.fixturenames:
        return
    subject = metafunc.function.__name__.removeprefix("bench_")
    cases = (SOME,) if subject in ("many", "tenants") else [case for case in CASES if case.parameters <= LARGEST]
    peers = [peer for peer in PEERS if peer.subject == subject and not peer.is_foreign]
    metafunc.parametrize("case", cases, ids=lambda case: case.name)
    metafunc.parametrize("peer", peers, ids=lambda peer: peer.name)


@pytest.fixture
def measure(benchmark):
    """Check a peer, time it, check what the timed calls left behind; the error goes into ``extra_info``."""

    def run(case: Case, peer: Peer) -> None:
        subject, build = SUBJECTS[peer.subject], peer.load()
        matrices = f" in {len(case.matrix_shapes)} matrices" if case.is_model else ""
        benchmark.group = f"{peer.subject}, {case.parameters:>10,} parameters{matrices}"  # padded: sorts by size
        benchmark.name = peer.name
        benchmark.extra_info.update(peer=peer.name, case=case.name, parameters=case.parameters, correct=False)
        benchmark.extra_info["error"] = subject.check(case, build(case, 1)).result
        built = build(case, 1)
        call, args = subject.timed(case, built)
        stopwatch = Stopwatch(call, args)
        calls = stopwatch.calls_lasting(TURN_SECONDS)
        rounds = max(MIN_ROUNDS, round(CASE_SECONDS / (calls * stopwatch.seconds(calls))))
        benchmark.pedantic(call, args, iterations=calls, rounds=rounds)
        timed_calls = 1 if benchmark.disabled else calls * rounds
        subject.check_after(case, built, stopwatch.calls + timed_calls)
        benchmark.extra_info["correct"] = True

    return run
