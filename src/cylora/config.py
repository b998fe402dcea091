"""LoraTrainingConfig: how a training goes, frozen, keyword-only, and valid from the moment it exists."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from cylora import checks
from cylora.errors import ConfigError
from cylora.lora_config import LoraConfig, Validated, known_keys, plain_fields
from cylora.patterns import Pattern

__all__ = [
    "DIVERGENCE_POLICIES",
    "MAX_LEARNING_RATE",
    "MAX_RATE_TIMES_DECAY",
    "STATE_DTYPES",
    "LoraConfig",
    "LoraTrainingConfig",
    "adam_constant",
    "thread_count",
]

MAX_LEARNING_RATE = 1e6
MAX_RATE_TIMES_DECAY = 2.0
MAX_FACTOR = 1e6  # on a rate
MAX_DECAY = 1e6  # times the largest rate it must stay far inside float32
# Below this, eps times the smallest bias correction would leave float32 and a zero gradient could divide 0 by 0.
MIN_EPS = 1e-30
# Below this, an increment of v is mostly the old v with its sign changed, and v keeps that one's rounding error.
MIN_BETA2 = 0.5

SCHEDULES = ("constant", "linear", "cosine", "warmup_stable_decay")
WEIGHT_DECAY_MODES = ("decoupled", "l2")
NONFINITE_POLICIES = ("raise", "skip")
DIVERGENCE_POLICIES = ("ignore", "raise", "skip", "rollback")
MAX_WINDOW = 2**16  # losses and norms that are kept
STATE_DTYPES = ("float32", "bfloat16", "8bit")
MAX_THREADS = 64
# What each of Adam's constants must be, in words and as a test.
ADAM_RULES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": ("in [0, 1e6]", lambda x: 0 <= x <= MAX_LEARNING_RATE),
    "min_learning_rate": ("in [0, 1e6]", lambda x: 0 <= x <= MAX_LEARNING_RATE),
    "beta1": ("in [0, 1)", lambda x: 0 <= x < 1),
    "beta2": ("in [0.5, 1)", lambda x: MIN_BETA2 <= x < 1),
    "weight_decay": ("in [0, 1e6]", lambda x: 0 <= x <= MAX_DECAY),
    "eps": ("finite and >= 1e-30", checks.finite_at_least(MIN_EPS)),
}


def thread_count(threads: int | None) -> int:
    """Return ``threads``, or where that is None CYLORA_NUM_THREADS, or 1, if it is valid; else a ConfigError."""
    if threads is not None:
        return checks.integer("threads (if not None)", threads, 1, MAX_THREADS)
    text = os.environ.get("CYLORA_NUM_THREADS", "").strip()
    if not text:
        return 1
    digits = text.lstrip("0")[:3]  # enough to tell, and never too many for int()
    if not (text.isascii() and text.isdigit() and digits and int(digits) <= MAX_THREADS):
        raise ConfigError(f"CYLORA_NUM_THREADS must be an integer in 1..{MAX_THREADS}, got {text!r}")
    return int(digits)


def adam_constant(name: str, value: Any) -> float:
    """Return the value of one of Adam's constants, or raise ConfigError."""
    return checks.real(name, value, *ADAM_RULES[name])


def _decay(name: str, value: Any) -> float:
    return checks.real(name, value, *ADAM_RULES["weight_decay"])


def _factor(name: str, value: Any) -> float:
    return checks.real(name, value, "in [0, 1e6]", lambda x: 0 <= x <= MAX_FACTOR)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraTrainingConfig(Validated):
    """How a `LoraTrainer` trains.

    Parameters
    ----------
    lora_config : LoraConfig
    learning_rate : float in [0, 1e6]
        Peak rate. A rate below 1e-18 counts as 0.
    weight_decay : float in [0, 1e6]
    max_grad_norm : float > 0
        Global norm above which gradients are scaled down; ``inf`` turns clipping off.
    warmup_steps, max_steps : int >= 0
        The rate rises linearly from 0 over ``warmup_steps``. ``max_steps`` makes ``is_complete()`` true and is where
        decaying schedules end; further steps are allowed.
    log_every : int >= 0
        Every so many steps the record goes to the logger ``cylora`` and to ``on_step``; 0 means never.
    beta1 : float in [0, 1)
    beta2 : float in [0.5, 1)
    eps : float >= 1e-30
        Outside the root, as in Kingma & Ba 2015, algorithm 1.
    weight_decay_mode : "decoupled" or "l2"
        AdamW (Loshchilov & Hutter 2019), or the decay added to the clipped gradient.
    schedule : "constant", "linear", "cosine", "warmup_stable_decay", or a callable step -> rate
        See `cylora.schedule`. A callable is called once before each step with its 0-based index.
    min_learning_rate : float in [0, 1e6]
        Where decaying schedules end.
    decay_steps : int >= 1 or None
        Length of the final decay of "warmup_stable_decay"; None is a tenth of ``max_steps``, at least 1.
    nonfinite : "raise" or "skip"
        What a non-finite gradient does: raise NonFiniteGradientError, or count a step that changes nothing.
    history_limit : int >= 1 or None
        How many records the history keeps; its totals stay those of all steps. None keeps all.
    state_dtype : "float32", "bfloat16" or "8bit"
        How Adam's m and v are stored: in 8, 4 or 2.01 bytes for each parameter. The arithmetic is float32 all the same.
        The compact forms round stochastically (unbiased, the same bits on any machine and number of threads): a step's
        direction carries noise of a few per cent with bfloat16 and of some 10 % with 8 bits, which averages out.
        They are faster than float32 only where the state does not fit the caches.
    threads : int in 1..64, or None
        Most threads that one step may use, its caller's included; it uses fewer where the work does not outweigh the
        hand-off. None: the environment variable CYLORA_NUM_THREADS, or 1. No bit of any result depends on it.
    lora_plus_ratio : float in (0, 1e6]
        LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B's rate is this times A's.
    train_a : bool
        False is LoRA-FA (Zhang et al. 2023, arXiv:2308.03303), in its plain form: A stays as it was drawn, takes no
        memory for moments, and its gradient is neither read nor part of the norm. (PEFT's LoraFA also corrects B's
        gradient by the pseudo-inverse of A A^T; this does not.)
    rate_pattern : mapping of str to float in [0, 1e6]
        Factors on the rate of some modules, by name as in `LoraConfig.rank_pattern`. 0 freezes a module as ``train_a``
        does A.
    weight_decay_pattern : mapping of str to float in [0, 1e6]
        Weight decays of some modules, instead of ``weight_decay``.
    ema_decay : float in [0, 1) or None
        Keep an exponential moving average of the parameters: after each step it moves by 1 - ema_decay of the way
        towards them, from where they were before the first one. 4 more bytes for each parameter.
    divergence : "ignore", "raise", "skip" or "rollback"
        What happens to a step whose loss, or gradient norm, is more than ``divergence_factor`` times its median over
        the last ``divergence_window`` steps that were applied (once there are as many; a loss only where the median is
        above 0), or whose loss is not finite: raise DivergenceError, record a step that changes nothing, or also put
        parameters, moments and average back to the last good state.
    divergence_factor : float > 1
    divergence_window : int in 1..65536
    rollback_every : int >= 1
        With "rollback", a good state is kept every so many applied steps: 12 more bytes for each parameter (fewer with
        compact moments, 4 more with an average).
    early_stopping_patience : int >= 1 or None
        ``is_complete()`` becomes true after so many steps in a row whose loss is not below the best one by more than
        ``early_stopping_min_delta``. For other measures than the loss there is `cylora.EarlyStopping`.
    early_stopping_min_delta : float >= 0

    Raises
    ------
    ConfigError
        If a value breaks its rule.
    """

    lora_config: LoraConfig = field(default_factory=LoraConfig)
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    warmup_steps: int = 100
    max_steps: int = 1000
    log_every: int = 10
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay_mode: str = "decoupled"
    schedule: str | Callable[[int], float] = "constant"
    min_learning_rate: float = 0.0
    decay_steps: int | None = None
    nonfinite: str = "raise"
    history_limit: int | None = None
    state_dtype: str = "float32"
    threads: int | None = None
    lora_plus_ratio: float = 1.0
    train_a: bool = True
    rate_pattern: Mapping[str, float] = field(default_factory=dict)
    weight_decay_pattern: Mapping[str, float] = field(default_factory=dict)
    ema_decay: float | None = None
    divergence: str = "ignore"
    divergence_factor: float = 10.0
    divergence_window: int = 50
    rollback_every: int = 100
    early_stopping_patience: int | None = None
    early_stopping_min_delta: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.lora_config, LoraConfig):
            raise ConfigError(f"lora_config must be a LoraConfig, got {type(self.lora_config).__name__}")
        if not callable(self.schedule):
            checks.choice("schedule", self.schedule, SCHEDULES)
        checks.choice("weight_decay_mode", self.weight_decay_mode, WEIGHT_DECAY_MODES)
        checks.choice("nonfinite", self.nonfinite, NONFINITE_POLICIES)
        checks.choice("state_dtype", self.state_dtype, STATE_DTYPES)
        if self.threads is not None:
            self._store(threads=thread_count(self.threads))
        for name in ADAM_RULES:
            self._store(**{name: adam_constant(name, getattr(self, name))})
        for name in ("warmup_steps", "max_steps", "log_every"):
            self._store(**{name: checks.integer(name, getattr(self, name), 0)})
        for name in ("decay_steps", "history_limit", "early_stopping_patience"):
            if getattr(self, name) is not None:
                self._store(**{name: checks.integer(name, getattr(self, name), 1)})
        self._store(max_grad_norm=checks.norm_limit("max_grad_norm", self.max_grad_norm, ConfigError))
        self._check_options()
        highest = max(self.learning_rate, self.min_learning_rate)
        if self.weight_decay_mode == "decoupled" and highest * self.weight_decay > MAX_RATE_TIMES_DECAY:
            raise ConfigError(
                "learning_rate times weight_decay must be at most 2 (above, decaying makes weights grow), "
                f"got {highest:g} times {self.weight_decay:g}"
            )

    def _check_options(self) -> None:
        checks.choice("divergence", self.divergence, DIVERGENCE_POLICIES)
        if not isinstance(self.train_a, bool):
            raise ConfigError(f"train_a must be True or False, got {self.train_a!r}")
        ratio, factor = self.lora_plus_ratio, self.divergence_factor
        finite = checks.finite_at_least(0.0)
        self._store(
            lora_plus_ratio=checks.real("lora_plus_ratio", ratio, "in (0, 1e6]", lambda x: 0 < x <= MAX_FACTOR),
            rate_pattern=Pattern.checked("rate_pattern", self.rate_pattern, _factor),
            weight_decay_pattern=Pattern.checked("weight_decay_pattern", self.weight_decay_pattern, _decay),
            divergence_factor=checks.real("divergence_factor", factor, "finite and > 1", lambda x: 1 < x < math.inf),
            divergence_window=checks.integer("divergence_window", self.divergence_window, 1, MAX_WINDOW),
            rollback_every=checks.integer("rollback_every", self.rollback_every, 1),
            early_stopping_min_delta=checks.real(
                "early_stopping_min_delta", self.early_stopping_min_delta, "finite and >= 0", finite
            ),
        )
        if self.ema_decay is not None:
            decay = checks.real("ema_decay (if not None)", self.ema_decay, "in [0, 1)", lambda x: 0 <= x < 1)
            self._store(ema_decay=decay)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ``lora_config`` as a dict; a callable schedule stays the callable."""
        return plain_fields(self) | {"lora_config": self.lora_config.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from field names and values, ``lora_config`` as a mapping or a LoraConfig.

        An unknown name is a ConfigError.
        """
        known = known_keys(cls, values)
        if isinstance(known.get("lora_config"), Mapping):
            known["lora_config"] = LoraConfig.from_dict(known["lora_config"])
        return cls(**known)
