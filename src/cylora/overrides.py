"""AdamParams: the rate and Adam's constants for one step, in the place of a trainer's own."""

from dataclasses import dataclass, fields

from cylora import checks
from cylora.config import adam_constant
from cylora.lora_config import Validated

__all__ = ["AdamParams"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamParams(Validated):
    """What one step shall use instead of what its trainer's config says; None leaves that.

    The names are those of the Tinker API's ``AdamParams``, its defaults are not: what is not given is the trainer's. A
    step with these is the step of a trainer that is configured so and has the same parameters and moments.

    Parameters
    ----------
    learning_rate : float in [0, 1e6], optional
        Instead of the schedule's rate, warm-up included. The factors of ``lora_plus_ratio`` and ``rate_pattern`` stay.
    beta1, beta2, eps, weight_decay : float, optional
        Within the rules of `LoraTrainingConfig`. The biases of m and v are corrected by 1 - beta^t with this beta. What
        ``weight_decay_pattern`` says of some modules stays.
    grad_clip_norm : float >= 0, optional
        ``max_grad_norm`` of this step; 0 turns clipping off, as inf does.

    Raises
    ------
    ConfigError
        If a value breaks its rule.
    """

    learning_rate: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    grad_clip_norm: float | None = None

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if getattr(self, f.name) is not None):
            value = getattr(self, name)
            if name == "grad_clip_norm":
                rule = ">= 0 (0 turns clipping off)"
                self._store(grad_clip_norm=checks.real(name, value, rule, lambda x: x >= 0))
            else:
                self._store(**{name: adam_constant(name, value)})
