"""LoraConfig and LoraTrainingConfig: frozen, keyword-only, and valid from the moment they exist."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from cylora import checks
from cylora.errors import ConfigError

__all__ = [
    "MAX_LEARNING_RATE",
    "MAX_RATE_TIMES_DECAY",
    "STATE_DTYPES",
    "LoraConfig",
    "LoraTrainingConfig",
    "thread_count",
]

MAX_LEARNING_RATE = 1e6
MAX_ALPHA = 1e6
MAX_RATE_TIMES_DECAY = 2.0
MAX_DECAY = 1e6  # times the largest rate it must stay far inside float32
# Below this, eps times the smallest bias correction would leave float32 and a zero gradient could divide 0 by 0.
MIN_EPS = 1e-30
# Below this, an increment of v is mostly the old v with its sign changed, and v keeps that one's rounding error.
MIN_BETA2 = 0.5

SCHEDULES = ("constant", "linear", "cosine", "warmup_stable_decay")
WEIGHT_DECAY_MODES = ("decoupled", "l2")
NONFINITE_POLICIES = ("raise", "skip")
STATE_DTYPES = ("float32", "bfloat16", "8bit")
MAX_THREADS = 64


def _known_keys(cls: type, values: object) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{cls.__name__} must be made from a mapping of field names, got {type(values).__name__}")
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{cls.__name__} has no field {key!r}; its fields are {', '.join(known)}")
    return dict(values)


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


class _Validated:
    """Store checked values on a frozen instance."""

    __slots__ = ()

    def _store(self, **checked: object) -> None:
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig(_Validated):
    """Shape and scale of LoRA adapters (Hu et al. 2021, arXiv:2106.09685).

    Parameters
    ----------
    rank : int >= 1
    alpha : float in (0, 1e6]
    dropout : float in [0, 1)
        Probability that an element of the adapter's input is dropped while training.
    target_modules : tuple of str
        Names of the modules that get an adapter.
    use_rslora : bool
        Scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732) instead of alpha / rank.

    Raises
    ------
    ConfigError
        If a value breaks its rule.
    """

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    use_rslora: bool = False

    def __post_init__(self) -> None:
        try:
            modules = () if isinstance(self.target_modules, str) else tuple(self.target_modules)
        except TypeError:
            modules = ()
        if not modules or not all(isinstance(name, str) and name for name in modules):
            got = f"got {self.target_modules!r}"
            raise ConfigError(f"target_modules must be a non-empty sequence of non-empty names, {got}")
        if len(set(modules)) != len(modules):
            raise ConfigError(f"target_modules must not repeat a name, got {modules!r}")
        if not isinstance(self.use_rslora, bool):
            raise ConfigError(f"use_rslora must be True or False, got {self.use_rslora!r}")
        self._store(
            rank=checks.integer("rank", self.rank, 1),
            alpha=checks.real("alpha", self.alpha, "in (0, 1e6]", lambda x: 0 < x <= MAX_ALPHA),
            dropout=checks.real("dropout", self.dropout, "in [0, 1)", lambda x: 0 <= x < 1),
            target_modules=modules,
        )

    @property
    def scaling(self) -> float:
        """Factor on B @ A: alpha / rank, or alpha / sqrt(rank) with ``use_rslora``."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain numbers, strings and lists."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"target_modules": list(self.target_modules)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from field names and values; an unknown name is a ConfigError."""
        return cls(**_known_keys(cls, values))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraTrainingConfig(_Validated):
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
        for name in ("learning_rate", "min_learning_rate"):
            checked = checks.real(name, getattr(self, name), "in [0, 1e6]", lambda x: 0 <= x <= MAX_LEARNING_RATE)
            self._store(**{name: checked})
        self._store(
            beta1=checks.real("beta1", self.beta1, "in [0, 1)", lambda x: 0 <= x < 1),
            beta2=checks.real("beta2", self.beta2, "in [0.5, 1)", lambda x: MIN_BETA2 <= x < 1),
        )
        for name in ("warmup_steps", "max_steps", "log_every"):
            self._store(**{name: checks.integer(name, getattr(self, name), 0)})
        for name in ("decay_steps", "history_limit"):
            if getattr(self, name) is not None:
                self._store(**{name: checks.integer(name, getattr(self, name), 1)})
        self._store(
            weight_decay=checks.real("weight_decay", self.weight_decay, "in [0, 1e6]", lambda x: 0 <= x <= MAX_DECAY),
            max_grad_norm=checks.norm_limit("max_grad_norm", self.max_grad_norm, ConfigError),
            eps=checks.real("eps", self.eps, "finite and >= 1e-30", checks.finite_at_least(MIN_EPS)),
        )
        highest = max(self.learning_rate, self.min_learning_rate)
        if self.weight_decay_mode == "decoupled" and highest * self.weight_decay > MAX_RATE_TIMES_DECAY:
            raise ConfigError(
                "learning_rate times weight_decay must be at most 2 (above, decaying makes weights grow), "
                f"got {highest:g} times {self.weight_decay:g}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ``lora_config`` as a dict; a callable schedule stays the callable."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"lora_config": self.lora_config.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from field names and values, ``lora_config`` as a mapping or a LoraConfig.

        An unknown name is a ConfigError.
        """
        known = _known_keys(cls, values)
        if isinstance(known.get("lora_config"), Mapping):
            known["lora_config"] = LoraConfig.from_dict(known["lora_config"])
        return cls(**known)
