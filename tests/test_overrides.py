"""AdamParams: a step with overrides is the step of a trainer configured so, and the next one is as ever."""

import math
from typing import Any

import numpy as np
import pytest
from training import fill, fingerprint, make_adapter, make_pair, make_set, make_trainer, same_bits

from cylora import AdamParams, ConfigError, Gradients, InputError, LoraTrainer, StateError

CONFIG: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 1.0, "warmup_steps": 3}
OVERRIDES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rate": ({"learning_rate": 3e-3}, {"learning_rate": 3e-3, "warmup_steps": 0}),
    "rate 0": ({"learning_rate": 0.0}, {"learning_rate": 0.0, "warmup_steps": 0}),
    "beta1": ({"beta1": 0.5}, {"beta1": 0.5}),
    "beta2": ({"beta2": 0.95}, {"beta2": 0.95}),
    "eps": ({"eps": 1e-12}, {"eps": 1e-12}),
    "decay": ({"weight_decay": 0.0}, {"weight_decay": 0.0}),
    "clip": ({"grad_clip_norm": 0.25}, {"max_grad_norm": 0.25}),
    "no clip": ({"grad_clip_norm": 0.0}, {"max_grad_norm": math.inf}),
    "clip at inf": ({"grad_clip_norm": math.inf}, {"max_grad_norm": math.inf}),
    "all, as Tinker's defaults are": (
        {
            "learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0, "grad_clip_norm": 0.0
        },
        {
            "learning_rate": 1e-4, "warmup_steps": 0, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0,
            "max_grad_norm": math.inf,
        },
    ),
    "none": ({}, {}),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "l2": {"weight_decay_mode": "l2"},
    "8bit": {"state_dtype": "8bit"},
    "parts": {"lora_plus_ratio": 4.0, "weight_decay_pattern": {"k": 0.3}, "rate_pattern": {"out.proj": 0}},
    "everything": {"train_a": False, "ema_decay": 0.9, "divergence": "rollback", "divergence_window": 3},
}


def moved_to(config: dict[str, Any], trainer: LoraTrainer, adapters: Any) -> tuple[LoraTrainer, Any]:
    """Return a trainer of another config in the same state, and adapters with the same parameters."""
    other, again = make_trainer(**config), make_set()
    again.flat.vector[...] = adapters.flat.vector
    other.load_state_dict(trainer.state_dict())
    return other, again


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("which", OVERRIDES)
def test_a_step_with_overrides_is_that_of_a_trainer_configured_so(which: str, options: str) -> None:
    given, meant = OVERRIDES[which]
    config = CONFIG | OPTIONS[options]
    trainer, adapters = make_trainer(**config), make_set()
    gradients = Gradients(adapters)
    for seed in range(5):
        trainer.step(1.0, adapters, fill(gradients, seed))
    before = adapters.flat.vector.copy()
    for seed in range(5, 8):  # three times over: with overrides, then as configured
        other, again = moved_to(config | meant, trainer, adapters)
        fill(gradients, seed)
        record = trainer.step_with(AdamParams(**given), 1.0, adapters, gradients)
        assert record == other.step(1.0, again, gradients)
        assert fingerprint(trainer, adapters) == fingerprint(other, again)
        plain, again = moved_to(config, trainer, adapters)
        assert trainer.step(1.0, adapters, gradients) == plain.step(1.0, again, gradients)
        assert fingerprint(trainer, adapters) == fingerprint(plain, again)
    assert not same_bits(before, adapters.flat.vector)


def test_overrides_go_with_a_pair_of_gradients() -> None:
    (trainer, adapter), (other, again) = ((make_trainer(**CONFIG), make_adapter()) for _ in range(2))
    params = AdamParams(learning_rate=0.5)
    trainer.step_with(params, 1.0, adapter, *make_pair())
    other.step_with(params, 1.0, again, np.concatenate([x.ravel() for x in make_pair()]))
    assert trainer.training_history[0].learning_rate == 0.5
    assert fingerprint(trainer, adapter) == fingerprint(other, again)


@pytest.mark.parametrize("which", OVERRIDES)
def test_optim_step_is_a_step_of_what_was_accumulated(which: str) -> None:
    given, _ = OVERRIDES[which]
    runs = []
    for way in range(3):
        trainer, adapters = make_trainer(**CONFIG), make_set()
        gradients = Gradients(adapters)
        trainer.step(1.0, adapters, fill(gradients, 0))
        for seed in range(1, 4):
            trainer.accumulate(float(seed), adapters, fill(gradients, seed), weight=seed)
        if way == 0:
            record = trainer.optim_step(**given)
        elif way == 1:
            record = trainer.optim_step(AdamParams(**given))
        else:
            record = trainer.step_accumulated(adapters, AdamParams(**given))
        runs.append((record, fingerprint(trainer, adapters)))
    assert runs[0] == runs[1] == runs[2]


def test_optim_step_without_arguments_is_step_accumulated() -> None:
    runs = []
    for verb in ("optim_step", "step_accumulated"):
        trainer, adapter = make_trainer(**CONFIG), make_adapter()
        trainer.accumulate(1.0, adapter, *make_pair())
        runs.append((getattr(trainer, verb)(), fingerprint(trainer, adapter)))
    assert runs[0] == runs[1]
    with pytest.raises(StateError, match="step_accumulated needs at least one accumulated micro-batch, got none"):
        trainer.optim_step(learning_rate=1e-3)


# ------------------------------------------------------------------ refusals


BAD = [
    (lambda t: t.optim_step(AdamParams(), beta1=0.5), "params or constants must be given, not both, got beta1 too"),
    (lambda t: t.optim_step(lr=0.5), "optim_step takes learning_rate, beta1, beta2, .*grad_clip_norm, got 'lr'"),
    (lambda t: t.optim_step({"beta1": 0.5}), "overrides must be AdamParams, got dict"),
    (lambda t: t.optim_step(learning_rate=100.0), r"learning rate must be a number in \[0, 20\] \(2 / weight_decay\)"),
    (
        lambda t: t.optim_step(learning_rate=3.0, weight_decay=1.0),
        r"learning rate must be a number in \[0, 2\] \(2",
    ),
    (
        lambda t: t.optim_step(weight_decay=1e3),
        "learning rate must be at most 0.002 with this step's weight_decay",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_what_does_not_go_is_refused_and_changes_nothing(call: Any, message: str) -> None:
    (trainer, adapter), (twin, other) = (
        (make_trainer(**CONFIG | {"warmup_steps": 0}), make_adapter()) for _ in range(2)
    )
    for one, its in ((trainer, adapter), (twin, other)):
        one.step(1.0, its, *make_pair())
        one.accumulate(1.0, its, *make_pair(1))
    before = fingerprint(trainer, adapter)
    with pytest.raises(InputError, match=message):
        call(trainer)
    assert fingerprint(trainer, adapter) == before
    assert trainer.step_accumulated() == twin.step_accumulated()
    assert fingerprint(trainer, adapter) == fingerprint(twin, other)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_refused_step_with_overrides_leaves_the_next_as_ever(value: float) -> None:
    (trainer, adapter), (twin, other) = ((make_trainer(**CONFIG), make_adapter()) for _ in range(2))
    params = AdamParams(learning_rate=0.3, beta1=0.1, beta2=0.6, eps=1.0, weight_decay=1.0, grad_clip_norm=1e-3)
    for seed in range(4):
        gradient = np.full(adapter.param_count(), value, np.float32)
        with pytest.raises(InputError, match="must be finite"):
            trainer.step_with(params, 1.0, adapter, gradient)
        assert trainer.step(1.0, adapter, *make_pair(seed)) == twin.step(1.0, other, *make_pair(seed))
    assert fingerprint(trainer, adapter) == fingerprint(twin, other)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("learning_rate", -1, r"learning_rate must be in \[0, 1e6\], got -1"),
        ("beta1", 1, r"beta1 must be in \[0, 1\), got 1"),
        ("beta2", 0.4, r"beta2 must be in \[0.5, 1\), got 0.4"),
        ("eps", 0, "eps must be finite and >= 1e-30, got 0"),
        ("weight_decay", "x", r"weight_decay must be in \[0, 1e6\], got 'x'"),
        ("grad_clip_norm", -1, r"grad_clip_norm must be >= 0 \(0 turns clipping off\), got -1"),
        ("grad_clip_norm", math.nan, "grad_clip_norm must be >= 0"),
    ],
)
def test_values_are_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdamParams(**{field: value})


def test_params_are_frozen_equal_by_value_and_plain() -> None:
    params = AdamParams(learning_rate=np.float32(0.5), beta1=0)
    assert params == AdamParams(learning_rate=0.5, beta1=0.0)
    assert hash(params) == hash(AdamParams(learning_rate=0.5, beta1=0.0))
    assert type(params.learning_rate) is type(params.beta1) is float
    assert params.eps is None
    with pytest.raises(AttributeError):
        params.eps = 1.0  # type: ignore[misc]
