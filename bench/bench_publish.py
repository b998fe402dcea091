"""Publishing one pair of matrices: figures are ``bench/publish.py``'s, here they are checked."""

from publish import SUBJECTS, measured, subject


def bench_publish(benchmark):
    found = benchmark.pedantic(measured, (subject(*SUBJECTS["one pair"]), 11))
    benchmark.extra_info.update(found)
    assert found["correct"]
