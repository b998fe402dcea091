"""``adapter_config.json``: which of its keys cylora understands, refuses, or carries along."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cylora import checks
from cylora.errors import FormatError
from cylora.lora_config import MAX_ALPHA
from cylora.patterns import LITERAL

__all__ = ["CONFIG_NAME", "PLAIN", "PeftConfig", "parse_config", "target_modules", "to_config"]

CONFIG_NAME = "adapter_config.json"

# Keys that change what the adapters compute, and the values with which they do not. Any other value is refused.
# Initialisations such as PiSSA, OLoRA and LoftQ change the frozen weights too, which are not in the file.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "megatron_config": (None,),
    "arrow_config": (None,),
    "loftq_config": (None, {}),
    "corda_config": (None,),
    "ensure_weight_tying": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# Written anew. The last two say how A and B were drawn, which is over; with False, PEFT would draw a B that is not zero
# for every module that is in its model and not in the file.
OWN = (
    "peft_type", "r", "lora_alpha", "use_rslora", "lora_dropout", "rank_pattern", "alpha_pattern", "target_modules",
    "inference_mode", "init_lora_weights", "eva_config",
)  # fmt: skip
# How PEFT names what switches a variant of LoRA on. VeLoRA only stores activations differently while PEFT trains.
VARIANT_KEY = re.compile(r"(?:use|lora)_.*|(?!velora).*_config")
DEFAULTS: dict[str, Any] = {
    "base_model_name_or_path": None,
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "task_type": None,
    "modules_to_save": None,
    "init_lora_weights": True,
    "revision": None,
}
PLAIN = re.compile(r"[A-Za-z0-9_.-]+")


class PeftConfig(NamedTuple):
    """What a config says of the adapters.

    Attributes
    ----------
    rank, alpha : for modules without a pattern of their own.
    rank_pattern, alpha_pattern : by module name, or its end.
    kept : keys that say nothing of the adapters' mathematics, as they were.
    """

    rank: int
    alpha: float
    use_rslora: bool
    dropout: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    kept: dict[str, Any]


def parse_config(document: Any, path: object) -> PeftConfig:
    """Return what an adapter_config.json says; FormatError, naming ``path``, key and rule, if it breaks one."""
    if not isinstance(document, dict):
        raise FormatError(f"{path}: the config must be an object, got {type(document).__name__}")
    for key, rule in (("peft_type", "'LORA'"), ("r", "given"), ("lora_alpha", "given")):
        if key not in document or (key == "peft_type" and document[key] != "LORA"):
            raise FormatError(f"{path}: {key} must be {rule}, got {document.get(key)!r:.80}")
    for key, value in document.items():
        if key in NEUTRAL:
            # 0 == False and 1 == True: the types must agree too.
            if not any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL[key]):
                rule = f"{key} must not be set, since it changes what adapters do"
                raise FormatError(f"{path}: {rule}, got {value!r:.80}")
        elif key not in OWN and VARIANT_KEY.fullmatch(key) and value:
            raise FormatError(f"{path}: {key} is not known and may change what adapters do, got {value!r:.80}")
    use_rslora = document.get("use_rslora", False)
    if not isinstance(use_rslora, bool):
        raise FormatError(f"{path}: use_rslora must be true or false, got {use_rslora!r:.80}")
    rank = checks.integer(f"{path}: r", document["r"], 1, 2**31, FormatError)
    dropout = document.get("lora_dropout", 0.0)
    return PeftConfig(
        rank=rank,
        alpha=_alpha(f"{path}: lora_alpha", document["lora_alpha"]),
        use_rslora=use_rslora,
        dropout=checks.real(f"{path}: lora_dropout", dropout, "in [0, 1)", lambda x: 0 <= x < 1, FormatError),
        rank_pattern={
            key: checks.integer(f"{path}: rank_pattern {key!r:.80}", value, 1, 2**31, FormatError)
            for key, value in _pattern(path, "rank_pattern", document)
        },
        alpha_pattern={
            key: _alpha(f"{path}: alpha_pattern {key!r:.80}", value)
            for key, value in _pattern(path, "alpha_pattern", document)
        },
        kept={key: value for key, value in document.items() if key not in OWN},
    )


def _alpha(name: str, value: Any) -> float:
    return checks.real(name, value, "a number in (0, 1e6]", lambda x: 0 < x <= MAX_ALPHA, FormatError)


def _pattern(path: object, key: str, document: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield the entries of a pattern. PEFT takes each key as a regular expression; only literal ones are taken here.

    A regular expression from a file can keep a process busy for ever.
    """
    pattern = document.get(key)
    if pattern is None:
        return
    if not isinstance(pattern, dict):
        raise FormatError(f"{path}: {key} must be an object, got {pattern!r:.80}")
    for name, value in pattern.items():
        if not LITERAL.fullmatch(name):
            raise FormatError(f"{path}: {key} must have names as keys, no regular expressions, got {name!r:.80}")
        yield name, value


def target_modules(modules: Iterable[str]) -> list[str]:
    """Return what ``target_modules`` must say for exactly these modules to get adapters.

    The last parts of their names where every layer has the same ones (``["k_proj", "q_proj"]``), since some servers
    understand only those; otherwise the names in full.
    """
    modules = list(modules)
    numbers: dict[str, set[str]] = {}
    for module in modules:
        parts = module.split(".")
        skeleton = ".".join("*" if part.isdecimal() else part for part in parts)
        numbers.setdefault(skeleton, set()).add(".".join(part for part in parts if part.isdecimal()))
    first = next(iter(numbers.values()))
    last_parts = sorted({module.rpartition(".")[2] for module in modules})
    one_place_each = len(last_parts) == len(numbers)
    is_every_layer = first == {str(n) for n in range(len(first))}
    if one_place_each and is_every_layer and all(those == first for those in numbers.values()):
        return last_parts
    return sorted(modules)


def to_config(
    kept: Mapping[str, Any],
    modules: Iterable[str],
    *,
    rank: int,
    alpha: float,
    use_rslora: bool = False,
    dropout: float,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return a config for PEFT and for the servers that read its files."""
    return {
        **DEFAULTS,
        **kept,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if math.floor(alpha) == alpha else alpha,  # some servers read integers only
        "use_rslora": use_rslora,
        "lora_dropout": dropout,
        "target_modules": target_modules(modules),
        "inference_mode": True,
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": dict(alpha_pattern or {}),
    }
