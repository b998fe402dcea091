"""Steps over several parts of a vector, each with its own rate and decay, and running averages of the parameters."""

import math
from collections.abc import Sequence
from typing import Any

import kernel_calls
import numpy as np
import pytest
import reference
from numpy.typing import NDArray
from reference import Rule

from cylora.history import TrainingHistory, TrainingStep
from cylora.kernels import PreparedAdam
from cylora.moments import Moments

CHUNK, BLOCK = 256, 8192
FORMS = ("float32", "bfloat16", "8bit")
# (start, size, factor on the rate, weight decay): with gaps, a single element, more than a block, less than a chunk.
PARTS = [
    (0, 1, 1.0, 0.0), (1, 700, 16.0, 0.5), (900, BLOCK + 300, 1.0, 0.5), (9400, 33, 0.0, 0.0), (9433, 567, 16.0, 0.0),
]  # fmt: skip
SIZE = 10_000


def prepared(p: NDArray[np.float32], parts: Sequence[Any] | None, moments: Moments, **more: Any) -> PreparedAdam:
    settings = {"max_grad_norm": math.inf, "norm_limit": 2.0**63, "l2": False, "weight_decay": 0.5} | more
    return PreparedAdam(p, moments.buffers(), beta1=0.9, beta2=0.99, eps=1e-8, parts=parts, **settings)


def problem(seed: int = 0) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
    rng = np.random.default_rng(seed)
    first, *others = rng.standard_normal((6, SIZE)).astype(np.float32)
    return first, others


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("l2", [False, True])
def test_a_part_becomes_what_it_would_alone(form: str, l2: bool) -> None:
    """Without clipping each part's bits are those of an optimizer of its own; what lies between stays as it is.

    Compact moments take their noise from the sequence of all parts' chunks: there only the first part's are the same.
    """
    start, gradients = problem()
    p = start.copy()
    whole = prepared(p, PARTS, Moments([size for _, size, _, _ in PARTS], form), l2=l2)
    for g in gradients:
        whole.apply(g, 1e-2)
    untouched = np.ones(SIZE, bool)
    for index, (begin, size, factor, decay) in enumerate(PARTS):
        untouched[begin : begin + size] = False
        if form != "float32" and index > 0:
            continue
        alone = start[begin : begin + size].copy()
        adam = prepared(alone, None, Moments(size, form), l2=l2, weight_decay=decay)
        for g in gradients:
            adam.apply(g[begin : begin + size].copy(), 1e-2 * factor)
        assert np.array_equal(p[begin : begin + size], alone), index
    assert untouched.sum() == SIZE - sum(size for _, size, _, _ in PARTS) > 0
    assert np.array_equal(p[untouched], start[untouched])
    assert np.array_equal(p[9400:9433], start[9400:9433])  # rate 0


def test_the_norm_is_that_of_the_parts_together_and_clips_them_all() -> None:
    start, gradients = problem(1)
    p = start.copy()
    sizes = [size for _, size, _, _ in PARTS]
    moments = Moments(sizes)
    adam = prepared(p, PARTS, moments, max_grad_norm=1.0)
    trained = np.concatenate([np.arange(begin, begin + size) for begin, size, _, _ in PARTS])
    exact = start.astype(np.float64)
    m, v = np.zeros(len(trained)), np.zeros(len(trained))
    for t, g in enumerate(gradients, start=1):
        got = adam.apply(g, 1e-2)
        before = reference.norm(g[trained])
        assert abs(got - before) <= 2e-15 * before
        clip = reference.clip_scale(before, 1.0)
        place = 0
        for begin, size, factor, decay in PARTS:
            rule = Rule(1e-2 * factor, 0.9, 0.99, 1e-8, decay)
            here, there = slice(begin, begin + size), slice(place, place + size)
            m[there], v[there] = reference.moments(m[there], v[there], g[here].astype(np.float64) * clip, rule)
            moved = reference.update(m[there], v[there], t, rule)
            exact[here] = exact[here] * (1.0 - reference.decay(rule)) - moved
            place += size
    assert np.max(np.abs(p - exact)) < 5e-7
    assert np.max(np.abs(moments.m - m)) < 1e-8
    assert adam.t == 5


def test_a_gradient_outside_the_parts_does_not_count() -> None:
    start, gradients = problem(2)
    clean, dirty = start.copy(), start.copy()
    dirty_gradient = gradients[0].copy()
    dirty_gradient[701:900] = np.nan
    sizes = [size for _, size, _, _ in PARTS]
    norms = [
        prepared(p, PARTS, Moments(sizes)).apply(g, 1e-2) for p, g in ((clean, gradients[0]), (dirty, dirty_gradient))
    ]
    assert norms[0] == norms[1]
    assert np.array_equal(clean, dirty)


def test_the_first_element_that_is_not_finite_is_named_by_its_place_in_the_vector() -> None:
    start, gradients = problem(3)
    p, g = start.copy(), gradients[0].copy()
    g[750], g[901], g[9500] = np.nan, np.inf, np.nan  # 750 is not trained
    adam = prepared(p, PARTS, Moments([size for _, size, _, _ in PARTS]), skips=True)
    adam.apply(g, 1e-2)
    assert adam.nonfinite_index == 901
    assert adam.nonfinite_value == math.inf
    assert np.array_equal(p, start)
    adam.apply(gradients[0], 1e-2)
    assert adam.nonfinite_index == -1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_the_bits_of_parts(form: str, threads: int) -> None:
    rng = np.random.default_rng(4)
    sizes = [1, 40 * BLOCK + 5, 64, 30 * BLOCK, 700] * 2
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    parts = [(start, size, 1.0 + i % 3, 0.1 * i) for i, (start, size) in enumerate(zip(starts, sizes, strict=True))]
    n = sum(sizes)
    start, g = rng.standard_normal(n).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    results = []
    for count in (1, threads):
        p, average = start.copy(), start.copy()
        moments = Moments(sizes, form)
        adam = prepared(p, parts, moments, threads=count, average=average, average_weight=0.25, max_grad_norm=1.0)
        norms = [adam.apply(g, 1e-2) for _ in range(3)]
        results.append((norms, p.tobytes(), average.tobytes(), *(a.tobytes() for a in moments.arrays().values())))
    assert results[0] == results[1]


def test_a_pair_of_gradients_is_cut_where_the_parts_meet() -> None:
    """At two rates the step on a pair is the step on the vector, whether or not the parts are the matrices."""
    rng = np.random.default_rng(5)
    shape_a, shape_b = (8, 37), (50, 8)
    n_a, n = 8 * 37, 8 * 37 + 400
    start, g = rng.standard_normal(n).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    for cut in (n_a, n_a - 9, n_a + 9):
        parts = [(0, cut, 1.0, 0.1), (cut, n - cut, 4.0, 0.0)]
        flat, pair = start.copy(), start.copy()
        sizes = [cut, n - cut]
        prepared(flat, parts, Moments(sizes)).apply(g, 1e-2)
        adam = prepared(pair, parts, Moments(sizes), shape_a=shape_a, shape_b=shape_b)
        adam.attach(lambda step: 1e-2, None, TrainingStep, TrainingHistory())
        adam.run_step(0.0, g[:n_a].reshape(shape_a).copy(), g[n_a:].reshape(shape_b).copy())
        assert np.array_equal(flat, pair), cut
        assert not np.array_equal(flat, start)


@pytest.mark.parametrize("parts", [None, PARTS])
def test_the_average_follows_the_parameters(parts: Any) -> None:
    start, gradients = problem(6)
    p, average = start.copy(), start.copy()
    sizes = [SIZE] if parts is None else [size for _, size, _, _ in parts]
    plain = start.copy()
    adam = prepared(p, parts, Moments(sizes), average=average, average_weight=0.25)
    without = prepared(plain, parts, Moments(sizes))
    exact = start.astype(np.float64)
    for g in gradients:
        adam.apply(g, 1e-2)
        without.apply(g, 1e-2)
        exact += 0.25 * (p.astype(np.float64) - exact)
    assert np.array_equal(p, plain)  # the average changes nothing else
    assert np.max(np.abs(average - exact)) <= 5 * reference.UNIT_ROUNDOFF * 2 * np.max(np.abs(exact))
    assert not np.array_equal(average, p)
    kept = average.copy()
    bad = gradients[0].copy()
    bad[5] = np.nan
    prepared(p, parts, Moments(sizes), average=average, average_weight=0.25, skips=True).apply(bad, 1e-2)
    assert np.array_equal(average, kept)


def test_parts_keep_their_own_exponents() -> None:
    """Two parts in what would be one chunk: a large gradient in the first does not coarsen the second."""
    p, g = np.zeros(200, np.float32), np.full(200, 1e-6, np.float32)
    g[:100] = 1e3
    moments = Moments([100, 100], "8bit")
    prepared(p, [(0, 100, 1.0, 0.0), (100, 100, 1.0, 0.0)], moments).apply(g, 1e-3)
    assert moments.m_exponents.shape == (2,)
    assert np.allclose(moments.m[100:], 1e-7, rtol=0.1)
    assert moments.m.shape == moments.v.shape == (200,)
    moments.check()


@pytest.mark.parametrize(
    "parts",
    [
        [(0, 5, 1.0, 0.0), (4, 5, 1.0, 0.0)], [(5, 5, 1.0, 0.0), (0, 5, 1.0, 0.0)], [(0, 0, 1.0, 0.0)],
        [(0, SIZE + 1, 1.0, 0.0)], [(-1, 5, 1.0, 0.0)], [(SIZE, 1, 1.0, 0.0)],
    ],
)  # fmt: skip
def test_parts_must_lie_one_after_the_other_in_the_parameters(parts: Any) -> None:
    p, _ = problem()
    before = p.copy()
    with pytest.raises(ValueError, match=r"parts must lie one after the other in the 10000 parameters"):
        prepared(p, parts, Moments([size for _, size, _, _ in parts if size > 0] or 1))
    assert np.array_equal(p, before)


def test_what_does_not_go_with_the_parts_is_refused() -> None:
    p, _ = problem()
    with pytest.raises(ValueError, match="parts must not be empty"):
        prepared(p, [], Moments(SIZE))
    with pytest.raises(ValueError, match="m and v must have the length of all parts"):
        prepared(p, [(0, 5, 1.0, 0.0)], Moments(SIZE))
    with pytest.raises(ValueError, match="an exponent for each chunk"):
        prepared(p, [(0, 5, 1.0, 0.0), (5, SIZE - 5, 1.0, 0.0)], Moments(SIZE, "8bit"))
    with pytest.raises(ValueError, match="average must have the length of parameters"):
        prepared(p, None, Moments(SIZE), average=np.zeros(SIZE - 1, np.float32))
    average = np.zeros(SIZE, np.float32)
    adam = prepared(p, None, Moments(SIZE), average=average)
    with pytest.raises(ValueError, match="must not overlap the parameters"):
        adam.apply(average, 1e-3)
    with pytest.raises(TypeError, match="initialised once"):
        adam.__init__(p, Moments(SIZE).buffers(), beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, l2=False,
                      max_grad_norm=1.0, norm_limit=1.0)  # fmt: skip


def test_a_rule_of_one_part_is_a_plain_step() -> None:
    start, gradients = problem(7)
    plain, one = start.copy(), start.copy()
    prepared(plain, None, Moments(SIZE)).apply(gradients[0], 1e-2)
    prepared(one, [(0, SIZE, 1.0, 0.5)], Moments(SIZE)).apply(gradients[0], 1e-2)
    assert np.array_equal(plain, one)
    m, v = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32)
    again = start.copy()
    rule = Rule(1e-2, 0.9, 0.99, 1e-8, 0.5)
    kernel_calls.step(kernel_calls.prepare(again, m, v, rule), 1e-2, gradients[0])
    assert np.array_equal(plain, again)
