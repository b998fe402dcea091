"""A small checkpoint, saved and loaded beside plain files: figures are ``bench/files.py``'s, here they are checked."""

from files import measured


def bench_files(benchmark, tmp_path):
    found = benchmark.pedantic(measured, (100_000, 1, tmp_path))
    benchmark.extra_info.update(found)
    assert found["correct"]
