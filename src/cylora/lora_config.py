"""LoraConfig: shape and scale of adapters, frozen, keyword-only, and valid from the moment it exists."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from cylora import checks
from cylora.errors import ConfigError
from cylora.patterns import Pattern

__all__ = ["MAX_ALPHA", "LoraConfig", "Validated", "known_keys", "plain_fields"]

MAX_ALPHA = 1e6


def known_keys(cls: type, values: object) -> dict[str, Any]:
    """Return a mapping of a config's field names as a dict; ConfigError for one that is no such mapping."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{cls.__name__} must be made from a mapping of field names, got {type(values).__name__}")
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{cls.__name__} has no field {key!r}; its fields are {', '.join(known)}")
    return dict(values)


def plain_fields(config: Any) -> dict[str, Any]:
    """Return a config's fields by name, patterns as dicts."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {name: dict(value) if isinstance(value, Pattern) else value for name, value in values.items()}


def _alpha(name: str, value: Any) -> float:
    return checks.real(name, value, "in (0, 1e6]", lambda x: 0 < x <= MAX_ALPHA)


class Validated:
    """Store checked values on a frozen instance."""

    __slots__ = ()

    def _store(self, **checked: object) -> None:
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig(Validated):
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
    rank_pattern, alpha_pattern : mapping of str to int or float
        Other ranks and alphas for some modules of an AdapterSet, with PEFT's meaning: the first key counts that is the
        module's name or the end of it from a dot on (``q_proj``, ``layers.0.q_proj``; after ``^`` the whole name).
        Regular expressions are refused. A module's scaling is that of its own rank and alpha.

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
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

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
            alpha=_alpha("alpha", self.alpha),
            dropout=checks.real("dropout", self.dropout, "in [0, 1)", lambda x: 0 <= x < 1),
            target_modules=modules,
            rank_pattern=Pattern.checked("rank_pattern", self.rank_pattern, lambda n, x: checks.integer(n, x, 1)),
            alpha_pattern=Pattern.checked("alpha_pattern", self.alpha_pattern, _alpha),
        )

    @property
    def scaling(self) -> float:
        """Factor on B @ A: alpha / rank, or alpha / sqrt(rank) with ``use_rslora``."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def for_modules(self, modules: Iterable[str]) -> list[Self]:
        """Return the config of each module: its own rank and alpha, and no patterns.

        Raises
        ------
        ConfigError   If a key of a pattern counts for none of them.
        """
        ranks, alphas = self._patterns()
        modules = list(modules)
        if not ranks and not alphas:
            return [self] * len(modules)
        ranks.require_match("rank_pattern", modules)
        alphas.require_match("alpha_pattern", modules)
        own: dict[tuple[int, float], Self] = {}
        found = [(ranks.value(name, self.rank), alphas.value(name, self.alpha)) for name in modules]
        for rank, alpha in dict.fromkeys(found):
            own[rank, alpha] = replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})
        return [own[pair] for pair in found]

    def require_one_shape(self) -> None:
        """Raise ConfigError if there are patterns: a lone adapter has no name that they could fit."""
        for name, pattern in zip(("rank_pattern", "alpha_pattern"), self._patterns(), strict=True):
            if pattern:
                raise ConfigError(f"{name} must be empty for a lone LoraAdapter, which has no name, got {pattern!r}")

    def _patterns(self) -> tuple[Pattern[int], Pattern[float]]:
        return self.rank_pattern, self.alpha_pattern  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain numbers, strings, lists and dicts."""
        return plain_fields(self) | {"target_modules": list(self.target_modules)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from field names and values; an unknown name is a ConfigError."""
        return cls(**known_keys(cls, values))
