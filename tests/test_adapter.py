"""LoraAdapter, AdapterSet, Gradients: their mathematics against float64, their memory, and what they refuse."""

import copy
import math
import pickle
from collections.abc import Mapping

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from training import D_IN, D_OUT, RANK, fill, make_adapter, make_pair, make_set, make_trainer, same_bits

from cylora import AdapterSet, ConfigError, GradientPair, Gradients, InputError, LoraAdapter, LoraConfig, LoraTrainer

# float32 products of a few dozen terms of size about 1
CLOSE = {"rtol": 2e-6, "atol": 2e-5}
COPIES = [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def doubles(adapter: LoraAdapter) -> tuple[np.ndarray, np.ndarray]:
    return adapter.a_matrix.astype(np.float64), adapter.b_matrix.astype(np.float64)


# ---------------------------------------------------------------- making one


def test_a_new_adapter_draws_a_uniformly_and_changes_nothing() -> None:
    adapter = LoraAdapter(400, 30, LoraConfig(rank=50), seed=3)
    assert adapter.a_matrix.shape == (50, 400)
    assert adapter.b_matrix.shape == (30, 50)
    assert not adapter.b_matrix.any()
    bound = 1 / math.sqrt(400)
    assert abs(adapter.a_matrix).max() <= np.float32(bound)
    assert adapter.a_matrix.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(adapter.a_matrix.mean()) < bound / 50
    assert not adapter.apply(normal(2, 400)).any()


def test_attributes_and_counts() -> None:
    config = LoraConfig(rank=4, alpha=2)
    adapter = LoraAdapter(np.int64(10), 3, config, seed=np.int64(0))
    assert (adapter.d_in, adapter.d_out, adapter.rank, adapter.alpha, adapter.scaling) == (10, 3, 4, 2.0, 0.5)
    assert type(adapter.d_in) is int
    assert adapter.config is config
    assert adapter.param_count() == 4 * (10 + 3) == adapter.flat.vector.size
    assert adapter.memory_bytes() == 4 * adapter.param_count()
    assert repr(adapter) == "LoraAdapter(10 -> 3, rank 4, alpha 2)"
    assert LoraAdapter(2, 2, seed=0).config == LoraConfig()


def test_seed_decides_the_weights() -> None:
    first, again, other = (LoraAdapter(8, 8, seed=seed) for seed in (1, 1, 2))
    drawn = LoraAdapter(8, 8, seed=np.random.default_rng(1))
    assert same_bits(first.a_matrix, again.a_matrix)
    assert same_bits(first.a_matrix, drawn.a_matrix)
    assert not same_bits(first.a_matrix, other.a_matrix)


def test_one_generator_makes_different_adapters() -> None:
    rng = np.random.default_rng(0)
    assert not same_bits(LoraAdapter(4, 4, seed=rng).a_matrix, LoraAdapter(4, 4, seed=rng).a_matrix)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_in": 0}, r"d_in must be an integer in \[1, 2147483648\], got 0"),
        ({"d_in": 2**31 + 1}, "d_in must be an integer in"),
        ({"d_out": -1}, "d_out must be an integer in"),
        ({"d_out": 2.0}, "d_out must be an integer, got 2.0"),
        ({"d_in": None}, "d_in must be an integer, got None"),
        ({"config": {"rank": 2}}, "config must be a LoraConfig, got dict"),
        ({"seed": -1}, r"seed \(if not a numpy.random.Generator\) must be an integer >= 0, got -1"),
        ({"seed": None}, "seed .* must be an integer, got None"),
        ({"seed": np.random.RandomState(0)}, "seed .* must be an integer, got RandomState"),
        ({"config": LoraConfig(rank=2**62)}, "layout must have at most"),
    ],
)
def test_adapter_refuses_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraAdapter(**{"d_in": 4, "d_out": 4, "seed": 0} | arguments)


def test_views_are_the_vector() -> None:
    adapter = make_adapter()
    adapter.flat.vector[...] = 0
    adapter.a_matrix[0, 1] = 5
    adapter.b_matrix[-1, -1] = 7
    assert (adapter.flat.vector[1], adapter.flat.vector[-1]) == (5, 7)


def test_assigning_a_matrix_writes_into_the_vector() -> None:
    """Rebinding the attribute to another array would leave the trainer training something else."""
    adapter, trainer = make_adapter(), make_trainer()
    adapter.a_matrix = np.ones((RANK, D_IN))
    adapter.b_matrix = [[2.0] * RANK] * D_OUT
    adapter.b_matrix += 1
    assert set(adapter.flat["A"].ravel()) == {1}
    assert set(adapter.flat.vector[RANK * D_IN :]) == {3}
    trainer.step(1.0, adapter, *make_pair())
    assert np.shares_memory(adapter.a_matrix, adapter.flat.vector)
    with pytest.raises(InputError, match=r"a_matrix must be real numbers of shape \(6,\) or \(batch, 6\), got float64"):
        adapter.a_matrix = np.ones((D_IN, RANK))
    with pytest.raises(InputError, match=r"b_matrix must have shape \(5, 3\), got \(3,\)"):
        adapter.b_matrix = np.ones(RANK)


# ---------------------------------------------------------------- mathematics


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("batch", [None, 0, 1, 9])
def test_apply_is_scaling_times_b_a_x(use_rslora: bool, batch: int | None) -> None:
    adapter = make_adapter(alpha=5, use_rslora=use_rslora)
    x = normal(D_IN) if batch is None else normal(batch, D_IN)
    a, b = doubles(adapter)
    scaling = 5 / (math.sqrt(RANK) if use_rslora else RANK)
    got = adapter.apply(x)
    assert got.dtype == np.float32
    assert got.shape == ((D_OUT,) if batch is None else (batch, D_OUT))
    np.testing.assert_allclose(got, scaling * (x.astype(np.float64) @ a.T @ b.T), **CLOSE)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i4", "u1"])
def test_apply_takes_any_real_dtype_and_layout(dtype: str) -> None:
    adapter = make_adapter()
    x = np.arange(2 * D_IN).reshape(D_IN, 2).astype(dtype).T[::-1]
    np.testing.assert_array_equal(adapter.apply(x), adapter.apply(np.array(x, np.float32)))
    np.testing.assert_array_equal(adapter.apply(x.tolist()), adapter.apply(np.array(x, np.float32)))


def loss_of(adapter: LoraAdapter, x: np.ndarray, g: np.ndarray, mask: np.ndarray | None) -> float:
    """Return <g, scaling * B A (x masked)> in float64, whose gradients `gradients` and `input_gradient` must give."""
    a, b = doubles(adapter)
    rows = np.atleast_2d(x).astype(np.float64)
    if mask is not None:
        rows = np.where(mask, rows / (1 - adapter.config.dropout), 0)
    return float((np.atleast_2d(g).astype(np.float64) * (adapter.scaling * rows @ a.T @ b.T)).sum())


def finite_differences(change: np.ndarray, loss) -> np.ndarray:
    """Central differences by one element at a time. The loss is linear in each, so the step need not be small."""
    out = np.empty(change.shape)
    for index in np.ndindex(change.shape):
        kept = change[index]
        change[index] = kept + np.float32(0.5)
        above = loss()
        change[index] = kept - np.float32(0.5)
        out[index] = above - loss()
        change[index] = kept
    return out


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("batch", [None, 1, 4])
def test_gradients_are_the_derivatives(dropout: float, batch: int | None) -> None:
    adapter = make_adapter(dropout=dropout, alpha=6)
    x = normal(D_IN) if batch is None else normal(batch, D_IN)
    g = normal(D_OUT) if batch is None else normal(batch, D_OUT)
    mask = adapter.dropout_mask(x.shape, np.random.default_rng(3)) if dropout else None
    grad_a, grad_b = adapter.gradients(x, g, mask=mask)
    assert (grad_a.dtype, grad_b.dtype) == (np.float32, np.float32)

    def loss() -> float:
        return loss_of(adapter, x, g, mask)

    np.testing.assert_allclose(grad_a, finite_differences(adapter.a_matrix, loss), rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(grad_b, finite_differences(adapter.b_matrix, loss), rtol=1e-4, atol=2e-4)
    grad_x = adapter.input_gradient(g, mask=mask)
    assert grad_x.shape == x.shape
    np.testing.assert_allclose(grad_x, finite_differences(x, loss), rtol=1e-4, atol=2e-4)


def test_gradients_are_the_formula_summed_over_the_batch() -> None:
    adapter = make_adapter(alpha=6)
    x, g = normal(11, D_IN), normal(11, D_OUT)
    a, b = doubles(adapter)
    pair = adapter.gradients(x, g)
    np.testing.assert_allclose(pair.grad_a, 2 * (b.T @ g.T.astype(np.float64)) @ x, **CLOSE)
    np.testing.assert_allclose(pair.grad_b, 2 * g.T.astype(np.float64) @ (x @ a.T), **CLOSE)
    rows = [adapter.gradients(x[i], g[i]) for i in range(11)]
    np.testing.assert_allclose(pair.grad_a, sum(row.grad_a for row in rows), **CLOSE)


def test_an_empty_batch_has_zero_gradients() -> None:
    adapter = make_adapter()
    pair = adapter.gradients(np.zeros((0, D_IN)), np.zeros((0, D_OUT)))
    assert not pair.grad_a.any()
    assert not pair.grad_b.any()


def test_gradients_write_into_out_and_change_nothing_else() -> None:
    adapters = make_set()
    gradients = Gradients(adapters)
    before = adapters.flat.vector.copy()
    for seed, (name, adapter) in enumerate(adapters.items()):
        x, g = normal(4, adapter.d_in, seed=seed), normal(4, adapter.d_out, seed=seed)
        got = adapter.gradients(x, g, out=gradients[name])
        assert np.shares_memory(got.grad_a, gradients.vector)
        expected = adapter.gradients(x, g)
        assert same_bits(gradients[name].grad_a, expected.grad_a)
        assert same_bits(gradients[name].grad_b, expected.grad_b)
    assert gradients.vector.all()
    assert same_bits(before, adapters.flat.vector)


def test_training_by_these_gradients_learns_a_low_rank_map() -> None:
    """Forward, backward and step together: a rank-2 map is learnt to a hundredth of its first loss."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=(4, 2)) @ rng.normal(size=(2, 6))
    adapter, trainer = LoraAdapter(6, 4, LoraConfig(rank=3, alpha=3), seed=0), make_trainer(weight_decay=0.0)
    for _ in range(600):
        x = rng.normal(size=(16, 6))
        error = adapter.apply(x) - x @ target.T
        trainer.step(float((error**2).mean()), adapter, *adapter.gradients(x, 2 * error / error.size))
    assert trainer.last_step().loss < trainer.training_history[0].loss / 100


# ---------------------------------------------------------------- dropout


def test_the_same_mask_gives_the_same_result_as_the_generator_that_drew_it() -> None:
    adapter = make_adapter(dropout=0.3)
    x, g = normal(50, D_IN), normal(50, D_OUT)
    mask = adapter.dropout_mask(x.shape, np.random.default_rng(5))
    assert same_bits(adapter.apply(x, mask=mask), adapter.apply(x, rng=np.random.default_rng(5)))
    by_mask, by_rng = adapter.gradients(x, g, mask=mask), adapter.gradients(x, g, rng=np.random.default_rng(5))
    assert same_bits(by_mask.grad_a, by_rng.grad_a)
    assert same_bits(by_mask.grad_b, by_rng.grad_b)
    other = adapter.apply(x, rng=np.random.default_rng(6))
    assert not same_bits(other, adapter.apply(x, mask=mask))


def test_dropout_zeroes_its_share_and_scales_the_rest() -> None:
    adapter = make_adapter(dropout=0.25)
    mask = adapter.dropout_mask((400, 500), np.random.default_rng(0))
    assert mask.dtype == np.bool_
    assert mask.mean() == pytest.approx(0.75, abs=0.005)
    x = normal(40, D_IN)
    kept = mask[:40, :D_IN]
    a, b = doubles(adapter)
    expected = adapter.scaling * np.where(kept, x / 0.75, 0) @ a.T @ b.T
    np.testing.assert_allclose(adapter.apply(x, mask=kept), expected, **CLOSE)


def test_without_mask_or_generator_apply_drops_nothing() -> None:
    x = normal(3, D_IN)
    assert same_bits(make_adapter(dropout=0.5).apply(x), make_adapter().apply(x))


def test_a_generator_is_not_advanced_where_nothing_is_dropped() -> None:
    rng = np.random.default_rng(1)
    make_adapter().apply(normal(3, D_IN), rng=rng)
    assert rng.random() == np.random.default_rng(1).random()


def test_a_vector_takes_a_vector_mask() -> None:
    adapter = make_adapter(dropout=0.5)
    mask = adapter.dropout_mask((D_IN,), np.random.default_rng(2))
    assert same_bits(adapter.apply(normal(D_IN), mask=mask), adapter.apply(normal(D_IN), rng=np.random.default_rng(2)))


# ---------------------------------------------------------------- merging


def test_merge_adds_what_apply_adds() -> None:
    adapter, weight, x = make_adapter(), normal(D_OUT, D_IN), normal(8, D_IN)
    a, b = doubles(adapter)
    np.testing.assert_allclose(adapter.delta_weight(), adapter.scaling * b @ a, **CLOSE)
    separate = x @ weight.T + adapter.apply(x)
    adapter.merge_into(weight)
    np.testing.assert_allclose(x @ weight.T, separate, **CLOSE)


def test_unmerge_takes_it_off_again() -> None:
    adapter, weight = make_adapter(), normal(D_OUT, D_IN)
    before = weight.copy()
    adapter.merge_into(weight)
    assert not np.allclose(weight, before)
    adapter.unmerge_from(weight)
    np.testing.assert_allclose(weight, before, rtol=0, atol=2e-6)


@pytest.mark.parametrize("call", ["merge_into", "unmerge_from"])
@pytest.mark.parametrize(
    "weight",
    [normal(D_IN, D_OUT), normal(D_OUT, D_IN).astype("f8"), as_strided(normal(8), (D_OUT, D_IN), (0, 4)), None],
)
def test_merging_refuses_what_it_cannot_write(call: str, weight: np.ndarray | None) -> None:
    before = None if weight is None else weight.tobytes()
    with pytest.raises(InputError, match="weight must"):
        getattr(make_adapter(), call)(weight)
    assert weight is None or weight.tobytes() == before


# ---------------------------------------------------------------- refusals

SHAPE_RULE = r"must be real numbers of shape \(6,\) or \(batch, 6\), got"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: a.apply(normal(5)), f"x {SHAPE_RULE} float32 of shape"),
        (lambda a: a.apply(normal(2, 3, 6)), f"x {SHAPE_RULE}"),
        (lambda a: a.apply(np.float32(3)), f"x {SHAPE_RULE}"),
        (lambda a: a.apply(np.zeros(6, bool)), f"x {SHAPE_RULE} bool"),
        (lambda a: a.apply(np.zeros(6, complex)), f"x {SHAPE_RULE} complex"),
        (lambda a: a.apply(["a"] * 6), f"x {SHAPE_RULE} <U1"),
        (lambda a: a.apply([[1, 2], [3]]), "x must be an array of real numbers, got list"),
        (lambda a: a.apply(None), f"x {SHAPE_RULE} object"),
        (lambda a: a.gradients(normal(3, 6), normal(3, 5)), "mask or rng must be given because dropout is 0.5, got n"),
        (
            lambda a: a.gradients(normal(3, 6), normal(2, 5), rng=np.random.default_rng()),
            "grad_output must have the batch size of x, 3, got 2",
        ),
        (lambda a: a.gradients(normal(3, 6), normal(3, 6), mask=1), "grad_output must be real numbers of shape"),
        (lambda a: a.input_gradient(normal(4)), r"grad_output must be real numbers of shape \(5,\)"),
        (lambda a: a.apply(normal(2, 6), mask=np.ones(6, bool)), r"mask must be bool of shape \(2, 6\), got bool of"),
        (lambda a: a.apply(normal(2, 6), mask=np.ones((2, 6))), r"mask must be bool of shape \(2, 6\), got float64"),
        (lambda a: a.input_gradient(normal(5), mask=np.ones(5, bool)), r"mask must be bool of shape \(1, 6\)"),
        (lambda a: a.apply(normal(6), rng=3), "rng must be a numpy.random.Generator, got int"),
        (lambda a: a.apply(normal(6), rng=np.random.RandomState(0)), "rng must be .* got RandomState"),
    ],
)  # fmt: skip
def test_calls_refuse_by_name(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(make_adapter(dropout=0.5))


def test_out_is_checked_before_anything_is_written() -> None:
    adapter, x, g = make_adapter(), normal(3, D_IN), normal(3, D_OUT)
    a, b = make_pair()
    square = LoraAdapter(3, 3, LoraConfig(rank=3), seed=0)
    rows = normal(3, 3)
    for call, message in [
        (lambda: adapter.gradients(x, g, out=(b, a)), r"out\[0\] must be a writable float32 array of shape \(3, 6\)"),
        (lambda: adapter.gradients(x, g, out=(a, a)), r"out\[1\] must be a writable float32 array of shape \(5, 3\)"),
        (lambda: adapter.gradients(x, g, out=a), "out must be a pair .*, got ndarray"),
        (lambda: adapter.gradients(x, g, out=(a, b, a)), "out must be a pair"),
        (lambda: adapter.gradients(x, g, out=(a, adapter.b_matrix)), "out must not overlap"),
        (lambda: adapter.gradients(x, g, out=(adapter.a_matrix, b)), "out must not overlap"),
        (
            lambda: square.gradients(rows, normal(3, 3), out=(rows, square.b_matrix.copy())),
            "out must not overlap itself, x",
        ),
        (lambda: square.gradients(normal(3, 3), rows, out=(square.b_matrix.copy(), rows)), "out must not overlap"),
        (lambda: square.gradients(rows, normal(3, 3), out=(normal(3, 3),) * 2), "out must not overlap itself"),
    ]:
        before = [v.tobytes() for v in (adapter.flat.vector, square.flat.vector, a, b, rows)]
        with pytest.raises(InputError, match=message):
            call()
        assert [v.tobytes() for v in (adapter.flat.vector, square.flat.vector, a, b, rows)] == before


# ---------------------------------------------------------------- AdapterSet


def test_a_set_lays_its_adapters_one_after_the_other() -> None:
    adapters = make_set()
    assert adapters.flat.layout == (
        ("q.A", (2, 6)), ("q.B", (5, 2)), ("k.A", (2, 4)), ("k.B", (3, 2)),
        ("out.proj.A", (2, 2)), ("out.proj.B", (7, 2)),
    )  # fmt: skip
    assert list(adapters) == ["q", "k", "out.proj"]
    assert len(adapters) == 3
    assert isinstance(adapters, Mapping)
    assert "k" in adapters
    assert adapters.param_count() == sum(one.param_count() for one in adapters.values()) == 54
    assert adapters.memory_bytes() == 216
    assert repr(adapters) == "AdapterSet(3 adapters, 54 parameters)"
    adapters.flat.vector[...] = np.arange(54)
    assert adapters["k"].b_matrix.tolist() == [[30, 31], [32, 33], [34, 35]]
    adapters["out.proj"].a_matrix[0, 0] = -1
    assert adapters.flat.vector[36] == -1
    assert adapters.flat.vector.ctypes.data % 64 == 0
    with pytest.raises(KeyError):
        adapters["v"]


def test_seed_and_name_decide_each_module_whatever_else_is_in_the_set() -> None:
    shapes = {f"layer{i}.q": (8, 8) for i in range(20)}
    whole = AdapterSet(shapes, seed=4)
    reversed_part = AdapterSet(dict.fromkeys(list(shapes)[7:3:-1], (8, 8)), seed=4)
    for name in reversed_part:
        assert same_bits(whole[name].a_matrix, reversed_part[name].a_matrix)
    drawn = {one.a_matrix.tobytes() for one in whole.values()}
    assert len(drawn) == 20, "equal shapes must not get equal weights"
    assert not drawn & {one.a_matrix.tobytes() for one in AdapterSet(shapes, seed=5).values()}


def test_from_adapters_copies_and_keeps_each_config() -> None:
    parts = {
        "small": make_adapter(1),
        "large": LoraAdapter(7, 2, LoraConfig(rank=5, alpha=3, use_rslora=True), seed=2),
    }
    adapters = AdapterSet.from_adapters(parts)
    for name, part in parts.items():
        assert same_bits(adapters[name].flat.vector, part.flat.vector)
        assert adapters[name].config == part.config
        assert adapters[name].scaling == part.scaling
        assert not np.shares_memory(adapters[name].flat.vector, part.flat.vector)
    adapters["large"].a_matrix[...] = 0
    assert parts["large"].a_matrix.any()
    assert AdapterSet.from_adapters(adapters)["small"].rank == RANK


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdapterSet({}, seed=0), "an AdapterSet must hold at least one adapter by name, got none"),
        (lambda: AdapterSet([("a", (1, 1))], seed=0), r"shapes must be a mapping of name to \(d_in, d_out\), got list"),
        (lambda: AdapterSet({"a": 5}, seed=0), r"shapes\['a'\] must be \(d_in, d_out\), got 5"),
        (lambda: AdapterSet({"a": (1, 2, 3)}, seed=0), r"shapes\['a'\] must be \(d_in, d_out\), got \(1, 2, 3\)"),
        (lambda: AdapterSet({"a": (0, 3)}, seed=0), "d_in must be an integer in"),
        (lambda: AdapterSet({"": (2, 2)}, seed=0), "adapter names must be non-empty strings, got ''"),
        (lambda: AdapterSet({3: (2, 2)}, seed=0), "adapter names must be non-empty strings, got 3"),
        (lambda: AdapterSet({"a": (2, 2)}, seed=-1), "seed must be an integer >= 0, got -1"),
        (lambda: AdapterSet({"a": (2, 2)}, seed=np.random.default_rng()), "seed must be an integer, got Generator"),
        (lambda: AdapterSet.from_adapters({}), "an AdapterSet must hold at least one adapter by name, got none"),
        (lambda: AdapterSet.from_adapters([make_adapter()]), "at least one adapter by name, got list"),
        (lambda: AdapterSet.from_adapters({"a": make_set()}), r"adapters\['a'\] must be a LoraAdapter, got AdapterSet"),
    ],
)
def test_a_set_refuses_by_name(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# ---------------------------------------------------------------- for those who read and write files


def test_zeros_is_an_adapter_to_be_filled() -> None:
    config = LoraConfig(rank=3, alpha=1.5, use_rslora=True)
    adapter = LoraAdapter.zeros(np.int64(4), 2, config)
    assert (adapter.d_in, adapter.d_out, adapter.rank, adapter.scaling) == (4, 2, 3, config.scaling)
    assert type(adapter.d_in) is int
    assert adapter.config is config
    assert (adapter.a_matrix.shape, adapter.b_matrix.shape) == ((3, 4), (2, 3))
    assert not adapter.flat.vector.any()
    source = LoraAdapter(4, 2, config, seed=0)
    source.b_matrix = normal(2, 3)
    adapter.flat.vector[...] = source.flat.vector
    assert same_bits(adapter.apply(normal(5, 4)), source.apply(normal(5, 4)))


def test_zeros_is_a_set_to_be_filled() -> None:
    small, large = LoraConfig(rank=2, alpha=1.0), LoraConfig(rank=3, alpha=5.0, use_rslora=True)
    adapters = AdapterSet.zeros({"q": (np.int32(6), 5, small), "out.proj": (2, 7, large), "k": (4, 3, small)})
    assert list(adapters) == ["q", "out.proj", "k"]
    assert [name for name, _ in adapters.flat.layout] == ["q.A", "q.B", "out.proj.A", "out.proj.B", "k.A", "k.B"]
    shapes = {name: (one.d_in, one.d_out, one.rank, one.scaling) for name, one in adapters.items()}
    assert shapes == {"q": (6, 5, 2, 0.5), "out.proj": (2, 7, 3, large.scaling), "k": (4, 3, 2, 0.5)}
    assert {type(one.d_in) for one in adapters.values()} == {int}
    assert adapters["out.proj"].config is large
    assert not adapters.flat.vector.any()
    assert adapters.flat.vector.ctypes.data % 64 == 0
    adapters["k"].b_matrix[...] = 1  # the last six elements
    assert np.flatnonzero(adapters.flat.vector).tolist() == list(
        range(adapters.param_count() - 6, adapters.param_count())
    )
    make_trainer().step(1.0, adapters, fill(Gradients(adapters)))
    assert adapters["q"].a_matrix.all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraAdapter.zeros(0, 3, LoraConfig()), "d_in must be an integer in"),
        (lambda: LoraAdapter.zeros(3, 2.5, LoraConfig()), "d_out must be an integer, got 2.5"),
        (lambda: LoraAdapter.zeros(3, 3, None), "config must be a LoraConfig, got NoneType"),
        (lambda: AdapterSet.zeros({}), "an AdapterSet must hold at least one adapter by name, got none"),
        (lambda: AdapterSet.zeros({"": (2, 2, LoraConfig())}), "adapter names must be non-empty strings, got ''"),
        (lambda: AdapterSet.zeros({3: (2, 2, LoraConfig())}), "adapter names must be non-empty strings, got 3"),
        (lambda: AdapterSet.zeros({"a": (2, 0, LoraConfig())}), "d_out must be an integer in"),
        (lambda: AdapterSet.zeros({"a": (2, 2, {})}), "config must be a LoraConfig, got dict"),
    ],
)
def test_zeros_refuses_by_name(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_config_of_a_set_is_its_first_adapters() -> None:
    first, second = LoraConfig(rank=2), LoraConfig(rank=5)
    members = {"a": LoraAdapter(3, 3, first, seed=0), "b": LoraAdapter(3, 3, second, seed=0)}
    assert AdapterSet.from_adapters(members).config is first
    assert AdapterSet.from_adapters(dict(reversed(members.items()))).config is second
    assert AdapterSet({"a": (3, 3)}, second, seed=0).config is second


def test_a_new_set_has_an_origin_of_its_own() -> None:
    sets = make_set(), AdapterSet.from_adapters(make_set()), AdapterSet.zeros({"a": (2, 2, LoraConfig())})
    for adapters in sets:
        assert adapters.origin == {}
    sets[0].origin["revision"] = "main"
    assert make_set().origin == sets[1].origin == {}


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
def test_a_copied_set_keeps_its_origin(copied) -> None:
    adapters = make_set()
    adapters.origin = {"base_model_name_or_path": "some/model", "auto_mapping": {"a": [1]}}
    twin = copied(adapters)
    assert twin.origin == adapters.origin
    twin.origin["auto_mapping"]["a"].append(2)
    assert adapters.origin["auto_mapping"] == {"a": [1]}


def test_a_shallow_copy_has_weights_of_its_own_and_the_same_config() -> None:
    adapters = make_set()
    adapters.origin = {"revision": "main"}
    twin = copy.copy(adapters)
    assert (twin.origin, twin.config) == (adapters.origin, adapters.config)
    twin.flat.vector.fill(0)
    assert adapters.flat.vector.all()


# ---------------------------------------------------------------- Gradients


def test_gradients_buffer_has_the_layout_and_starts_at_zero() -> None:
    adapters = make_set()
    gradients = Gradients(adapters)
    assert gradients.layout == adapters.flat.layout
    assert gradients.vector.shape == adapters.flat.vector.shape
    assert not gradients.vector.any()
    assert gradients.vector.ctypes.data % 64 == 0
    assert list(gradients) == list(adapters)
    assert len(gradients) == 3
    assert isinstance(gradients["k"], GradientPair)
    gradients["k"].grad_b[...] = 1
    assert np.flatnonzero(gradients.vector).tolist() == [30, 31, 32, 33, 34, 35]
    gradients.zero_()
    assert not gradients.vector.any()


def test_gradients_of_a_lone_adapter_have_the_key_adapter() -> None:
    gradients = Gradients(make_adapter())
    assert list(gradients) == ["adapter"]
    assert gradients["adapter"].grad_a.shape == (RANK, D_IN)
    member = Gradients(make_set()["q"])
    assert list(member) == ["adapter"]


def test_gradients_of_something_else_are_refused() -> None:
    with pytest.raises(InputError, match="adapters must be an AdapterSet or a LoraAdapter, got ndarray"):
        Gradients(np.zeros(3))


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
def test_a_copied_adapter_trains_like_the_original(copied) -> None:
    """Copied attribute by attribute, its matrices would no longer be views of the vector that a trainer updates."""
    original = make_adapter(dropout=0.1)
    twin = copied(original)
    assert (twin.config, twin.d_in, twin.scaling) == (original.config, original.d_in, original.scaling)
    assert not np.shares_memory(twin.flat.vector, original.flat.vector)
    for adapter in (original, twin):
        trainer = make_trainer()
        for seed in range(3):
            trainer.step(1.0, adapter, *make_pair(seed))
    assert same_bits(twin.flat.vector, original.flat.vector)
    assert same_bits(twin.a_matrix, original.a_matrix)
    assert np.shares_memory(twin.b_matrix, twin.flat.vector)


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
def test_a_copied_set_and_its_gradients_stay_one_vector(copied) -> None:
    adapters = make_set()
    twin = copied(adapters)
    gradients, twin_gradients = fill(Gradients(adapters)), copied(fill(Gradients(adapters)))
    assert same_bits(twin.flat.vector, adapters.flat.vector)
    assert same_bits(twin_gradients.vector, gradients.vector)
    for mine, grads in ((adapters, gradients), (twin, twin_gradients)):
        LoraTrainer().step(1.0, mine, grads)
        make_trainer().step(1.0, mine, grads)
    for name in adapters:
        assert same_bits(twin[name].a_matrix, adapters[name].a_matrix)
        assert np.shares_memory(twin[name].b_matrix, twin.flat.vector)
        assert np.shares_memory(twin_gradients[name].grad_a, twin_gradients.vector)
    twin_gradients.zero_()
    assert gradients.vector.any()


# ------------------------------------------------------------------ over other memory


def test_an_adapter_over_other_memory_is_the_same_one_with_those_parameters() -> None:
    adapter = make_adapter(use_rslora=True)
    memory = np.random.default_rng(3).normal(size=adapter.param_count()).astype(np.float32)
    other = adapter.over(memory)
    assert type(other) is LoraAdapter
    assert (other.d_in, other.d_out, other.config, other.scaling) == (6, 5, adapter.config, adapter.scaling)
    assert np.array_equal(other.flat.vector, memory)
    other.b_matrix[4, 2] = 7
    assert memory[-1] == 7
    x = np.ones(6, np.float32)
    assert same_bits(other.apply(x), adapter.with_parameters(memory).apply(x))


def test_a_set_over_other_memory_is_the_same_one_with_those_parameters() -> None:
    adapters = make_set()
    adapters.origin["task_type"] = "CAUSAL_LM"
    memory = np.random.default_rng(3).normal(size=adapters.param_count()).astype(np.float32)
    other = adapters.over(memory)
    assert type(other) is AdapterSet
    assert list(other) == list(adapters)
    assert other.origin == adapters.origin
    assert other.flat.layout == adapters.flat.layout
    expected = adapters.with_parameters(memory)
    for name, one in expected.items():
        assert same_bits(other[name].flat.vector, one.flat.vector)
        assert other[name].config == one.config
        assert np.shares_memory(other[name].b_matrix, memory)
    with pytest.raises(
        InputError, match=r"vector must be a float32 array of shape \(54,\), got float32 of shape \(53,\)"
    ):
        adapters.over(memory[:-1])
