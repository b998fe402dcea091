"""fold: one rank and one alpha with B @ A times its scale unchanged, or a refusal."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training import same_bits

from cylora import AdapterSet, InputError, LoraAdapter, LoraConfig
from cylora.formats.portable import Folded, fold

MAX_FLOAT16, MAX_FLOAT32 = 65504.0, float(np.finfo(np.float32).max)


def filled(configs: Mapping[str, LoraConfig], seed: int = 0) -> AdapterSet:
    """Adapters of 6 inputs and 5 outputs, A and B not zero."""
    adapters = AdapterSet.from_adapters({name: LoraAdapter(6, 5, config, seed=1) for name, config in configs.items()})
    adapters.flat.vector[...] = np.random.default_rng(seed).normal(size=adapters.param_count())
    return adapters


def delta(a_matrix: np.ndarray, b_matrix: np.ndarray, scale: float) -> np.ndarray:
    return scale * (b_matrix.astype(np.float64) @ a_matrix.astype(np.float64))


def untouched(adapters: AdapterSet, folded: Folded) -> set[str]:
    """Names whose A and B are the adapter's own memory; of the others, A has its bits, padded."""
    found = set()
    for name, adapter in adapters.items():
        a_matrix, b_matrix = folded.tensors[name]
        assert same_bits(a_matrix[: adapter.rank], adapter.a_matrix)
        assert not a_matrix[adapter.rank :].any()
        assert not b_matrix[:, adapter.rank :].any()
        if np.shares_memory(a_matrix, adapter.a_matrix) and np.shares_memory(b_matrix, adapter.b_matrix):
            assert same_bits(a_matrix, adapter.a_matrix)
            assert same_bits(b_matrix, adapter.b_matrix)
            found.add(name)
    return found


def unmultiplied(adapters: AdapterSet, folded: Folded) -> set[str]:
    return {n for n, one in adapters.items() if same_bits(folded.tensors[n][1][:, : one.rank], one.b_matrix)}


# ------------------------------------------------------------------ fold


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("alpha", [1.0, 0.1, 16.0, 1e6, 5e-324])
def test_a_uniform_set_is_views_of_its_own_memory(alpha: float, rank: int) -> None:
    adapters = filled(dict.fromkeys("abc", LoraConfig(rank=rank, alpha=alpha)))
    folded = fold(adapters)
    assert (folded.rank, folded.alpha) == (rank, alpha)
    assert untouched(adapters, folded) == set(adapters) == set(folded.tensors)


@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_rslora_becomes_a_larger_alpha(rank: int) -> None:
    adapters = filled(dict.fromkeys("ab", LoraConfig(rank=rank, alpha=0.3, use_rslora=True)))
    folded = fold(adapters)
    assert (folded.rank, folded.alpha) == (rank, 0.3 * math.sqrt(rank))
    assert untouched(adapters, folded) == {"a", "b"}


def test_equal_scales_of_mixed_ranks_are_only_padded() -> None:
    """Also 8/8 and rsLoRA's 2/sqrt(4), which are the same number."""
    adapters = filled(
        {
            "a": LoraConfig(rank=3, alpha=3.0),
            "b": LoraConfig(rank=8, alpha=8.0),
            "c": LoraConfig(rank=4, alpha=2.0, use_rslora=True),
        }
    )
    folded = fold(adapters)
    assert (folded.rank, folded.alpha) == (8, 8.0)
    assert unmultiplied(adapters, folded) == {"a", "b", "c"}
    assert untouched(adapters, folded) == {"b"}
    for name, adapter in adapters.items():
        a_matrix, b_matrix = folded.tensors[name]
        assert (a_matrix.shape, b_matrix.shape) == ((8, 6), (5, 8))
        assert (a_matrix.dtype, b_matrix.dtype) == (np.float32, np.float32)
        expected = delta(adapter.a_matrix, adapter.b_matrix, adapter.scaling)
        assert np.array_equal(delta(a_matrix, b_matrix, folded.alpha / folded.rank), expected)


@pytest.mark.parametrize(
    ("alphas", "alpha", "kept"),
    [
        ({"a": 3.0, "b": 5.0, "c": 3.0}, 3.0, {"a", "c"}),  # the fewest are multiplied
        ({"a": 5.0, "b": 5.0, "c": 300.0}, 5.0, {"a", "b"}),
        ({"a": 3.0, "b": 5.0, "c": 20.0}, 20.0, {"c"}),  # b by 1/4, exactly; of 5 and 20 the larger
        ({"a": 40.0, "b": 5.0, "c": 20.0, "d": 999.0}, 40.0, {"a"}),
        ({"a": 3.0, "b": 3.0, "c": 5.0, "d": 20.0, "e": 80.0}, 3.0, {"a", "b"}),
        ({"a": 3.0, "b": 7.0}, 7.0, {"b"}),  # nothing is exact: the larger
    ],
)
def test_the_common_alpha_spares_most_and_shrinks_the_rest(
    alphas: dict[str, float], alpha: float, kept: set[str]
) -> None:
    adapters = filled({name: LoraConfig(rank=2, alpha=value) for name, value in alphas.items()})
    folded = fold(adapters)
    assert folded.alpha == alpha
    assert unmultiplied(adapters, folded) == kept
    for name, adapter in adapters.items():
        # each product is the exact one, rounded once
        exact = adapter.b_matrix.astype(np.float64) * (alphas[name] / alpha)
        assert same_bits(folded.tensors[name][1], exact.astype(np.float32))


def test_a_power_of_two_is_exact_whatever_the_root() -> None:
    """sqrt(18) and sqrt(2) are both rounded; that their ratio is 3, and here 1/4 of 12/3, is seen all the same."""
    adapters = filled(
        {"a": LoraConfig(rank=2, alpha=1.0, use_rslora=True), "b": LoraConfig(rank=18, alpha=12.0, use_rslora=True)}
    )
    folded = fold(adapters)
    assert same_bits(folded.tensors["a"][1][:, :2], adapters["a"].b_matrix / np.float32(4))


def test_the_adapters_are_not_written_to() -> None:
    adapters = filled({"a": LoraConfig(rank=2, alpha=1.0), "b": LoraConfig(rank=3, alpha=7.0)})
    before = adapters.flat.vector.copy()
    fold(adapters)
    assert same_bits(adapters.flat.vector, before)


CONFIGS = st.builds(
    LoraConfig,
    rank=st.integers(1, 9),
    alpha=st.one_of(st.sampled_from([1.0, 2.0, 8.0, 16.0]), st.floats(1e-3, 1e3)),
    use_rslora=st.booleans(),
)


@given(st.lists(CONFIGS, min_size=1, max_size=5), st.integers(0, 99))
def test_what_each_adapter_does_is_unchanged(configs: list[LoraConfig], seed: int) -> None:
    adapters = filled({f"m{i}": config for i, config in enumerate(configs)}, seed)
    rank, alpha, tensors = fold(adapters)
    assert rank == max(config.rank for config in configs)
    assert list(tensors) == list(adapters)
    for name, adapter in adapters.items():
        expected = delta(adapter.a_matrix, adapter.b_matrix, adapter.scaling)
        terms = delta(abs(adapter.a_matrix), abs(adapter.b_matrix), adapter.scaling)
        error = abs(delta(*tensors[name], alpha / rank) - expected)
        assert (error <= 6.1e-8 * terms).all()  # 2^-24 for the one rounding of each B


def test_weights_that_no_longer_fit_are_refused_by_name_and_place() -> None:
    adapters = filled({"a": LoraConfig(alpha=1.0), "b": LoraConfig(alpha=1.0), "far": LoraConfig(alpha=1e6)})
    adapters["far"].b_matrix[3, 2] = -1e36
    message = r"far.b_matrix times 1e\+06, for the common alpha, must fit float32, got -9\.99.*e\+35 at \[3, 2\]"
    with pytest.raises(InputError, match=message):
        fold(adapters)
    adapters["far"].b_matrix[3, 2] = -1e32
    assert fold(adapters).tensors["far"][1][3, 2] == pytest.approx(-1e38)


def test_a_factor_beyond_float64_is_refused() -> None:
    """Rather than inf times 0."""
    tiny = LoraConfig(alpha=2.0**-1074)
    adapters = filled({"a": tiny, "b": tiny, "far": LoraConfig(alpha=2.0**19)})
    adapters["far"].b_matrix[...] = 0
    with pytest.raises(InputError, match=r"far.b_matrix times inf, .* got 0.0 at \[0, 0\]"):
        fold(adapters)


def test_what_shrinks_too_far_becomes_denormal_and_then_zero() -> None:
    adapters = filled({"a": LoraConfig(alpha=2.0**-20), "b": LoraConfig(alpha=1.0)})
    adapters["a"].b_matrix[0, :3] = [2.0**-107 * (1 + 2.0**-23), 2.0**-126, 2.0**-131]
    assert fold(adapters).tensors["a"][1][0, :3].tolist() == [2.0**-127, 2.0**-146, 0.0]
