"""LoraConfig and LoraTrainingConfig: the defaults, the rule of each field, and the message when it is broken."""

import copy
import dataclasses
import math
import os
import pickle
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from training import fingerprint, make_adapter, make_pair

import cylora
from cylora import Adam, ConfigError, CyloraError, LoraConfig, LoraTrainer, LoraTrainingConfig, step_many
from cylora.config import thread_count

NAN, INF = math.nan, math.inf

INTEGER, REAL = "must be an integer", "must be"
BAD_LORA = [
    *[("rank", x, "rank must be an integer >= 1") for x in (0, -1, 2**63)],
    *[("rank", x, "rank must be an integer, got") for x in (1.0, "8", None, True, np.True_, [1], 1j)],
    *[("alpha", x, r"alpha must be in \(0, 1e6\]") for x in (0, 1.1e6, -1.0, NAN, INF, "1", None, True, 1j, b"1")],
    *[("dropout", x, r"dropout must be in \[0, 1\)") for x in (-1e-9, 1, 1.5, NAN, "0", None, False, np.array("x"))],
    *[
        ("target_modules", x, "target_modules must be a non-empty sequence of non-empty names, got")
        for x in ((), [], "q_proj", ["q", ""], ["q", 3], 5, None, b"q", [None])
    ],
    ("target_modules", ("q", "k", "q"), "target_modules must not repeat a name, got"),
    *[("use_rslora", x, "use_rslora must be True or False, got") for x in (0, 1, "yes", None)],
]

RATE = r"must be in \[0, 1e6\]"
BETA = r"must be in \[0, 1\)"
BAD_TRAINING = [
    *[("lora_config", x, "lora_config must be a LoraConfig, got") for x in ({}, None, LoraConfig)],
    *[("learning_rate", x, f"learning_rate {RATE}") for x in (-1e-9, 1.1e6, NAN, INF, "1", None, True, 1j)],
    *[("min_learning_rate", x, f"min_learning_rate {RATE}") for x in (-1, 2e6, NAN, [])],
    *[("weight_decay", x, f"weight_decay {RATE}") for x in (-1, 1.1e6, NAN, INF, None, "0")],
    *[("max_grad_norm", x, r"max_grad_norm must be > 0 \(inf turns clipping off\)") for x in (0, -1, NAN, "1", None)],
    *[("beta1", x, f"beta1 {BETA}") for x in (1, -0.1, NAN, None)],
    *[("beta2", x, r"beta2 must be in \[0.5, 1\)") for x in (0.0, 0.4999, 1.0, 2, NAN, "0.9")],
    *[("eps", x, "eps must be finite and >= 1e-30") for x in (0, 1e-31, -1, NAN, INF, None)],
    *[(name, -1, f"{name} must be an integer >= 0") for name in ("warmup_steps", "max_steps", "log_every")],
    *[(name, 2.0, f"{name} must be an integer, got") for name in ("warmup_steps", "max_steps", "log_every")],
    *[(name, 0, f"{name} must be an integer >= 1") for name in ("decay_steps", "history_limit")],
    *[(name, True, f"{name} must be an integer, got") for name in ("decay_steps", "history_limit")],
    *[("schedule", x, "schedule must be one of 'constant', 'linear', 'cosine', 'warm") for x in ("cos", 3, None, [])],
    *[("weight_decay_mode", x, "weight_decay_mode must be one of 'decoupled', 'l2', got") for x in ("L2", None, 0)],
    *[
        ("state_dtype", x, "state_dtype must be one of 'float32', 'bfloat16', '8bit', got")
        for x in ("float16", "FLOAT32", "8-bit", None, 8, np.float32, ["8bit"])
    ],
    *[("threads", x, r"threads \(if not None\) must be an integer in \[1, 64\], got") for x in (0, -1, 65, 2**70)],
    *[("threads", x, r"threads \(if not None\) must be an integer, got") for x in (1.0, "2", True, NAN, [1])],
    *[("nonfinite", x, "nonfinite must be one of 'raise', 'skip', got") for x in ("ignore", None, True)],
    *[("lora_plus_ratio", x, r"lora_plus_ratio must be in \(0, 1e6\], got") for x in (0, -1, 1.1e6, NAN, None, "4")],
    *[("train_a", x, "train_a must be True or False, got") for x in (0, 1, None, "no")],
    *[("ema_decay", x, r"ema_decay \(if not None\) must be in \[0, 1\), got") for x in (1, -0.1, NAN, "0.9", True)],
    *[
        ("divergence", x, "divergence must be one of 'ignore', 'raise', 'skip', 'rollback', got")
        for x in ("warn", None, True)
    ],
    *[("divergence_factor", x, "divergence_factor must be finite and > 1, got") for x in (1, 0, NAN, INF, None)],
    *[("divergence_window", x, "divergence_window must be an integer") for x in (0, 65537, 2.0, None)],
    *[("rollback_every", x, "rollback_every must be an integer") for x in (0, "1", None)],
    *[("early_stopping_patience", x, "early_stopping_patience must be an integer") for x in (0, "1", 1.5)],
    *[("early_stopping_min_delta", x, "early_stopping_min_delta must be finite and >= 0") for x in (-1, NAN, INF)],
]


def test_defaults_are_those_of_the_field() -> None:
    lora, training = LoraConfig(), LoraTrainingConfig()
    assert lora.to_dict() == {
        "rank": 8, "alpha": 8.0, "dropout": 0.0, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    assert training.to_dict() == {
        "lora_config": lora.to_dict(), "learning_rate": 3e-4, "weight_decay": 0.01, "max_grad_norm": 1.0,
        "warmup_steps": 100, "max_steps": 1000, "log_every": 10, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8,
        "weight_decay_mode": "decoupled", "schedule": "constant", "min_learning_rate": 0.0, "decay_steps": None,
        "nonfinite": "raise", "history_limit": None, "state_dtype": "float32", "threads": None,
        "lora_plus_ratio": 1.0, "train_a": True, "rate_pattern": {}, "weight_decay_pattern": {}, "ema_decay": None,
        "divergence": "ignore", "divergence_factor": 10.0, "divergence_window": 50, "rollback_every": 100,
        "early_stopping_patience": None, "early_stopping_min_delta": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), BAD_LORA, ids=str)
def test_lora_config_refuses_by_name(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        LoraConfig(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(("name", "value", "message"), BAD_TRAINING, ids=str)
def test_training_config_refuses_by_name(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraTrainingConfig(**{name: value})


def test_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, CyloraError)


def test_numbers_of_any_kind_become_plain_ones() -> None:
    """NumPy scalars and fractions are numbers; what is stored must serialise like a plain one."""
    lora = LoraConfig(rank=np.int64(4), alpha=Fraction(1, 2), dropout=np.float32(0.25), target_modules=iter("qk"))
    training = LoraTrainingConfig(learning_rate=np.array(1e-3), max_steps=np.uint8(9), decay_steps=np.int16(3), eps=1)
    assert [type(x) for x in (lora.rank, lora.alpha, lora.dropout)] == [int, float, float]
    assert [type(x) for x in (training.learning_rate, training.max_steps, training.eps)] == [float, int, float]
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (4, 0.5, 0.25, ("q", "k"))
    assert training.decay_steps == 3


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
def test_state_dtypes_are_three(state_dtype: str) -> None:
    config = LoraTrainingConfig(state_dtype=state_dtype)
    assert config.state_dtype == config.to_dict()["state_dtype"] == state_dtype
    assert LoraTrainingConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("threads", [None, 1, 64, np.int8(3)])
def test_threads_are_one_to_64_or_left_open(threads: object) -> None:
    config = LoraTrainingConfig(threads=threads)
    assert config.threads == threads
    assert type(config.threads) is (type(None) if threads is None else int)
    assert LoraTrainingConfig.from_dict(config.to_dict()) == config


def test_extreme_values_within_the_rules_are_accepted() -> None:
    config = LoraTrainingConfig(
        learning_rate=1e6, min_learning_rate=1e6, weight_decay=2e-6, max_grad_norm=INF, beta1=0, beta2=0.5, eps=1e-30,
        warmup_steps=0, max_steps=2**62, log_every=0, history_limit=1,
    )  # fmt: skip
    assert config.max_grad_norm == INF
    assert config.max_steps == 2**62


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        (LoraConfig(rank=8, alpha=16), 2.0),
        (LoraConfig(rank=16, alpha=8), 0.5),
        (LoraConfig(rank=16, alpha=8, use_rslora=True), 2.0),
        (LoraConfig(rank=2, alpha=1, use_rslora=True), 1 / math.sqrt(2)),
    ],
)
def test_scaling_is_alpha_over_rank_or_its_root(config: LoraConfig, scaling: float) -> None:
    assert config.scaling == scaling


def test_configs_are_frozen_keyword_only_and_slotted() -> None:
    config = LoraTrainingConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.learning_rate = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        LoraConfig(8)  # type: ignore[misc]
    assert not hasattr(config, "__dict__")


def test_configs_compare_hash_copy_and_pickle_by_value() -> None:
    config = LoraTrainingConfig(lora_config=LoraConfig(rank=3), max_grad_norm=INF)
    for twin in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        LoraTrainingConfig.from_dict(config.to_dict()),
    ):
        assert twin == config
        assert hash(twin) == hash(config)
    assert config != LoraTrainingConfig()


def test_replace_validates_again() -> None:
    with pytest.raises(ConfigError, match="rank must be"):
        dataclasses.replace(LoraConfig(), rank=0)


@pytest.mark.parametrize("cls", [LoraConfig, LoraTrainingConfig])
def test_from_dict_refuses_unknown_keys_and_lists_the_known(cls: type) -> None:
    with pytest.raises(ConfigError, match=rf"{cls.__name__} has no field 'Rank'; its fields are \w+, ") as caught:
        cls.from_dict({"Rank": 3})
    for field in dataclasses.fields(cls):
        assert field.name in str(caught.value)
    with pytest.raises(ConfigError, match="has no field 3;"):
        cls.from_dict({3: 3})


@pytest.mark.parametrize("values", [None, [("rank", 3)], "rank", 3])
def test_from_dict_refuses_what_is_no_mapping(values: object) -> None:
    with pytest.raises(ConfigError, match="LoraConfig must be made from a mapping of field names, got"):
        LoraConfig.from_dict(values)


def test_from_dict_takes_the_lora_config_nested_or_made() -> None:
    assert LoraTrainingConfig.from_dict({"lora_config": {"rank": 2}}).lora_config == LoraConfig(rank=2)
    assert LoraTrainingConfig.from_dict({"lora_config": LoraConfig(rank=2)}).lora_config == LoraConfig(rank=2)
    with pytest.raises(ConfigError, match="LoraConfig has no field 'r';"):
        LoraTrainingConfig.from_dict({"lora_config": {"r": 2}})


def test_from_dict_leaves_its_argument_alone() -> None:
    values = {"lora_config": {"rank": 2}}
    LoraTrainingConfig.from_dict(values)
    assert values == {"lora_config": {"rank": 2}}


def test_a_callable_schedule_is_kept_as_it_is() -> None:
    def flat(step: int) -> float:
        return 0.5

    config = LoraTrainingConfig(schedule=flat)
    assert config.schedule is flat
    assert config.to_dict()["schedule"] is flat


# ---------------------------------------------------------------- CYLORA_NUM_THREADS


@pytest.mark.parametrize(
    ("text", "count"),
    [(None, 1), ("", 1), ("  ", 1), ("1", 1), ("64", 64), (" 3\n", 3), ("007", 7), ("0" * 5000 + "12", 12)],
)
def test_environment_decides_threads_that_no_one_gave(
    monkeypatch: pytest.MonkeyPatch, text: str | None, count: int
) -> None:
    monkeypatch.delenv("CYLORA_NUM_THREADS", raising=False)
    if text is not None:
        monkeypatch.setenv("CYLORA_NUM_THREADS", text)
    assert thread_count(None) == count
    assert type(thread_count(None)) is int
    assert thread_count(5) == 5


BAD_COUNTS = (
    "0", "000", "65", "-1", "+4", "1.5", "1e1", "four", "2 2", "0x2", "1_0", "\u0664", "\u00b2", "0000000640",
    "9" * 5000,
)  # fmt: skip


@pytest.mark.parametrize("text", BAD_COUNTS, ids=lambda text: ascii(text[:12]))
def test_environment_that_is_no_number_of_threads_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CYLORA_NUM_THREADS", text)
    with pytest.raises(ConfigError) as caught:
        thread_count(None)
    assert str(caught.value) == f"CYLORA_NUM_THREADS must be an integer in 1..64, got {text!r}"
    assert thread_count(64) == 64, "a number that was given comes first"


def test_environment_is_read_where_an_optimizer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a config, which must mean the same everywhere, nor by a trainer without an adapter, nor by later steps."""
    monkeypatch.setenv("CYLORA_NUM_THREADS", "many")
    message = "CYLORA_NUM_THREADS must be an integer in 1..64, got 'many'"
    config = LoraTrainingConfig(warmup_steps=0)
    assert config.threads is None
    assert config.to_dict()["threads"] is None
    trainer, adapter = LoraTrainer(config), make_adapter()
    before = fingerprint(trainer, adapter)
    for call in (
        lambda: trainer.step(1.0, adapter, *make_pair()),
        lambda: trainer.accumulate(1.0, adapter, *make_pair()),
        lambda: Adam(np.ones(3, np.float32)),
        lambda: step_many([]),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    assert fingerprint(trainer, adapter) == before
    Adam(np.ones(3, np.float32), threads=2).step(np.ones(3, np.float32))
    LoraTrainer(LoraTrainingConfig(threads=1)).step(1.0, make_adapter(), *make_pair())
    assert step_many([], threads=1) == []

    monkeypatch.setenv("CYLORA_NUM_THREADS", "2")
    trainer.step(1.0, adapter, *make_pair())
    monkeypatch.setenv("CYLORA_NUM_THREADS", "many")
    trainer.step(1.0, adapter, *make_pair())
    before = fingerprint(trainer, adapter)
    with pytest.raises(ConfigError, match=message):
        trainer.load_state_dict(trainer.state_dict())  # it makes a new optimizer
    assert fingerprint(trainer, adapter) == before
    trainer.step(1.0, adapter, *make_pair())
    assert trainer.total_steps() == 3


def test_environment_does_not_stop_the_import() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(cylora.__file__).parent.parent), "CYLORA_NUM_THREADS": "many"}
    command = [sys.executable, "-c", "import cylora, numpy; print(cylora.grad_norm([numpy.ones(4, 'f4')]))"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("2.0\n", "", 0)
