"""cylora against the reference trainer's recorded numbers, within the tolerances of tests/data/golden/FORMAT.md.

Where cylora differs on purpose, a test says so with the case's name. Every case of the file belongs to exactly one of
the lists below: a case nobody looks at would be a failure of `test_golden_file_holds_exactly_the_known_cases`.
"""

import logging
import math
from collections.abc import Callable, Iterator

import golden
import numpy as np
import pytest
import reference
from golden import Case, Floats, floats, number

from cylora import schedule
from cylora.adapter import LoraAdapter
from cylora.config import LoraConfig, LoraTrainingConfig
from cylora.errors import ConfigError, InputError, NonFiniteGradientError, StateError
from cylora.flat import FlatBuffer
from cylora.history import TrainingHistory
from cylora.moments import Moments
from cylora.optimizer import Adam, AdamState, clip_grad_norm_, grad_norm
from cylora.trainer import LoraTrainer

GOLDEN = golden.load()
TRAINER = {case["name"]: case for case in GOLDEN["trainer"]}
EDGE = {case["name"]: case for case in GOLDEN["edge_cases"]}

# Squares of these underflow in the reference's float32: its norm is 0. cylora's is exact; everything else is kept.
TINY = ("tiny_grads_norm_underflows", "subnormal_grads")
# exp(loss) leaves float32 here, not float64.
WIDE_PERPLEXITY = ("inf_and_large_loss", "inf_first_loss", "very_negative_loss")
# 1 - rate * weight_decay is coarse in the reference's float32.
COARSE_DECAY = ("decoupled_decay_rounds_to_one", "decoupled_decay_coarse")
KEPT = (
    "nan_loss_middle", "nan_loss_first", "nan_loss_last", "negative_zero_first_loss", "max_grad_norm_inf", "lr_zero",
    "decoupled_lr_wd_above_one", "max_steps_zero", "zero_steps", "one_step", "first_loss_zero", "loss_increases",
    "log_every_zero", *TINY, *WIDE_PERPLEXITY, *COARSE_DECAY,
)  # fmt: skip
NONFINITE = (
    "nan_grad_element", "nan_grad_during_lr_zero_step", "inf_grad_element", "neg_inf_grad_max_norm_inf",
    "decoupled_nan_grad_element",
)  # fmt: skip
HUGE_CLIPPED = "huge_finite_grads_norm_overflows"
HUGE_UNCLIPPED = "huge_finite_grads_no_clip_v_overflows"
REFUSED_CONFIG = {
    "max_grad_norm_zero": "max_grad_norm must be > 0",
    "max_grad_norm_zero_zero_grads": "max_grad_norm must be > 0",
    "max_grad_norm_negative": "max_grad_norm must be > 0",
    "max_grad_norm_nan": "max_grad_norm must be > 0",
    "lr_negative": "learning_rate must be in",
    "weight_decay_negative": r"weight_decay must be in \[0, 1e6\]",
    "decoupled_weight_decay_negative": r"weight_decay must be in \[0, 1e6\]",
    "rank_zero": "rank must be an integer >= 1",
    "d_in_zero": "d_in must be an integer in",
}
WRONG_LENGTH = ("empty_grads", "short_grads", "decoupled_short_grads", "long_grads")

ADAM_RAW = (
    "adamw_wd001", "adamw_wd01_lr01", "adamw_wd0", "adamw_betas", "adamw_wd_big_400_steps",
    "adam_l2_wd01", "adam_wd0_eps1e-3", "adam_betas_0_099",
)  # fmt: skip
# cylora has no SGD: these three runs of the reference are out of its scope.
SGD_RAW = ("sgd_plain", "sgd_momentum_wd", "sgd_nesterov")


def close(got: object, want: object, rtol: float, atol: float = 0.0) -> None:
    """Assert |got - want| <= atol + rtol * |want| elementwise; equal NaN and equal infinities are close."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, equal_nan=True)


def parameter_tolerance(case: Case) -> dict[str, float]:
    if case["weight_decay_mode"] == "decoupled" and case["num_steps"] > 500:
        return {"rtol": 1e-5, "atol": 5e-5}
    return {"rtol": 1e-5, "atol": 2e-7 + 5e-6 * case["config"]["learning_rate"]}


def config_of(case: Case, **changes: object) -> LoraTrainingConfig:
    fields = dict(case["config"])
    eps = number(fields.pop("epsilon"))
    lora = LoraConfig(rank=fields.pop("rank"), alpha=number(fields.pop("alpha")), dropout=number(fields.pop("dropout")))
    numbers = {k: v if isinstance(v, int) and not isinstance(v, bool) else number(v) for k, v in fields.items()}
    merged = {"lora_config": lora, "eps": eps, "weight_decay_mode": case["weight_decay_mode"], **numbers, **changes}
    return LoraTrainingConfig(**merged)


def adapter_of(case: Case, config: LoraTrainingConfig) -> LoraAdapter:
    adapter = LoraAdapter(case["d_in"], case["d_out"], config.lora_config, seed=0)
    adapter.a_matrix[...] = floats(case["a_initial"]).reshape(adapter.a_matrix.shape)
    adapter.b_matrix[...] = floats(case["b_initial"]).reshape(adapter.b_matrix.shape)
    return adapter


def steps_of(case: Case, adapter: LoraAdapter) -> Iterator[tuple[float, Floats, Floats]]:
    for loss, (a, b) in zip(case["loss"], golden.gradients(case), strict=True):
        yield number(loss), a.reshape(adapter.a_matrix.shape), b.reshape(adapter.b_matrix.shape)


def moments_of(trainer: LoraTrainer, adapter: LoraAdapter) -> dict[str, Floats]:
    state, cut = trainer.state_dict()["adam"], adapter.a_matrix.size
    return {"m_a": state["m"][:cut], "m_b": state["m"][cut:], "v_a": state["v"][:cut], "v_b": state["v"][cut:]}


def check_perplexity(got: float, loss: float, want: float) -> None:
    """cylora's perplexity is exp in float64; rounded to float32 it must be the reference's."""
    if math.isinf(want) and math.isfinite(loss):
        assert got > float(np.finfo(np.float32).max)
        assert math.isinf(got) is (loss > 709.0)
    elif want < 1.2e-38:
        assert abs(got - want) <= 2.0**-149
    else:
        close(got, want, rtol=5e-7)


# ---------------------------------------------------------------------- the file itself


def test_golden_file_holds_exactly_the_known_cases() -> None:
    """A new case in the file must not pass by being overlooked."""
    assert GOLDEN["format_version"] == 1
    sizes = {name: len(group) for name, group in GOLDEN.items() if isinstance(group, list)}
    assert sizes == {
        "trainer": 29, "optimizer_raw": 11, "schedules": 12, "adapter_init": 15, "apply": 7, "merge": 5,
        "clip_grad_norm": 13, "grad_norm_large": 3, "metrics": 13, "bias_correction": 3, "edge_cases": 40, "panics": 6,
    }  # fmt: skip
    listed = [*KEPT, *NONFINITE, HUGE_CLIPPED, HUGE_UNCLIPPED, *REFUSED_CONFIG, *WRONG_LENGTH]
    assert sorted(listed) == sorted(EDGE)
    assert sorted(ADAM_RAW + SGD_RAW) == sorted(case["name"] for case in GOLDEN["optimizer_raw"])
    assert [case["name"] for case in GOLDEN["optimizer_raw"] if case["optimizer"] == "sgd"] == list(SGD_RAW)
    assert len(TRAINER) == 29
    assert {case["weight_decay_mode"] for case in TRAINER.values()} == {"decoupled", "l2"}


@pytest.mark.parametrize("name", [n for n, c in {**TRAINER, **EDGE}.items() if c["grads"]["kind"] == "lcg"])
def test_golden_generator_passes_the_self_checks(name: str) -> None:
    """If the gradients were not those of the reference, every comparison below would be about something else."""
    case = {**TRAINER, **EDGE}[name]
    generator = golden.Generator(case["grads"]["seed"])
    steps = list(golden.generated_steps(case, generator))
    for part, index in (("a", 0), ("b", 1)):
        first = floats(case["grads"][f"first_step_{part}"])
        np.testing.assert_array_equal(steps[0][index][: len(first)], first)
        assert golden.crc32(steps[-1][index]) == case["grads"][f"last_step_{part}_crc32"]
    assert generator.k_sum == case["grads"]["k_sum"]


# ---------------------------------------------------------------------- training runs


@pytest.mark.parametrize("name", [*TRAINER, *KEPT])
def test_golden_trainer_run_matches(name: str) -> None:
    """Parameters, moments, rates, norms and metrics of a whole run, step by step."""
    case = TRAINER.get(name) or EDGE[name]
    config = config_of(case)
    adapter = adapter_of(case, config)
    assert adapter.scaling == number(case["scaling"])
    trainer = LoraTrainer(config)
    snapshots = {snapshot["after_steps"]: snapshot for snapshot in case["snapshots"]}
    tolerance = parameter_tolerance(case)
    compared = 0
    for i, (loss, grad_a, grad_b) in enumerate(steps_of(case, adapter)):
        kept = grad_a.tobytes(), grad_b.tobytes()
        record = trainer.step(loss, adapter, grad_a, grad_b)
        assert (grad_a.tobytes(), grad_b.tobytes()) == kept
        assert record.step == case["step"][i] == i
        assert not record.skipped
        assert record.loss == loss or (math.isnan(record.loss) and math.isnan(loss))
        close(record.learning_rate, number(case["lr"][i]), rtol=1e-6)
        if name not in TINY:
            close(record.grad_norm, number(case["grad_norm"][i]), rtol=3e-6)
        check_perplexity(record.perplexity, loss, number(case["perplexity"][i]))
        if i + 1 in snapshots:
            close(adapter.a_matrix.ravel(), floats(snapshots[i + 1]["a"]), **tolerance)
            close(adapter.b_matrix.ravel(), floats(snapshots[i + 1]["b"]), **tolerance)
            compared += 1
    assert compared == len(snapshots)
    close(adapter.a_matrix.ravel(), floats(case["a_final"]), **tolerance)
    close(adapter.b_matrix.ravel(), floats(case["b_final"]), **tolerance)
    if case["num_steps"]:
        for key, got in moments_of(trainer, adapter).items():
            want = floats(case[key])
            if key[0] == "v":
                close(got, want, rtol=5e-5, atol=1e-33)
            else:  # 2^-149 is the smallest difference there is; the moments of "subnormal_grads" are 19,338 of it
                close(got, want, rtol=1e-5, atol=max(2e-6 * float(np.abs(want).max()), 2.0**-149))
    else:
        assert trainer.state_dict()["adam"] is None
    close(trainer.current_lr(), number(case["lr_next"]), rtol=1e-6)
    close(trainer.average_loss(), number(case["average_loss"]), rtol=5e-6)
    if case["convergence_rate"] is None:
        assert trainer.convergence_rate() is None
    else:
        close(trainer.convergence_rate(), number(case["convergence_rate"]), rtol=1e-6, atol=1e-6)
    assert trainer.is_complete() is case["is_complete"]
    assert trainer.total_steps() == case["total_steps"]


def test_golden_modes_are_told_apart() -> None:
    """Swapping the weight-decay mode must miss the recorded parameters, or the comparison says nothing about it."""
    case = TRAINER["r8_wd01_lr1e-2_custom_init"]
    config = config_of(case, weight_decay_mode="decoupled")
    adapter = adapter_of(case, config)
    trainer = LoraTrainer(config)
    for loss, grad_a, grad_b in steps_of(case, adapter):
        trainer.step(loss, adapter, grad_a, grad_b)
    with pytest.raises(AssertionError):
        close(adapter.a_matrix.ravel(), floats(case["a_final"]), **parameter_tolerance(case))


# ---------------------------------------------------------------------- edge cases: where cylora differs on purpose


@pytest.mark.parametrize("name", NONFINITE)
def test_golden_nonfinite_gradient_is_refused(name: str) -> None:
    """The reference's weights are NaN for ever; cylora's step does not happen, and the good steps go on as if alone."""
    case = EDGE[name]
    config = config_of(case)
    adapter, twin = adapter_of(case, config), adapter_of(case, config)
    trainer, twin_trainer = LoraTrainer(config), LoraTrainer(config)
    refused = 0
    for loss, grad_a, grad_b in steps_of(case, adapter):
        if np.isfinite(grad_a).all() and np.isfinite(grad_b).all():
            trainer.step(loss, adapter, grad_a, grad_b)
            twin_trainer.step(loss, twin, grad_a, grad_b)
            continue
        refused += 1
        before = adapter.flat.vector.tobytes(), trainer.total_steps()
        bad = grad_a[~np.isfinite(grad_a)]
        where = "A" if bad.size else "B"
        with pytest.raises(NonFiniteGradientError, match=rf"gradient of {where} must be finite, got (nan|-?inf) at"):
            trainer.step(loss, adapter, grad_a, grad_b)
        assert (adapter.flat.vector.tobytes(), trainer.total_steps()) == before
    assert refused == 1
    assert np.isnan(floats(case["a_final"])).any() or np.isnan(floats(case["b_final"])).any()
    assert np.isfinite(adapter.flat.vector).all()
    assert adapter.flat.vector.tobytes() == twin.flat.vector.tobytes()


@pytest.mark.parametrize("name", NONFINITE)
def test_golden_nonfinite_gradient_is_skipped_and_counted(name: str) -> None:
    """With nonfinite="skip" the schedule and the history count the step, Adam does not."""
    case = EDGE[name]
    config = config_of(case, nonfinite="skip")
    adapter = adapter_of(case, config)
    trainer = LoraTrainer(config)
    alone = FlatBuffer(adapter.flat.layout)
    alone.vector[...] = adapter.flat.vector
    adam = Adam(
        alone, beta1=config.beta1, beta2=config.beta2, eps=config.eps, weight_decay=config.weight_decay,
        weight_decay_mode=config.weight_decay_mode, max_grad_norm=config.max_grad_norm,
    )  # fmt: skip
    for loss, grad_a, grad_b in steps_of(case, adapter):
        before = adapter.flat.vector.tobytes()
        record = trainer.step(loss, adapter, grad_a, grad_b)
        finite = bool(np.isfinite(grad_a).all() and np.isfinite(grad_b).all())
        assert record.skipped is not finite
        if finite:
            adam.step(np.concatenate([grad_a.ravel(), grad_b.ravel()]), record.learning_rate)
        else:
            assert adapter.flat.vector.tobytes() == before
            assert not math.isfinite(record.grad_norm)
    assert trainer.skipped_steps() == 1
    assert trainer.total_steps() == case["total_steps"]
    assert adam.t == case["total_steps"] - 1
    assert adapter.flat.vector.tobytes() == alone.vector.tobytes()


def test_golden_huge_finite_gradients_are_clipped_not_lost() -> None:
    """The reference's norm overflows and it scales the gradient to 0; cylora's is exact, the direction survives."""
    case = EDGE[HUGE_CLIPPED]
    config = config_of(case)
    adapter = adapter_of(case, config)
    trainer = LoraTrainer(config)
    rule = reference.Rule(config.learning_rate, config.beta1, config.beta2, config.eps, config.weight_decay, "l2", 1.0)
    p, m, v = adapter.flat.vector.astype(np.float64), *np.zeros((2, adapter.param_count()))
    for t, (loss, grad_a, grad_b) in enumerate(steps_of(case, adapter), start=1):
        record = trainer.step(loss, adapter, grad_a, grad_b)
        want = reference.adam_step(p, np.concatenate([grad_a.ravel(), grad_b.ravel()]), m, v, t, rule)
        p, m, v = want.p, want.m, want.v
        assert math.isinf(number(case["grad_norm"][t - 1]))
        close(record.grad_norm, want.norm, rtol=1e-15)
    close(adapter.flat.vector, p, **parameter_tolerance(case))
    with pytest.raises(AssertionError):
        close(adapter.a_matrix.ravel(), floats(case["a_final"]), **parameter_tolerance(case))


def test_golden_huge_finite_gradients_without_clipping_are_refused() -> None:
    """The reference's second moment becomes infinite and the weight never moves again; cylora refuses beyond 2^63."""
    case = EDGE[HUGE_UNCLIPPED]
    config = config_of(case)
    adapter = adapter_of(case, config)
    trainer = LoraTrainer(config)
    before = adapter.flat.vector.tobytes()
    for loss, grad_a, grad_b in steps_of(case, adapter):
        with pytest.raises(NonFiniteGradientError, match=r"norm must be at most 2\^63 .*, got 3\.162"):
            trainer.step(loss, adapter, grad_a, grad_b)
    assert trainer.total_steps() == 0
    assert adapter.flat.vector.tobytes() == before
    assert np.isinf(floats(case["v_a"])).all()


@pytest.mark.parametrize("name", TINY)
def test_golden_tiny_gradients_have_an_exact_norm(name: str) -> None:
    """The reference's squares underflow and its norm is 0; cylora's is that of the values."""
    case = EDGE[name]
    config = config_of(case)
    adapter = adapter_of(case, config)
    trainer = LoraTrainer(config)
    for i, (loss, grad_a, grad_b) in enumerate(steps_of(case, adapter)):
        assert number(case["grad_norm"][i]) == 0.0
        want = reference.norm(grad_a, grad_b)
        assert want > 0
        close(trainer.step(loss, adapter, grad_a, grad_b).grad_norm, want, rtol=1e-15)


@pytest.mark.parametrize("name", COARSE_DECAY)
def test_golden_decay_is_taken_at_its_float64_value(name: str) -> None:
    """In float32 1 - rate * weight_decay is exactly 1, or 19 % off. cylora adds rate * weight_decay * p to the update.

    So a weight is the exact result rounded once, and a weight rounded from the reference's formula is not.
    """
    config = config_of(EDGE[name])
    start = (1.0 + np.random.default_rng(5).random(100_000)).astype(np.float32)
    p, gradient = start.copy(), np.ones_like(start)
    Adam(p, learning_rate=config.learning_rate, weight_decay=config.weight_decay).step(gradient)
    rule = reference.Rule(config.learning_rate, weight_decay=config.weight_decay)
    want = reference.adam_step(start, gradient, np.zeros_like(p), np.zeros_like(p), 1, rule).p
    assert np.max(np.abs(p - want) / reference.ulp(want)) <= 0.51
    factor = np.float32(1.0) - np.float32(config.learning_rate) * np.float32(config.weight_decay)
    assert (factor == 1.0) is np.bool_(name == "decoupled_decay_rounds_to_one")
    theirs = start * factor - np.float32(config.learning_rate)
    assert np.max(np.abs(theirs - want) / reference.ulp(want)) > 0.54


def test_golden_log_every_zero_never_logs(caplog: pytest.LogCaptureFixture) -> None:
    """log_every_zero: the reference ignores the field. cylora honours it: 0 never reports, N reports every N steps."""
    case = EDGE["log_every_zero"]
    for log_every, expected in ((0, []), (2, [1])):
        config = config_of(case, log_every=log_every)
        adapter = adapter_of(case, config)
        seen: list[int] = []
        trainer = LoraTrainer(config, on_step=lambda record, seen=seen: seen.append(record.step))
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="cylora"):
            for loss, grad_a, grad_b in steps_of(case, adapter):
                trainer.step(loss, adapter, grad_a, grad_b)
        assert seen == expected
        assert len(caplog.records) == len(expected)
        assert len(trainer.training_history) == case["total_steps"]


@pytest.mark.parametrize("name", WIDE_PERPLEXITY)
def test_golden_perplexity_is_float64(name: str) -> None:
    """The reference's exp(loss) is 0 or infinite outside float32; cylora's is not before float64 ends."""
    case = EDGE[name]
    config = config_of(case)
    adapter = adapter_of(case, config)
    trainer = LoraTrainer(config)
    for loss, grad_a, grad_b in steps_of(case, adapter):
        assert trainer.step(loss, adapter, grad_a, grad_b).perplexity == math.exp(loss)


@pytest.mark.parametrize("name", REFUSED_CONFIG)
def test_golden_senseless_setting_is_refused(name: str) -> None:
    """The reference computes on: ascent, no clipping at all, an adapter without parameters."""
    case = EDGE[name]
    with pytest.raises(ConfigError, match=REFUSED_CONFIG[name]):
        adapter_of(case, config_of(case))


@pytest.mark.parametrize("name", WRONG_LENGTH)
def test_golden_gradient_of_wrong_length_is_refused(name: str) -> None:
    """The reference updates the common prefix; cylora changes nothing, in either weight-decay mode."""
    case = EDGE[name]
    config = config_of(case)
    adapter = adapter_of(case, config)
    trainer = LoraTrainer(config)
    (bad_a, bad_b), (good_a, good_b) = golden.gradients(case)
    before = adapter.flat.vector.tobytes()
    shape = rf"shape \(2, 3\), got numpy.ndarray with .* shape \({len(bad_a)},\)"
    with pytest.raises(InputError, match=rf"grad_a must be .* {shape}"):
        trainer.step(1.0, adapter, bad_a, bad_b)
    if len(bad_b) != len(good_b):
        with pytest.raises(InputError, match=rf"grad_b must be .* shape \(2, 2\), got .* shape \({len(bad_b)},\)"):
            trainer.step(1.0, adapter, good_a, bad_b)
    assert adapter.flat.vector.tobytes() == before
    assert trainer.total_steps() == 0
    assert trainer.step(1.0, adapter, good_a, good_b).step == 0


@pytest.mark.parametrize("case", GOLDEN["panics"], ids=lambda case: case["name"])
def test_golden_misuse_raises_instead_of_aborting(case: Case) -> None:
    """Where the reference aborts, or silently goes on with a part, cylora raises and nothing is changed."""
    if "first_d_in_d_out_rank" in case:
        adapters = [
            LoraAdapter(d_in, d_out, LoraConfig(rank=rank), seed=1)
            for d_in, d_out, rank in (case["first_d_in_d_out_rank"], case["second_d_in_d_out_rank"])
        ]
        trainer = LoraTrainer()
        trainer.step(1.0, adapters[0], *(np.ones_like(x) for x in (adapters[0].a_matrix, adapters[0].b_matrix)))
        before = adapters[1].flat.vector.tobytes()
        with pytest.raises(StateError, match="adapter must be the one of the first step"):
            trainer.step(1.0, adapters[1], *(np.ones_like(x) for x in (adapters[1].a_matrix, adapters[1].b_matrix)))
        assert adapters[1].flat.vector.tobytes() == before
        return
    adapter = LoraAdapter(5, 7, LoraConfig(rank=2), seed=1)
    if case["name"] == "merge_weights_too_short":
        weight = np.zeros((7, 4), np.float32)
        with pytest.raises(InputError, match=r"weight must be .* shape \(7, 5\), got float32 of shape \(7, 4\)"):
            adapter.merge_into(weight)
        assert not weight.any()
    else:
        length = {"apply_x_shorter_than_d_in": 3, "apply_x_longer_than_d_in": 8}[case["name"]]
        with pytest.raises(InputError, match=rf"x must be .* shape \(5,\) or .*, got float32 of shape \({length},\)"):
            adapter.apply(np.zeros(length, np.float32))


# ---------------------------------------------------------------------- the optimiser alone


@pytest.mark.parametrize("name", ADAM_RAW)
def test_golden_optimizer_run_matches(name: str) -> None:
    """Adam and AdamW over the concatenated tensors, without schedule or clipping."""
    case = next(c for c in GOLDEN["optimizer_raw"] if c["name"] == name)
    assert case["weight_decay_mode"] == {"adam": "l2", "adamw": "decoupled"}[case["optimizer"]]
    tensors = [floats(tensor) for tensor in case["params_initial"]]
    p = np.concatenate(tensors)
    adam = Adam(
        p,
        learning_rate=number(case["lr"]),
        beta1=number(case["beta1"]),
        beta2=number(case["beta2"]),
        eps=number(case["epsilon"]),
        weight_decay=number(case["weight_decay"]),
        weight_decay_mode=case["weight_decay_mode"],
    )
    generator, exponents = golden.Generator(case["grads"]["seed"]), case["grads"]["exponents"]
    snapshots = {snapshot["after_steps"]: snapshot["params"] for snapshot in case["snapshots"]}
    compared = 0
    for t in range(case["num_steps"]):
        exponent = exponents[t % len(exponents)]
        adam.step(np.concatenate([generator.draw(len(tensor), exponent) for tensor in tensors]))
        if t + 1 in snapshots:
            close(p, np.concatenate([floats(x) for x in snapshots[t + 1]]), rtol=1e-5, atol=5e-6)
            compared += 1
    assert compared == len(snapshots)
    assert generator.k_sum == case["grads"]["k_sum"]
    assert adam.t == case["num_steps"]
    close(p, np.concatenate([floats(x) for x in case["params_final"]]), rtol=1e-5, atol=5e-6)
    start = 0
    for want_m, want_v in zip(map(floats, case["m"]), map(floats, case["v"]), strict=True):
        part = slice(start, start + len(want_m))
        close(adam.m[part], want_m, rtol=1e-5, atol=2e-6 * float(np.abs(want_m).max()))
        close(adam.v[part], want_v, rtol=5e-5, atol=1e-33)
        start = part.stop
    assert start == p.size


def one_step(beta1: float, beta2: float, eps: float, moment: float, second: float, t: int) -> float:
    """Return by how much a zero weight moves in step t at rate 1, when moments and gradient already agree."""
    flat = FlatBuffer([("p", (1,))])
    config = LoraTrainingConfig(
        learning_rate=1.0, beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0, max_grad_norm=math.inf
    )
    moments = Moments(1)
    moments.stored_m[0], moments.stored_v[0] = moment, second
    state = AdamState(flat.layout, moments, t - 1)
    adam = Adam.for_training(flat, config, state)
    adam.step(np.full(1, moment, np.float32), 1.0)
    assert (adam.m[0], adam.v[0], adam.t) == (np.float32(moment), np.float32(second), t)
    return -float(flat.vector[0])


@pytest.mark.parametrize("case", GOLDEN["bias_correction"], ids=lambda c: f"{c['beta1']}-{c['beta2']}")
def test_golden_bias_correction_shows_in_the_step(case: Case) -> None:
    """1 - beta^t, for t up to 10^8, read off a step whose other factors are powers of two.

    A gradient of 2^-80 has a square of 0 in float32: with m = g = eps the step is 1 / bc1. With m = g = v = 1 and a
    negligible eps it is sqrt(bc2) / bc1. The step's own float32 roundings, at most 3 units of 2^-24 relative in the
    first and 5 in the second, come on top of the file's tolerance of 1.2e-7.
    """
    beta1, beta2 = number(case["beta1"]), number(case["beta2"])
    for t, want1, want2 in zip(case["t"], floats(case["bc1"]), floats(case["bc2"]), strict=True):
        bc1 = 1.0 / one_step(beta1, beta2, 2.0**-80, 2.0**-80, 0.0, t)
        close(bc1, want1, rtol=3 * 2.0**-24, atol=1.2e-7)
        close(bc1, reference.bias_correction(beta1, t), rtol=3 * 2.0**-24)
        bc2 = (one_step(beta1, beta2, 1e-30, 1.0, 1.0, t) * reference.bias_correction(beta1, t)) ** 2
        close(bc2, want2, rtol=10 * 2.0**-24, atol=1.2e-7)
        close(bc2, reference.bias_correction(beta2, t), rtol=10 * 2.0**-24)


# ---------------------------------------------------------------------- norms and clipping


@pytest.mark.parametrize("case", GOLDEN["clip_grad_norm"], ids=lambda c: f"max{c['max_norm']}-norm{c['norm']}")
def test_golden_clip_grad_norm_matches(case: Case) -> None:
    """A max_norm of 0 zeroes gradients in the reference; cylora refuses it. The norm of nothing is +0.0, not -0.0."""
    grads = [floats(tensor) for tensor in case["grads"]]
    max_norm, want = number(case["max_norm"]), number(case["norm"])
    before = [g.copy() for g in grads]
    if max_norm == 0.0:
        with pytest.raises(InputError, match=r"max_norm must be > 0 .*, got 0.0"):
            clip_grad_norm_(grads, max_norm)
        for got, kept in zip(grads, before, strict=True):
            np.testing.assert_array_equal(got, kept)
        return
    norm = clip_grad_norm_(grads, max_norm)
    close(norm, want, rtol=3e-6)
    assert math.copysign(1.0, norm) == 1.0
    for got, clipped, kept in zip(grads, case["clipped"], before, strict=True):
        close(got, floats(clipped), rtol=3e-6)
        if want <= max_norm:
            assert got.tobytes() == kept.tobytes()
    close(grad_norm(grads), number(case["norm_after"]), rtol=3e-6)


@pytest.mark.parametrize("case", GOLDEN["grad_norm_large"], ids=lambda c: str(c["n"]))
def test_golden_grad_norm_large_is_the_float64_norm(case: Case) -> None:
    """The reference's serial float32 sum is the inaccurate side: 5e-4 to the file, 1e-15 to the exact norm."""
    values = golden.Generator(case["seed"]).draw(case["n"], case["exponent"])
    got = grad_norm([values])
    close(got, number(case["norm"]), rtol=5e-4)
    close(got, reference.norm(values), rtol=1e-15)


# ---------------------------------------------------------------------- schedules, adapters, metrics


def schedule_of(case: Case) -> Callable[[int], float]:
    if case["kind"] == "cosine":
        floor = number(case["min_lr"])
        return schedule.cosine(number(case["base_lr"]), case["warmup_steps"], case["total_steps"], floor)
    assert case["kind"] in ("constant", "warmup_constant")
    return schedule.constant(number(case["base_lr"]), case.get("warmup_steps", 0))


@pytest.mark.parametrize("case", GOLDEN["schedules"], ids=lambda c: c["name"])
def test_golden_schedule_matches(case: Case) -> None:
    rate = schedule_of(case)
    top = max(number(case["base_lr"]), number(case.get("min_lr", 0.0)))
    atol = 2.5e-7 * top if case["kind"] == "cosine" else 0.0
    close([rate(step) for step in case["steps"]], floats(case["lr"]), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("case", GOLDEN["schedules"], ids=lambda c: c["name"])
def test_golden_schedule_is_what_the_trainer_uses(case: Case) -> None:
    """The config's schedule names lead to the same functions, up to the first 40 steps."""
    config = LoraTrainingConfig(
        learning_rate=number(case["base_lr"]),
        schedule="cosine" if case["kind"] == "cosine" else "constant",
        warmup_steps=case.get("warmup_steps", 0),
        max_steps=case.get("total_steps", 1000),
        min_learning_rate=number(case.get("min_lr", 0.0)),
        lora_config=LoraConfig(rank=1),
    )
    adapter = LoraAdapter(2, 2, config.lora_config, seed=0)
    trainer = LoraTrainer(config)
    used = [trainer.step(0.0, adapter, np.ones((1, 2), np.float32), np.ones((2, 1), np.float32)) for _ in range(40)]
    atol = 2.5e-7 * max(config.learning_rate, config.min_learning_rate) if case["kind"] == "cosine" else 0.0
    checked = 0
    for step, want in zip(case["steps"], floats(case["lr"]), strict=True):
        if step < 40:
            close(used[step].learning_rate, want, rtol=1e-6, atol=atol)
            checked += 1
    assert checked >= 2


@pytest.mark.parametrize("case", GOLDEN["adapter_init"], ids=lambda c: f"{c['d_in']}-{c['d_out']}-{c['rank']}")
def test_golden_adapter_init_differs_only_in_the_draw(case: Case) -> None:
    """Counts, scaling and the zero B are the reference's. A is drawn as PEFT does, from a seed.

    The reference derives A from the shape alone, uniform within sqrt(2 / d_in): equal shapes start equal. cylora's
    bound is 1 / sqrt(d_in), and the seed decides. Shapes without parameters are refused.
    """
    d_in, d_out, rank = case["d_in"], case["d_out"], case["rank"]
    if 0 in (d_in, d_out, rank):
        with pytest.raises(ConfigError, match=r"(rank|d_in|d_out) must be an integer .*, got 0"):
            LoraAdapter(d_in, d_out, LoraConfig(rank=rank, alpha=number(case["alpha"])), seed=0)
        return
    config = LoraConfig(rank=rank, alpha=number(case["alpha"]))
    adapter = LoraAdapter(d_in, d_out, config, seed=7)
    assert adapter.scaling == number(case["scaling"])
    assert adapter.param_count() == case["param_count"]
    assert adapter.memory_bytes() == case["memory_bytes"]
    assert adapter.a_matrix.shape == (rank, d_in)
    assert adapter.a_matrix.size == case["a_len"]
    assert adapter.b_matrix.shape == (d_out, rank)
    assert adapter.b_matrix.size == case["b_len"]
    assert case["b_all_positive_zero"]
    assert not adapter.b_matrix.view(np.uint32).any()
    bound = 1.0 / math.sqrt(d_in)
    assert np.abs(adapter.a_matrix).max() <= np.float32(bound)
    assert golden.crc32(adapter.a_matrix.ravel()) != case["a_crc32"]
    assert np.array_equal(adapter.a_matrix, LoraAdapter(d_in, d_out, config, seed=7).a_matrix)
    assert not np.array_equal(adapter.a_matrix, LoraAdapter(d_in, d_out, config, seed=8).a_matrix)
    if case["a_len"] >= 4096:
        spread = adapter.a_matrix.std() * math.sqrt(3.0) / bound
        assert abs(spread - 1.0) < 0.05
        assert np.abs(adapter.a_matrix).max() > 0.99 * bound


def filled_adapter(case: Case) -> LoraAdapter:
    config = LoraConfig(rank=case["rank"], alpha=number(case["alpha"]))
    adapter = LoraAdapter(case["d_in"], case["d_out"], config, seed=0)
    adapter.a_matrix[...] = floats(case["a"]).reshape(adapter.a_matrix.shape)
    adapter.b_matrix[...] = floats(case["b"]).reshape(adapter.b_matrix.shape)
    assert adapter.scaling == number(case["scaling"])
    return adapter


@pytest.mark.parametrize("case", GOLDEN["apply"], ids=lambda c: f"{c['d_in']}-{c['rank']}-x{len(c['x'])}")
def test_golden_apply_matches(case: Case) -> None:
    """The reference fills up or cuts an x of the wrong length, and takes rank 0; cylora refuses both."""
    if case["rank"] == 0:
        with pytest.raises(ConfigError, match="rank must be an integer >= 1, got 0"):
            LoraConfig(rank=0)
        return
    adapter, x = filled_adapter(case), floats(case["x"])
    if x.size != case["d_in"]:
        with pytest.raises(InputError, match=rf"x must be .* shape \({case['d_in']},\)"):
            adapter.apply(x)
        return
    terms = adapter.scaling * (np.abs(adapter.b_matrix) @ (np.abs(adapter.a_matrix) @ np.abs(x)))
    want = floats(case["y"])
    for got in (adapter.apply(x), adapter.apply(np.stack([x, x]))[1]):
        assert got.dtype == np.float32
        assert np.all(np.abs(got.astype(np.float64) - want) <= 1e-6 * terms)


@pytest.mark.parametrize("case", GOLDEN["merge"], ids=lambda c: f"{c['d_in']}-{c['rank']}")
def test_golden_merge_matches(case: Case) -> None:
    if case["rank"] == 0:
        with pytest.raises(ConfigError, match="rank must be an integer >= 1, got 0"):
            LoraConfig(rank=0)
        return
    adapter = filled_adapter(case)
    initial = floats(case["w_initial"]).reshape(case["d_out"], case["d_in"])
    weight = initial.copy()
    adapter.merge_into(weight)
    close(weight.ravel(), floats(case["w_merged"]), rtol=1e-5, atol=2e-6)
    adapter.unmerge_from(weight)
    close(weight, initial, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", GOLDEN["metrics"], ids=lambda c: f"{len(c['losses'])}-{c['losses'][:1]}")
def test_golden_metrics_match(case: Case) -> None:
    """cylora's sums and quotients are float64: what overflows float32 in the reference stays finite here."""
    history = TrainingHistory()
    losses = [number(loss) for loss in case["losses"]]
    for i in range(len(losses) + 1):
        if i:
            record = history.append(loss=losses[i - 1], learning_rate=0.0, grad_norm=0.0)
            check_perplexity(record.perplexity, losses[i - 1], number(case["perplexity"][i - 1]))
        average = number(case["average_loss_after"][i])
        if math.isinf(average) and all(map(math.isfinite, losses)):
            close(history.average_loss(), math.fsum(losses[:i]) / i, rtol=1e-15)
        else:
            close(history.average_loss(), average, rtol=5e-6)
        rate = case["convergence_rate_after"][i]
        if rate is None:
            assert history.convergence_rate() is None
        elif math.isinf(number(rate)) and all(map(math.isfinite, losses)):
            close(history.convergence_rate(), (losses[0] - losses[i - 1]) / losses[0], rtol=1e-15)
        else:
            close(history.convergence_rate(), number(rate), rtol=1e-6, atol=1e-6)
