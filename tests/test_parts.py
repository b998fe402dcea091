"""Rates and decays by matrix: which runs of the vector a config makes; training beside the definitions in float64."""

import contextlib
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from reference import Group, Rule, averaged, grouped_step, ulp
from training import fingerprint, make_adapter, make_pair, make_set, make_trainer, same_bits

from cylora import (
    AdapterSet,
    ConfigError,
    Gradients,
    InputError,
    LoraAdapter,
    LoraConfig,
    LoraTrainer,
    LoraTrainingConfig,
    NonFiniteGradientError,
    StateError,
    step_many,
)  # fmt: skip
from cylora.parts import Part, max_rate, parts_of, trained_sizes

SHAPES = {"layers.0.q_proj": (40, 33), "layers.0.up_proj": (24, 50), "layers.1.q_proj": (40, 33)}
RANK = 3
# What each option means for a matrix: module, "A" or "B" -> factor on the rate, weight decay.
OPTIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "LoRA+": ({"lora_plus_ratio": 16.0}, lambda module, role: (16.0 if role == "B" else 1.0, 0.1)),
    "LoRA-FA": ({"train_a": False}, lambda module, role: (float(role == "B"), 0.1)),
    "LoRA+ and LoRA-FA": (
        {"train_a": False, "lora_plus_ratio": 4.0}, lambda module, role: (4.0 if role == "B" else 0.0, 0.1)
    ),
    "rates": (
        {"rate_pattern": {"layers.1.q_proj": 0.25, "q_proj": 3.0}},
        lambda module, role: ({"layers.1.q_proj": 0.25, "layers.0.q_proj": 3.0}.get(module, 1.0), 0.1),
    ),
    "a frozen module": ({"rate_pattern": {"up_proj": 0}}, lambda module, role: (float("up" not in module), 0.1)),
    "decays": ({"weight_decay_pattern": {"up_proj": 0.0}}, lambda module, role: (1.0, 0.0 if "up" in module else 0.1)),
    "everything": (
        {"lora_plus_ratio": 2.0, "rate_pattern": {"q_proj": 0.5}, "weight_decay_pattern": {"layers.0.q_proj": 0.3}},
        lambda module, role: (
            (2.0 if role == "B" else 1.0) * (0.5 if "q_proj" in module else 1.0),
            0.3 if module == "layers.0.q_proj" else 0.1,
        ),
    ),
}  # fmt: skip
SETTINGS = {"learning_rate": 3e-3, "weight_decay": 0.1, "max_grad_norm": 2.0, "warmup_steps": 0, "log_every": 0}


def adapters_of(seed: int = 0, **config: Any) -> AdapterSet:
    adapters = AdapterSet(SHAPES, LoraConfig(rank=RANK, **config), seed=seed)
    rng = np.random.default_rng(seed)
    for one in adapters.values():
        one.b_matrix[...] = rng.normal(size=one.b_matrix.shape) / 10
    return adapters


def groups_of(adapters: AdapterSet, meaning: Any) -> list[Group]:
    """Return a group for each matrix that is trained."""
    groups, start = [], 0
    for name, shape in adapters.flat.layout:
        factor, weight_decay = meaning(name[:-2], name[-1])
        if factor:
            groups.append(Group(slice(start, start + math.prod(shape)), factor, weight_decay))
        start += math.prod(shape)
    return groups


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("mode", ["decoupled", "l2"])
@pytest.mark.parametrize("option", OPTIONS)
def test_training_is_what_the_definition_says(option: str, mode: str) -> None:
    """300 steps, clipped and not, with an average of the weights, beside float64 with a group for each matrix."""
    fields, meaning = OPTIONS[option]
    adapters, rng = adapters_of(), np.random.default_rng(1)
    trainer = LoraTrainer(LoraTrainingConfig(**SETTINGS | {"weight_decay_mode": mode, "ema_decay": 0.97} | fields))
    groups = groups_of(adapters, meaning)
    gradients, start = Gradients(adapters), adapters.flat.vector.copy()
    p = average = start.astype(np.float64)
    m = v = np.zeros(p.size)
    clipped = 0
    for t in range(1, 301):
        gradients.vector[...] = rng.normal(size=p.size) * rng.choice([0.02, 0.2]) + 0.02
        record = trainer.step(1.0, adapters, gradients)
        rule = Rule(SETTINGS["learning_rate"], weight_decay=0.1, mode=mode, max_norm=2.0)
        p, m, v, norm = grouped_step(p, gradients.vector, m, v, t, rule, groups)
        average = averaged(average, p, 0.97)
        assert record.grad_norm == pytest.approx(norm, rel=1e-12)
        clipped += norm > 2.0
    assert 20 < clipped < 280
    trained = np.zeros(p.size, bool)
    for group in groups:
        trained[group.where] = True
    assert same_bits(adapters.flat.vector[~trained], start[~trained])
    ema = trainer.ema_adapters().flat.vector
    assert same_bits(ema[~trained], start[~trained])
    # Rounding moves a parameter by a part of what it is and of how far it went; another definition by far more.
    reach = np.maximum(np.abs(p), np.abs(start))[trained]
    for values, expected in ((adapters.flat.vector, p), (ema, average)):
        error = np.abs(values.astype(np.float64) - expected)[trained]
        assert np.median(error / ulp(reach)) <= 4
        assert (error <= 64 * ulp(reach) + 1e-9).all()
    moved = np.abs(p - start)[trained]
    assert np.median(moved) > 1e-3


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_of_parameters_is_trained_like_a_trainer_of_its_own(option: str, state_dtype: str) -> None:
    """Without clipping runs do not depend on each other: float32 state to the bit, compact state in the mean."""
    fields, _ = OPTIONS[option]
    adapters = adapters_of()
    parts = parts_of(adapters.flat.layout, LoraTrainingConfig(**SETTINGS | fields))
    assert parts is not None
    config = {**SETTINGS, "max_grad_norm": math.inf, "state_dtype": state_dtype}
    trainer, gradients = LoraTrainer(LoraTrainingConfig(**config | fields)), Gradients(adapters)
    lone = {}
    for part in parts:
        where = slice(part.start, part.start + part.size)
        vector = adapters.flat.vector[where].copy()
        own = {**config, "learning_rate": SETTINGS["learning_rate"] * part.rate_factor}
        alone = LoraTrainer(LoraTrainingConfig(**own | {"weight_decay": part.weight_decay}))
        half = vector.size // RANK
        adapter = LoraAdapter(half - 1, 1, LoraConfig(rank=RANK), seed=0)
        adapter.flat.vector[...] = vector
        lone[part.start] = (where, alone, adapter)
    rng = np.random.default_rng(2)
    for _ in range(20):
        gradients.vector[...] = rng.normal(size=gradients.vector.size)
        trainer.step(1.0, adapters, gradients)
        for where, alone, adapter in lone.values():
            alone.step(1.0, adapter, gradients.vector[where].copy())
    for where, _, adapter in lone.values():
        trained = adapters.flat.vector[where]
        if state_dtype == "float32":
            assert same_bits(trained, adapter.flat.vector)
        else:
            assert np.abs(trained - adapter.flat.vector).max() < 0.15


def test_without_options_there_is_one_plain_part() -> None:
    layout = adapters_of().flat.layout
    assert parts_of(layout, LoraTrainingConfig()) is None
    assert parts_of(layout, LoraTrainingConfig(rate_pattern={"q_proj": 1.0})) is None
    assert parts_of(layout, LoraTrainingConfig(ema_decay=0.9, divergence="rollback")) is None
    assert trained_sizes(layout, LoraTrainingConfig()) == (sum(math.prod(shape) for _, shape in layout),)


def test_rules_that_are_the_same_give_the_same_however_they_are_said() -> None:
    """To the bit where that is one run; in two, an element next to their end shares its division with another."""
    results = []
    for fields in ({}, {"rate_pattern": {"q_proj": 1.0}}, {"weight_decay_pattern": {"q_proj": 0.1}}):
        adapters = adapters_of()
        trainer = LoraTrainer(LoraTrainingConfig(**SETTINGS | {"max_grad_norm": math.inf} | fields))
        gradients = Gradients(adapters)
        for seed in range(5):
            gradients.vector[...] = np.random.default_rng(seed).normal(size=gradients.vector.size)
            trainer.step(1.0, adapters, gradients)
        results.append(adapters.flat.vector)
    assert same_bits(results[0], results[1])
    assert (np.abs(results[2] - results[0]) <= 64 * ulp(results[0]) + 1e-9).all()


# ------------------------------------------------------------------ runs


def test_neighbours_that_are_treated_alike_are_one_run() -> None:
    adapters = AdapterSet(dict.fromkeys("abcd", (4, 5)), LoraConfig(rank=2), seed=0)  # each 8 of A, 10 of B

    def runs(**fields: Any) -> list[tuple[int, int, float]] | None:
        parts = parts_of(adapters.flat.layout, LoraTrainingConfig(**fields))
        return None if parts is None else [part[:3] for part in parts]

    assert runs(rate_pattern={"b": 2.0, "c": 2.0}) == [(0, 18, 1.0), (18, 36, 2.0), (54, 18, 1.0)]
    assert runs(rate_pattern={"b": 0.0}) == [(0, 18, 1.0), (36, 36, 1.0)]
    assert runs(rate_pattern={"a": 0.0, "d": 0}) == [(18, 36, 1.0)]
    assert runs(train_a=False) == [(8, 10, 1.0), (26, 10, 1.0), (44, 10, 1.0), (62, 10, 1.0)]
    assert [start for start, *_ in runs(lora_plus_ratio=2) or []] == [0, 8, 18, 26, 36, 44, 54, 62]
    parts = parts_of(adapters.flat.layout, LoraTrainingConfig(weight_decay_pattern={"a": 0.01, "b": 0.5}))
    assert parts == [
        Part(0, 18, 1.0, 0.01, has_own_decay=True),
        Part(18, 18, 1.0, 0.5, has_own_decay=True),
        Part(36, 36, 1.0, 0.01, has_own_decay=False),
    ]
    assert trained_sizes(adapters.flat.layout, LoraTrainingConfig(train_a=False)) == (10,) * 4


def test_runs_lie_in_order_and_apart_whatever_the_patterns() -> None:
    rng = np.random.default_rng(3)
    tried: list[tuple[int, list[Part] | None]] = []
    names = [f"layers.{i}.{kind}" for i in range(4) for kind in ("q", "k", "up")]
    for _ in range(200):
        adapters = AdapterSet.zeros({name: (*rng.integers(1, 9, 2).tolist(), LoraConfig(rank=1)) for name in names})
        chosen = rng.choice(["q", "k", "0.q", "layers.1.up", "3.k"], 3, replace=False).tolist()
        fields = {
            "rate_pattern": {key: float(rng.choice([0, 1, 2])) for key in chosen[:2]},
            "weight_decay_pattern": {key: float(rng.choice([0.01, 0.1])) for key in chosen[2:]},
            "lora_plus_ratio": float(rng.choice([1, 2])), "train_a": bool(rng.integers(2)),
        }  # fmt: skip
        with contextlib.suppress(ConfigError):  # a key that an earlier one hides, or nothing left
            tried.append((adapters.param_count(), parts_of(adapters.flat.layout, LoraTrainingConfig(**fields))))
    assert len(tried) > 100
    for size, parts in tried:
        if parts is None:
            continue
        assert all(part.size > 0 and part.rate_factor > 0 for part in parts)
        for one, other in pairwise(parts):
            assert one.start + one.size <= other.start
            assert one.start + one.size < other.start or one[2:] != other[2:]
        assert parts[-1].start + parts[-1].size <= size


# ------------------------------------------------------------------ what is not trained


def test_a_frozen_matrix_has_no_moments_and_takes_no_memory() -> None:
    adapters, gradients = adapters_of(), Gradients(adapters_of())
    of_a = sum(one.a_matrix.size for one in adapters.values())
    for state_dtype, bytes_each in (("float32", 8), ("bfloat16", 4)):
        trainer = LoraTrainer(LoraTrainingConfig(train_a=False, state_dtype=state_dtype))
        gradients.vector.fill(0.5)
        trainer.step(1.0, adapters, gradients)
        state = trainer.state_dict()["adam"]
        assert state["sizes"] == [one.b_matrix.size for one in adapters.values()]
        stored = sum(array.nbytes for name, array in state.items() if name in ("m", "v"))
        assert stored == bytes_each * (adapters.param_count() - of_a)
        assert trainer._adam is not None
        assert trainer._adam._moments.nbytes == stored


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_the_gradient_of_what_is_frozen_is_not_read(value: float) -> None:
    """Not for the norm, nor the update, nor where micro-batches are added up; and NaN there refuses nothing."""
    results = []
    for spoilt in (0.0, value):
        adapter, trainer = make_adapter(), make_trainer(train_a=False)
        grad_a, grad_b = make_pair()
        grad_a.fill(spoilt)
        records = [trainer.step(1.0, adapter, grad_a, grad_b)]
        trainer.accumulate(1.0, adapter, grad_a, grad_b)
        trainer.accumulate(2.0, adapter, np.concatenate([grad_a.ravel(), grad_b.ravel()]))
        trainer.load_state_dict(trainer.state_dict())  # which wants finite sums
        records.append(trainer.step_accumulated())
        results.append((fingerprint(trainer, adapter), records))
    assert results[0] == results[1]


def test_an_error_names_the_matrix_of_a_run() -> None:
    adapters, trainer = make_set(), make_trainer(lora_plus_ratio=4.0, rate_pattern={"k": 0.0})
    gradients = Gradients(adapters)
    gradients["k"].grad_a.fill(math.nan)
    gradients["out.proj"].grad_b[3, 1] = math.inf
    before = fingerprint(trainer, adapters)
    with pytest.raises(NonFiniteGradientError, match=r"gradient of out.proj.B must be finite, got inf at \[3, 1\]"):
        trainer.step(1.0, adapters, gradients)
    assert fingerprint(trainer, adapters) == before


# ------------------------------------------------------------------ together with the rest


@pytest.mark.parametrize("state_dtype", ["float32", "8bit"])
def test_step_many_does_what_step_does(state_dtype: str) -> None:
    jobs, twins = [], []
    for option, (fields, _) in OPTIONS.items():
        for holders in (jobs, twins):
            config = LoraTrainingConfig(**SETTINGS | {"state_dtype": state_dtype, "ema_decay": 0.9} | fields)
            holders.append((option, LoraTrainer(config), adapters_of()))
    gradients = Gradients(adapters_of())
    for seed in range(4):
        gradients.vector[...] = np.random.default_rng(seed).normal(size=gradients.vector.size)
        records = step_many([(trainer, 1.0, adapters, gradients) for _, trainer, adapters in jobs], threads=2)
        assert records == [trainer.step(1.0, adapters, gradients) for _, trainer, adapters in twins]
    for (option, *job), (_, *twin) in zip(jobs, twins, strict=True):
        assert fingerprint(*job) == fingerprint(*twin), option


def test_a_state_goes_to_a_trainer_that_trains_the_same_runs() -> None:
    adapters, trainer = make_set(), make_trainer(train_a=False)
    trainer.step(1.0, adapters, Gradients(adapters))
    state = trainer.state_dict()
    for fields in ({}, {"lora_plus_ratio": 2.0}, {"train_a": False, "rate_pattern": {"k": 0}}):
        other = make_trainer(**fields)
        other.step(1.0, make_set(), Gradients(adapters))
        before = fingerprint(other)
        with pytest.raises(StateError, match=r"adam sizes must be those that the config trains \(train_a, lora_plus"):
            other.load_state_dict(state)
        assert fingerprint(other) == before
        fresh = make_trainer(**fields)
        fresh.load_state_dict(state)
        with pytest.raises(StateError, match="adam sizes must be those that the config trains"):
            fresh.step(1.0, make_set(), Gradients(adapters))
    same = make_trainer(train_a=False, lora_plus_ratio=2.0)  # other rates for the same runs
    same.load_state_dict(state)
    assert same.step(1.0, adapters, Gradients(adapters)).step == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "adam sizes must be a list of at least one size, got"),
        ("12", "adam sizes must be a list of at least one size, got '12'"),
        ([0, 3], "adam sizes must be an integer >= 1, got 0"),
        ([1.5], "adam sizes must be an integer, got 1.5"),
        ([55], "adam sizes must be at most 54 together, the layout's size, got"),
        ([10, 10, 11], "adam m must be float32 of shape"),
    ],
)
def test_sizes_of_a_state_are_checked(sizes: Any, message: str) -> None:
    adapters, trainer = make_set(), make_trainer(train_a=False)
    trainer.step(1.0, adapters, Gradients(adapters))
    state = trainer.state_dict()
    state["adam"]["sizes"] = sizes
    before = fingerprint(trainer, adapters)
    with pytest.raises(StateError, match=message):
        trainer.load_state_dict(state)
    assert fingerprint(trainer, adapters) == before


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rate_pattern": {"v": 2.0}},
            "each key of rate_pattern must count for a module, got 'v', which does",
        ),
        ({"rate_pattern": {"q": 2.0, "^q": 1.0}}, "each key of rate_pattern must count for a module, got '\\^q'"),
        ({"weight_decay_pattern": {"Q": 0.0}}, "each key of weight_decay_pattern must count for a module, got 'Q'"),
        ({"rate_pattern": {"q": 0, "k": 0, "proj": 0}}, "train_a and rate_pattern must leave a matrix to train, got"),
        ({"lora_plus_ratio": 1e6, "weight_decay": 0.0, "learning_rate": 2.0}, "must be at most 1 with these factors"),
        ({"lora_plus_ratio": 300.0}, "must be at most 0.666667 with these factors and weight decays, got 1"),
        ({"weight_decay_pattern": {"q": 4.0}}, "learning_rate and min_learning_rate must be at most 0.5 with these"),
    ],
)
def test_options_that_do_not_fit_the_adapters_are_refused_before_anything(fields: Any, message: str) -> None:
    adapters, trainer = make_set(), make_trainer(**{"learning_rate": 1.0} | fields)
    before = fingerprint(trainer, adapters)
    with pytest.raises(ConfigError, match=message):
        trainer.step(1.0, adapters, Gradients(adapters))
    assert fingerprint(trainer, adapters) == before


def test_a_lone_adapter_has_no_name_for_a_pattern() -> None:
    with pytest.raises(ConfigError, match="each key of rate_pattern must count for a module, got 'q'"):
        make_trainer(rate_pattern={"q": 2.0}).step(1.0, make_adapter(), *make_pair())
    for name in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ConfigError, match=f"{name} must be empty for a lone LoraAdapter, which has no name, got"):
            LoraAdapter(3, 4, LoraConfig(**{name: {"q": 2}}), seed=0)


def test_a_rate_above_what_a_run_allows_is_refused() -> None:
    adapters, rates = make_set(), iter([0.5, 3.0, 0.5])
    trainer = make_trainer(schedule=lambda step: next(rates), weight_decay_pattern={"q": 1.0}, lora_plus_ratio=2.0)
    trainer.step(1.0, adapters, Gradients(adapters))
    before = fingerprint(trainer, adapters)
    with pytest.raises(InputError, match=r"learning rate must be a number in \[0, 1\] \(2 / weight_decay\), got 3.0"):
        trainer.step(1.0, adapters, Gradients(adapters))
    assert fingerprint(trainer, adapters) == before


@pytest.mark.parametrize("mode", ["decoupled", "l2"])
def test_the_largest_rate_holds_for_every_run(mode: str) -> None:
    config = LoraTrainingConfig(weight_decay_mode=mode, weight_decay=0.0)
    parts = [Part(0, 1, 4.0, 0.5, False), Part(1, 1, 0.5, 0.1, False), Part(2, 1, 1.0, 0.0, False)]
    assert max_rate(config, parts) == (1.0 if mode == "decoupled" else 1e6 / 4)
    assert max_rate(config, None) == 1e6


# ------------------------------------------------------------------ ranks and alphas


def test_patterns_give_modules_their_own_rank_and_alpha() -> None:
    config = LoraConfig(
        rank=4, alpha=8.0, dropout=0.1, rank_pattern={"0.q_proj": 2, "up_proj": 6}, alpha_pattern={"q_proj": 3.0}
    )  # fmt: skip
    adapters = AdapterSet(SHAPES, config, seed=0)
    shown = {name: (one.rank, one.alpha, one.scaling, one.config.dropout) for name, one in adapters.items()}
    assert shown == {
        "layers.0.q_proj": (2, 3.0, 1.5, 0.1),
        "layers.0.up_proj": (6, 8.0, 8 / 6, 0.1),
        "layers.1.q_proj": (4, 3.0, 0.75, 0.1),
    }
    assert all(not one.config.rank_pattern and not one.config.alpha_pattern for one in adapters.values())
    plain = AdapterSet(SHAPES, LoraConfig(rank=4), seed=0)
    assert same_bits(adapters["layers.1.q_proj"].a_matrix, plain["layers.1.q_proj"].a_matrix)


def test_rslora_scales_by_each_modules_own_rank() -> None:
    config = LoraConfig(rank=4, alpha=8.0, use_rslora=True, rank_pattern={"up_proj": 16})
    adapters = AdapterSet(SHAPES, config, seed=0)
    assert [one.scaling for one in adapters.values()] == [4.0, 2.0, 4.0]


def test_a_rank_or_alpha_for_no_module_is_refused() -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ConfigError, match=f"each key of {name} must count for a module, got 'v_proj'"):
            AdapterSet(SHAPES, LoraConfig(**{name: {"q_proj": 2, "v_proj": 2}}), seed=0)
