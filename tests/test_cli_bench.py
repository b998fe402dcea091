"""`cylora bench`: what it prints and writes, that it notices a wrong result, and the NumPy steps it measures with."""

import functools
import json
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cylora import _cli_bench, _cli_numpy
from cylora._cli_bench import CYLORA, IN_PLACE, NAIVE

SHAPE = (16, 8, 8)
LINE = r"^ *([\d,]+) +([\d,.]+) +([\d,.]+) +([\d.]+)x +([\d,.]+) +([\d.]+)x$"


@pytest.fixture
def run(run: Callable[..., SimpleNamespace]) -> Callable[..., SimpleNamespace]:
    """Return a function that runs `cylora bench` here and returns its exit code, stdout and stderr."""
    return functools.partial(run, "bench")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in this process, where a test may change what is measured."""

    class Pool:
        def __init__(self, *arguments: object) -> None:
            pass

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def submit(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(function(*arguments, **options))
            return future

    monkeypatch.setattr(_cli_bench, "ProcessPoolExecutor", Pool)


def test_bench_prints_ratios_and_writes_every_figure(run: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    """In its own process, as users run it."""
    file = tmp_path / "figures.json"
    done = run("--quick", "--threads", 2, "--json", file)
    assert (done.code, done.err) == (0, "")
    assert re.match(r"CPU .+, instruction set .+, Python 3.+, NumPy .+\n", done.out)
    assert re.search(r"^cylora \S+ with 2 threads, NumPy with 1; microseconds per step$", done.out, re.M)
    assert done.out.endswith("\neach result within its tolerance of a float64 reference\n")
    lines = re.findall(LINE, done.out, re.M)
    document = json.loads(file.read_text())
    assert [line[0] for line in lines] == ["192", "8,192"]
    assert [result["parameters"] for result in document["results"]] == [192, 8192]
    assert document["threads"] == 2
    assert {"CPU", "instruction set", "NumPy"} <= set(document["machine"])
    for line, result in zip(lines, document["results"], strict=True):
        base = result["microseconds"][CYLORA]
        assert float(line[1].replace(",", "")) == pytest.approx(base, abs=0.006)
        assert float(line[3]) == pytest.approx(result["microseconds"][IN_PLACE] / base, abs=0.06)
        assert float(line[5]) == pytest.approx(result["microseconds"][NAIVE] / base, abs=0.06)
        assert all(0 <= error <= 1 for error in result["error_in_tolerances"].values())


@pytest.mark.parametrize("before", [None, "7"])
def test_bench_leaves_the_environment_as_it_was(
    run: Callable[..., SimpleNamespace], here: None, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    if before is None:
        monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", before)
    assert run("--quick").code == 0
    assert os.environ.get("OPENBLAS_NUM_THREADS") == before


def test_bench_without_quick_measures_all_sizes(
    run: Callable[..., SimpleNamespace], here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measure(shape: tuple[int, int, int], threads: int, *, quick: bool) -> _cli_bench.Row:
        asked.append((shape, threads, quick))
        names = (CYLORA, IN_PLACE, NAIVE)
        return _cli_bench.Row(shape[2] * (shape[0] + shape[1]), dict.fromkeys(names, 1.5), dict.fromkeys(names, 0.5))

    monkeypatch.setattr(_cli_bench, "measure", measure)
    monkeypatch.setenv("CYLORA_NUM_THREADS", "3")
    done = run()
    assert done.code == 0
    assert asked == [(shape, 3, False) for shape in _cli_bench.CASES]
    assert [line[0] for line in re.findall(LINE, done.out, re.M)] == [
        "192", "8,192", "131,072", "1,048,576", "10,485,760",
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", [lambda x: x * 1.0001, lambda x: x * math.nan], ids=["off", "NaN"])
def test_bench_fails_when_a_result_is_wrong(
    run: Callable[..., SimpleNamespace],
    here: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    wrong: Callable[[Any], Any],
) -> None:
    """The figures are printed and written all the same."""
    right = _cli_bench._in_place

    def spoiled(start: Any) -> _cli_bench._Subject:
        subject = right(start)
        return _cli_bench._Subject(subject.step, subject.args, subject.load, lambda: wrong(subject.read()))

    monkeypatch.setattr(_cli_bench, "_in_place", spoiled)
    done = run("--quick", "--json", tmp_path / "figures.json")
    assert done.code == 1
    assert done.err == (
        "cylora: error: results must match the float64 reference; these do not: "
        "NumPy in place at 192 parameters, NumPy in place at 8,192 parameters\n"
    )
    assert done.out.count("WRONG: NumPy in place\n") == 2
    assert (tmp_path / "figures.json").exists()


@pytest.mark.parametrize("factor", [1.001, math.nan])
def test_bench_notices_a_wrong_norm(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    right = _cli_bench._naive

    def spoiled(start: Any) -> _cli_bench._Subject:
        subject = right(start)
        return _cli_bench._Subject(lambda g: subject.step(g) * factor, subject.args, subject.load, subject.read)

    monkeypatch.setattr(_cli_bench, "_naive", spoiled)
    assert _cli_bench.measure(SHAPE, 1, quick=True).wrong == [NAIVE]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threads", "x"), "--threads must be an integer, got 'x'"),
        (("--threads", 0), r"threads \(if not None\) must be an integer in \[1, 64\], got 0"),
        (("--sizes", 3), "unrecognized arguments: --sizes 3"),
    ],
)
def test_bench_refuses_wrong_options(
    run: Callable[..., SimpleNamespace], arguments: tuple[object, ...], message: str
) -> None:
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert re.match(f"cylora: error: {message}", done.err)


def test_bench_says_when_it_cannot_write(run: Callable[..., SimpleNamespace], here: None, tmp_path: Path) -> None:
    done = run("--quick", "--json", tmp_path / "missing" / "figures.json")
    assert done.code == 1
    assert "No such file or directory" in done.err


@pytest.mark.parametrize("make", [_cli_numpy.make_naive, _cli_numpy.make_in_place])
@pytest.mark.parametrize("clips", [True, False])
def test_numpy_steps_match_the_oracle(make: Callable[..., _cli_numpy.NumpyAdam], clips: bool) -> None:
    """Two tensors, clipped over both or not at all."""
    rng = np.random.default_rng(3)
    start = rng.standard_normal(300, dtype=np.float32)
    gradients = [rng.standard_normal(300, dtype=np.float32) * np.float32(scale) for scale in (1.0, 0.01, 3.0)]
    adam = make([start[:100], start[100:]], **({} if clips else {"max_grad_norm": None}))
    for g in gradients:
        norm = adam.step([g[:100], g[100:]])
        assert norm == (pytest.approx(_cli_numpy.true_norm(g), rel=1e-6) if clips else 0.0)
    truth = _cli_numpy.true_steps(start, gradients, clips=clips)
    assert np.concatenate(adam.parameters) == pytest.approx(truth, rel=1e-6, abs=1e-8)
    assert np.abs(truth - start).max() > 5e-4
